#include "metal/metal_step.h"

#include <cmath>
#include <set>

#include "metal/metal_ops.h"
#include "metal/step_limits.h"
#include "mlx/backend/cuda/cuda.h"
#include "ops/checks.h"

namespace moefuse::metal {

namespace {

using Arg = mx::fast::TemplateArg;

// Stretches of the cache that work on one head at once, whatever the context: a row's bits may not
// depend on how long another row is. 20 heads make 160 threadgroups of 8 simdgroups.
constexpr int kSplits = 8;

void append(std::vector<mx::array>& inputs, const Matrix& m) {
  inputs.insert(inputs.end(), {m.weight, m.scales, m.biases});
}

const char* kernel_of(const Embed&) {
  return "embed";
}
const char* kernel_of(const GroupedProjection&) {
  return "norm_qkv";
}
const char* kernel_of(const GroupedAttention&) {
  return "attention_gqa";
}
const char* kernel_of(const LatentProjection&) {
  return "norm_qkv";
}
const char* kernel_of(const LatentQuery&) {
  return "norm_qkv";
}
const char* kernel_of(const LatentAttention&) {
  return "attention_mla";
}
const char* kernel_of(const LatentOutput&) {
  return "mla_unembed";
}
const char* kernel_of(const OutputProjection&) {
  return "linear_residual";
}
const char* kernel_of(const Router& s) {
  return s.options.scoring == Scoring::softmax ? "norm_router_softmax" : "norm_router_sigmoid";
}
const char* kernel_of(const ExpertsGateUp& s) {
  return s.shared_gate ? "moe_experts_gate_up_shared" : "moe_experts_gate_up";
}
const char* kernel_of(const ExpertsDown& s) {
  return s.shared_down ? "moe_experts_down_shared" : "moe_experts_down_residual";
}
const char* kernel_of(const DenseGateUp&) {
  return "norm_gate_up";
}
const char* kernel_of(const DenseDown&) {
  return "linear_residual";
}
const char* kernel_of(const Head&) {
  return "norm_qkv";
}

}  // namespace

// One token's way through the stages: what each hands to the next.
struct MetalStep::Walk {
  // tokens [rows], places [rows, 4] and angles: what the texts take under these names.
  Walk(MetalStep& step, int row_count, const std::vector<LayerCache>& layer_caches,
       const mx::array& ids, const mx::array& where, const mx::array& rope_table,
       std::function<std::vector<mx::array>(const Call&)> launcher)
      : owner(step),
        launch_call(std::move(launcher)),
        rows(row_count),
        caches(layer_caches),
        tokens(ids),
        places(where),
        angles(rope_table) {
    for (const Stage& stage : owner.plan_.stages) {
      layer = stage.layer;
      std::visit([&](const auto& s) { run(s); }, stage.work);
    }
  }

  // MLX keeps a lone float of CUDA's where the host can reach it, which makes every read slow.
  const mx::array& constant(float v) {
    const bool wide = mx::cu::is_available();
    return owner.constants_.try_emplace(v, wide ? mx::full({16}, v) : mx::array({v})).first->second;
  }

  std::vector<mx::array> outputs(const char* name, std::vector<mx::array> inputs,
                                 std::vector<Arg> args, std::vector<mx::Shape> shapes,
                                 std::vector<mx::Dtype> dtypes, Groups groups, int threads) {
    return launch_call({&kernel_text(name), std::move(inputs), std::move(args), std::move(shapes),
                        std::move(dtypes), groups, threads});
  }
  mx::array output(const char* name, std::vector<mx::array> inputs, std::vector<Arg> args,
                   mx::Shape shape, Groups groups, int threads) {
    return outputs(name, std::move(inputs), std::move(args), {std::move(shape)}, {dtype}, groups,
                   threads)[0];
  }

  // Up to three matrices below each other on the normed first part of x's rows.
  mx::array project(const mx::array& x, const Norm& norm, const Matrix& a, const Matrix* b,
                    const Matrix* c) {
    std::vector<mx::array> inputs = {x, norm.weight, constant(norm.eps)};
    append(inputs, a);
    append(inputs, b ? *b : a);
    append(inputs, c ? *c : a);
    const int nk = b ? b->rows : 0, nv = c ? c->rows : 0, n = a.rows + nk + nv;
    return output("norm_qkv", inputs,
                  {dtype, a.bits, a.group_size, a.cols, x.shape(-1), a.rows, nk, nv}, {rows, n},
                  {blocks(n, 32), rows, 1}, 256);
  }

  mx::array add_to_residual(const mx::array& x, const Matrix& m) {
    return output("linear_residual", {x, m.weight, m.scales, m.biases, hidden},
                  {dtype, m.bits, m.group_size, m.cols, m.rows}, {rows, m.rows},
                  {blocks(m.rows, 8), rows, 1}, 64);
  }

