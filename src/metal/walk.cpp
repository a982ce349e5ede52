#include "metal/walk.h"

#include <cmath>
#include <set>

#include "metal/metal_ops.h"
#include "ops/checks.h"

namespace moefuse::metal {

const char* router_kernel(const Router& s) {
  return s.options.scoring == Scoring::softmax ? "norm_router_softmax" : "norm_router_sigmoid";
}
const char* gate_up_kernel(const ExpertsGateUp& s) {
  return s.shared_gate ? "moe_experts_gate_up_shared" : "moe_experts_gate_up";
}

Walk::Walk(const Plan& p, Accumulate a, Constants& constants, const WalkInputs& inputs,
           Launcher launcher)
    : plan(p),
      accumulate(a),
      rows(inputs.rows),
      caches(inputs.caches),
      dtype(p.dtype),
      activations(p.dtype),
      tokens(inputs.tokens),
      places(inputs.places),
      angles(inputs.angles),
      constants_(constants),
      launcher_(std::move(launcher)) {}

mx::array Walk::walk() {
  for (const Stage& stage : plan.stages) {
    layer = stage.layer;
    std::visit([&](const auto& s) { run(s); }, stage.work);
  }
  return result;
}

void Walk::append(std::vector<mx::array>& inputs, const Matrix& m) {
  inputs.insert(inputs.end(), {m.weight, m.scales, m.biases});
}

const mx::array& Walk::constant(float v) {
  return constants_.try_emplace(v, wide_constants ? mx::full({16}, v) : mx::array({v}))
      .first->second;
}

std::vector<mx::array> Walk::outputs(const char* name, std::vector<mx::array> inputs,
                                     std::vector<Arg> args, std::vector<mx::Shape> shapes,
                                     std::vector<mx::Dtype> dtypes, Groups groups, int threads,
                                     int shared_bytes, int resident) {
  return launcher_({&kernel_text(name), std::move(inputs), std::move(args), std::move(shapes),
                    std::move(dtypes), groups, threads, shared_bytes, resident});
}
mx::array Walk::output(const char* name, std::vector<mx::array> inputs, std::vector<Arg> args,
                       mx::Shape shape, Groups groups, int threads, int resident) {
  return outputs(name, std::move(inputs), std::move(args), {std::move(shape)}, {activations},
                 groups, threads, 0, resident)[0];
}

// Up to three matrices below each other on the normed first part of x's rows.
mx::array Walk::project(const mx::array& x, const Norm& norm, const Matrix& a, const Matrix* b,
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

mx::array Walk::add_to_residual(const mx::array& x, const Matrix& m) {
  return output("linear_residual", {x, m.weight, m.scales, m.biases, hidden},
                {dtype, m.bits, m.group_size, m.cols, m.rows}, {rows, m.rows},
                {blocks(m.rows, 8), rows, 1}, 64);
}

void Walk::run(const Embed& s) {
  const Matrix& m = s.table;
  hidden = output("embed", {tokens, m.weight, m.scales, m.biases},
                  {dtype, activations, m.bits, m.group_size, m.rows, m.cols}, {rows, m.cols},
                  {blocks(m.cols, 256), rows, 1}, 256);
}

void Walk::run(const GroupedProjection& s) {
  projected = project(hidden, s.norm, s.q, &s.k, &s.v);
}

void Walk::run(const GroupedAttention& s) {
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

void Walk::run(const LatentProjection& s) {
  projected = project(hidden, s.norm, s.q_a, &s.kv_a, nullptr);
}

void Walk::run(const LatentQuery& s) {
  query = project(projected, s.q_a_norm, s.q_b, nullptr, nullptr);
  latent = &s;
}

void Walk::run(const LatentAttention& s) {
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

void Walk::run(const LatentOutput& s) {
  const Matrix& m = s.unembed;
  attended = output("mla_unembed", {partial, stats, m.weight, m.scales, m.biases},
                    {dtype, m.bits, m.group_size, m.count, m.cols, m.rows, kSplits},
                    {rows, m.count, m.rows}, {blocks(m.rows, 32), m.count, rows}, 256);
}

void Walk::run(const OutputProjection& s) {
  if (!grouped) {
    hidden = add_to_residual(attended, s.o);
    return;
  }
  hidden = output(
      "attention_out", {partial, stats, s.o.weight, s.o.scales, s.o.biases, hidden},
      {dtype, s.o.bits, s.o.group_size, grouped->heads, grouped->head_dim, kSplits, s.o.rows},
      {rows, s.o.rows}, {blocks(s.o.rows, 32), rows, 1}, 256);
}

void Walk::run(const Router& s) {
  const bool softmax = s.options.scoring == Scoring::softmax, norm = s.options.norm_topk_prob;
  const int width = hidden.shape(-1);
  std::vector<mx::array> inputs = {hidden, s.norm.weight, constant(s.norm.eps)};
  std::vector<Arg> args;
  if (softmax) {
    append(inputs, *s.quantized_gate);
    args = {dtype, s.quantized_gate->bits, s.quantized_gate->group_size, width, s.experts, s.top_k,
            norm};
  } else {
    inputs.insert(inputs.end(),
                  {*s.dense_gate,
                   s.correction_bias ? *s.correction_bias : mx::zeros({s.experts}, mx::float32),
                   constant(s.options.scaling_factor)});
    args = {dtype, width, s.experts, s.top_k, norm};
  }
  auto out =
      outputs(router_kernel(s), inputs, args, {{rows, width}, {rows, s.top_k}, {rows, s.top_k}},
              {dtype, mx::uint32, softmax ? dtype : mx::float32}, {rows, 1, 1}, 512);
  normed = out[0];
  indices = out[1];
  weights = out[2];
  top_k_ = s.top_k;
}

void Walk::run(const ExpertsGateUp& s) {
  std::vector<mx::array> inputs = {normed, indices};
  append(inputs, s.gate);
  append(inputs, s.up);
  const int slots = top_k_ + (s.shared_gate ? 1 : 0);
  std::vector<Arg> args = {dtype,  s.gate.bits, s.gate.group_size, s.gate.count,
                           top_k_, s.gate.cols, s.gate.rows};
  if (s.shared_gate) {
    append(inputs, *s.shared_gate);
    append(inputs, *s.shared_up);
  } else {
    args.insert(args.begin() + 1, dtype);  // of what is stored
    args.push_back(true);                  // rounded after each step
  }
  inner = output(gate_up_kernel(s), inputs, args, {rows, slots, s.gate.rows},
                 {blocks(s.gate.rows, 8), slots, rows}, 64);
}

void Walk::run(const ExpertsDown& s) {
  std::vector<mx::array> inputs = {inner, indices, weights};
  append(inputs, s.down);
  const int combine = combine_steps(accumulate, dtype, weights.dtype());
  std::vector<Arg> args = {dtype,  s.down.bits, s.down.group_size, s.down.count,
                           top_k_, s.down.cols, s.down.rows,       combine};
  if (s.shared_down) {
    append(inputs, *s.shared_down);
  } else {
    args.insert(args.begin() + 1, weights.dtype());
  }
  inputs.push_back(hidden);
  hidden = output(s.shared_down ? "moe_experts_down_shared" : "moe_experts_down_residual", inputs,
                  args, {rows, s.down.rows}, {blocks(s.down.rows, 4), rows, 1},
                  32 * (top_k_ + (s.shared_down ? 1 : 0)));
}

void Walk::run(const DenseGateUp& s) {
  std::vector<mx::array> inputs = {hidden, s.norm.weight, constant(s.norm.eps)};
  append(inputs, s.gate);
  append(inputs, s.up);
  inner = output("norm_gate_up", inputs,
                 {dtype, s.gate.bits, s.gate.group_size, s.gate.cols, s.gate.rows},
                 {rows, s.gate.rows}, {blocks(s.gate.rows, 32), rows, 1}, 256);
}

void Walk::run(const DenseDown& s) {
  hidden = add_to_residual(inner, s.down);
}

void Walk::run(const Head& s) {
  result = project(hidden, s.norm, s.lm_head, nullptr, nullptr);
}

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
  tokens.reserve(rows.size());
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

void check_rows(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches) {
  std::set<int> sequences;
  for (const StepRow& row : rows)
    if (!sequences.insert(row.sequence).second)
      fail("step", "rows", "one row of each sequence on a GPU",
           "two of sequence " + std::to_string(row.sequence));
  if (caches[0].keys.size() >= (size_t{1} << 32))
    fail("step", "caches[0].keys", "fewer than 2^32 elements on a GPU",
         std::to_string(caches[0].keys.size()));
}

}  // namespace moefuse::metal