  void run(const Embed& s) {
    const Matrix& m = s.table;
    hidden = output("embed", {tokens, m.weight, m.scales, m.biases},
                    {dtype, m.bits, m.group_size, m.rows, m.cols}, {rows, m.cols},
                    {blocks(m.cols, 256), rows, 1}, 256);
  }
  void run(const GroupedProjection& s) { projected = project(hidden, s.norm, s.q, &s.k, &s.v); }
  void run(const GroupedAttention& s) {
    const LayerCache& cache = caches[layer];
    auto out = outputs("attention_gqa",
                       {projected, s.q_norm.weight, s.k_norm.weight, constant(s.q_norm.eps),
                        constant(s.scale), angles, places, cache.keys, cache.values},
                       {dtype, s.heads, s.kv_heads, s.head_dim, kSplits},
                       {{rows, s.heads, kSplits, s.head_dim}, {rows, s.heads, kSplits, 2}},
                       {mx::float32, mx::float32}, {s.heads, kSplits, rows}, 256);
    partial = out[0];
    stats = out[1];
    grouped = &s;
  }
  void run(const LatentProjection& s) {
    projected = project(hidden, s.norm, s.q_a, &s.kv_a, nullptr);
  }
  void run(const LatentQuery& s) {
    query = project(projected, s.q_a_norm, s.q_b, nullptr, nullptr);
    latent = &s;
  }
  void run(const LatentAttention& s) {
    const LayerCache& cache = caches[layer];
    const LatentQuery& q = *latent;
    const int stride = projected.shape(-1);
    auto out = outputs(
        "attention_mla",
        {query, projected, q.kv_a_norm.weight, constant(q.kv_a_norm.eps), constant(s.scale), angles,
         places, q.embed_q.weight, q.embed_q.scales, q.embed_q.biases, cache.keys, cache.values},
        {dtype, q.embed_q.bits, q.embed_q.group_size, s.heads, q.nope_dim, s.rope_dim, s.latent_dim,
         kSplits, stride, stride - s.latent_dim - s.rope_dim},
        {{rows, s.heads, kSplits, s.latent_dim}, {rows, s.heads, kSplits, 2}},
        {mx::float32, mx::float32}, {s.heads, kSplits, rows}, 256);
    partial = out[0];
    stats = out[1];
    grouped = nullptr;
  }
  void run(const LatentOutput& s) {
    const Matrix& m = s.unembed;
    attended = output("mla_unembed", {partial, stats, m.weight, m.scales, m.biases},
                      {dtype, m.bits, m.group_size, m.count, m.cols, m.rows, kSplits},
                      {rows, m.count, m.rows}, {blocks(m.rows, 32), m.count, rows}, 256);
  }
  void run(const OutputProjection& s) {
    if (!grouped) {
      hidden = add_to_residual(attended, s.o);
      return;
    }
    hidden = output(
        "attention_out", {partial, stats, s.o.weight, s.o.scales, s.o.biases, hidden},
        {dtype, s.o.bits, s.o.group_size, grouped->heads, grouped->head_dim, kSplits, s.o.rows},
        {rows, s.o.rows}, {blocks(s.o.rows, 32), rows, 1}, 256);
  }
  void run(const Router& s) {
    const bool softmax = s.options.scoring == Scoring::softmax, norm = s.options.norm_topk_prob;
    const int width = hidden.shape(-1);
    std::vector<mx::array> inputs = {hidden, s.norm.weight, constant(s.norm.eps)};
    std::vector<Arg> args;
    if (softmax) {
      append(inputs, *s.quantized_gate);
      args = {
          dtype, s.quantized_gate->bits, s.quantized_gate->group_size, width, s.experts, s.top_k,
          norm};
    } else {
      inputs.insert(inputs.end(),
                    {*s.dense_gate,
                     s.correction_bias ? *s.correction_bias : mx::zeros({s.experts}, mx::float32),
                     constant(s.options.scaling_factor)});
      args = {dtype, width, s.experts, s.top_k, norm};
    }
    auto out =
        outputs(kernel_of(s), inputs, args, {{rows, width}, {rows, s.top_k}, {rows, s.top_k}},
                {dtype, mx::uint32, softmax ? dtype : mx::float32}, {rows, 1, 1}, 512);
    normed = out[0];
    indices = out[1];
    weights = out[2];
    top_k = s.top_k;
  }
  void run(const ExpertsGateUp& s) {
    std::vector<mx::array> inputs = {normed, indices};
    append(inputs, s.gate);
    append(inputs, s.up);
    const int slots = top_k + (s.shared_gate ? 1 : 0);
    std::vector<Arg> args = {dtype, s.gate.bits, s.gate.group_size, s.gate.count,
                             top_k, s.gate.cols, s.gate.rows};
    if (s.shared_gate) {
      append(inputs, *s.shared_gate);
      append(inputs, *s.shared_up);
    } else {
      args.insert(args.begin() + 1, dtype);  // of what is stored
      args.push_back(true);                  // rounded after each step
    }
    inner = output(kernel_of(s), inputs, args, {rows, slots, s.gate.rows},
                   {blocks(s.gate.rows, 8), slots, rows}, 64);
  }
  void run(const ExpertsDown& s) {
    std::vector<mx::array> inputs = {inner, indices, weights};
    append(inputs, s.down);
    const int combine = combine_steps(owner.accumulate_, dtype, weights.dtype());
    std::vector<Arg> args = {dtype, s.down.bits, s.down.group_size, s.down.count,
                             top_k, s.down.cols, s.down.rows,       combine};
    if (s.shared_down) {
      append(inputs, *s.shared_down);
    } else {
      args.insert(args.begin() + 1, weights.dtype());
    }
    inputs.push_back(hidden);
    hidden = output(kernel_of(s), inputs, args, {rows, s.down.rows},
                    {blocks(s.down.rows, 4), rows, 1}, 32 * (top_k + (s.shared_down ? 1 : 0)));
  }
  void run(const DenseGateUp& s) {
    std::vector<mx::array> inputs = {hidden, s.norm.weight, constant(s.norm.eps)};
    append(inputs, s.gate);
    append(inputs, s.up);
    inner = output("norm_gate_up", inputs,
                   {dtype, s.gate.bits, s.gate.group_size, s.gate.cols, s.gate.rows},
                   {rows, s.gate.rows}, {blocks(s.gate.rows, 32), rows, 1}, 256);
  }
  void run(const DenseDown& s) { hidden = add_to_residual(inner, s.down); }
  void run(const Head& s) { logits = project(hidden, s.norm, s.lm_head, nullptr, nullptr); }

  MetalStep& owner;
  std::function<std::vector<mx::array>(const Call&)> launch_call;
  int rows, layer = -1, top_k = 0;
  const std::vector<LayerCache>& caches;
  const mx::Dtype dtype = owner.plan_.dtype;
  const GroupedAttention* grouped = nullptr;
  const LatentQuery* latent = nullptr;
  mx::array tokens, places, angles;
  mx::array hidden{0}, projected{0}, query{0}, partial{0}, stats{0}, attended{0};
  mx::array normed{0}, indices{0}, weights{0}, inner{0}, logits{0};
};

namespace {

// The family has one rotary embedding, the same in every layer.
const Rope& rope_of(const Plan& plan) {
  for (const Stage& stage : plan.stages) {
    if (const auto* s = std::get_if<GroupedAttention>(&stage.work)) return s->rope;
    if (const auto* s = std::get_if<LatentQuery>(&stage.work)) return s->rope;
  }
  fail("step", "plan", "an attention stage", "none");
}

std::vector<uint32_t> tokens_of(const std::vector<StepRow>& rows) {
  std::vector<uint32_t> tokens;
  for (const StepRow& row : rows) tokens.push_back(row.token);
  return tokens;
}

// Sequence, first slot, newest slot and capacity of each row.
std::vector<uint32_t> places_of(const std::vector<StepRow>& rows, int capacity) {
  std::vector<uint32_t> places;
  for (const StepRow& row : rows)
    for (int v : {row.sequence, row.first, row.slot, capacity})
      places.push_back(static_cast<uint32_t>(v));
  return places;
}

// (cos, sin) of each row's position for each pair.
std::vector<float> angles_of(const std::vector<StepRow>& rows, const Rope& rope) {
  std::vector<float> table;
  for (const StepRow& row : rows)
    for (int i = 0; i < rope.dims; i += 2) {
      const double angle = row.position * std::pow(double(rope.base), -double(i) / rope.dims);
      table.push_back(static_cast<float>(std::cos(angle)));
      table.push_back(static_cast<float>(std::sin(angle)));
    }
  return table;
}

std::vector<mx::array> arrays_of(const std::vector<LayerCache>& caches) {
  std::vector<mx::array> arrays;
  for (const LayerCache& c : caches) arrays.insert(arrays.end(), {c.keys, c.values});
  return arrays;
}

std::vector<const void*> buffers_of(const std::vector<LayerCache>& caches) {
  std::vector<const void*> buffers;
  for (const LayerCache& c : caches)
    for (const mx::array* a : {&c.keys, &c.values}) {
      auto buffer = a->buffer();
      buffers.push_back(buffer.ptr());
    }
  return buffers;
}

}  // namespace

MetalStep::MetalStep(const Plan& plan, Accumulate accumulate)
    : plan_(plan), accumulate_(accumulate) {
  check_limits(plan_);
}
MetalStep::~MetalStep() = default;

mx::array MetalStep::run(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches,
                         const std::optional<mx::array>& tokens) {
  std::set<int> sequences;
  for (const StepRow& row : rows)
    if (!sequences.insert(row.sequence).second)
      fail("step", "rows", "one row of each sequence on a GPU",
           "two of sequence " + std::to_string(row.sequence));
  if (caches[0].keys.size() >= (size_t{1} << 32))
    fail("step", "caches[0].keys", "fewer than 2^32 elements on a GPU",
         std::to_string(caches[0].keys.size()));
  ++calls_;
  if (cuda::can_replay()) return replay(rows, caches, tokens);
  const int count = static_cast<int>(rows.size());
  const auto ids = tokens_of(rows), places = places_of(rows, caches[0].keys.shape(2));
  const auto angles = angles_of(rows, rope_of(plan_));
  Walk walk(*this, count, caches, tokens ? *tokens : mx::array(ids.begin(), {count}, mx::uint32),
            mx::array(places.begin(), {count, 4}, mx::uint32),
            mx::array(angles.begin(), {count, rope_of(plan_).dims}, mx::float32),
            [](const Call& call) { return launch(call, {}); });
  walk.logits.eval();
  return walk.logits;
}

// The graph of this many rows, recorded anew where a cache has moved.
MetalStep::Recorded& MetalStep::recorded(int rows, const std::vector<LayerCache>& caches) {
  Recorded& r = recorded_[rows];
  auto buffers = buffers_of(caches);
  if (r.replay && r.buffers == buffers) return r;
  if (r.replay) wait();
  r.replay = std::make_unique<cuda::Replay>(rows, rope_of(plan_).dims);
  Walk walk(*this, rows, caches, r.replay->tokens(), r.replay->places(), r.replay->angles(),
            [&](const Call& call) { return r.replay->add(call); });
  r.replay->record(walk.logits, arrays_of(caches));
  r.buffers = std::move(buffers);
  return r;
}

mx::array MetalStep::replay(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches,
                            const std::optional<mx::array>& tokens) {
  const mx::Stream s = mx::default_stream(mx::Device::gpu);
  if (stream_ && stream_->index != s.index) wait();
  stream_ = s;
  Recorded& r = recorded(static_cast<int>(rows.size()), caches);
  const auto ids = tokens_of(rows), places = places_of(rows, caches[0].keys.shape(2));
  const auto angles = angles_of(rows, rope_of(plan_));
  cuda::Feed feed;
  std::copy(ids.begin(), ids.end(), feed.tokens);
  std::copy(places.begin(), places.end(), feed.places);
  std::copy(angles.begin(), angles.end(), feed.angles);
  return r.replay->run(feed, tokens);
}

void MetalStep::wait() {
  if (stream_) mx::synchronize(*stream_);
}

std::map<std::string, std::pair<int, double>> MetalStep::kernel_times(int rows) {
  const auto found = recorded_.find(rows);
  if (found == recorded_.end() || !found->second.replay)
    fail("step", "rows", "a step of as many rows before", std::to_string(rows));
  wait();
  return found->second.replay->times();
}

std::vector<Dispatch> MetalStep::dispatches(int context) const {
  std::vector<Dispatch> list;
  const CacheShape& c = plan_.cache;
  const int64_t slot = int64_t(c.kv_heads) * (c.key_dim + c.value_dim) * plan_.dtype.size();
  bool grouped = false;
  int64_t embed_q = 0;  // read by the attention here, not by the query's projection
  for (const Stage& stage : plan_.stages) {
    int64_t weight_bytes = plan_.describe(stage).weight_bytes;
    if (const auto* q = std::get_if<LatentQuery>(&stage.work)) {
      embed_q = q->heads * q->embed_q.bytes();
      weight_bytes -= embed_q;
    }
    std::string kernel = std::visit([](const auto& s) { return kernel_of(s); }, stage.work);
    const bool gqa = std::holds_alternative<GroupedAttention>(stage.work);
    const bool mla = std::holds_alternative<LatentAttention>(stage.work);
    if (gqa || mla) grouped = gqa;
    if (mla) weight_bytes += embed_q;
    if (grouped && std::holds_alternative<OutputProjection>(stage.work)) kernel = "attention_out";
    list.push_back({kernel, stage.layer, weight_bytes, gqa || mla ? slot * context : 0});
  }
  return list;
}

}  // namespace moefuse::metal
