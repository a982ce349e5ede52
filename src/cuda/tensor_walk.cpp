#include "cuda/tensor_walk.h"

#include <algorithm>
#include <array>

#include "metal/kernel_table.h"
#include "metal/metal_ops.h"

namespace moefuse::cuda {

namespace {

constexpr int kThreads = 256, kWarps = 8;
// As in kernels/attend_latent.h and stretches.h.
constexpr int kStage = 64, kStretch = 2048;
// Stretches at most: an H200 runs seven clusters of blocks at once that fill a multiprocessor, as
// latent attention's do, and 14 of four KV heads' if two fit on one.
constexpr int kSplits = 3, kLatentSplits = 7;
constexpr int kMostTiles = 8;       // of a block's outputs, 16 rows each
constexpr int kExpertsOfBlock = 8;  // rows of a router that a block of o has registers for
constexpr int kStaticShared = 48 * 1024, kDynamicShared = 215 * 1024;

int slices(int columns) {
  return metal::blocks(columns, 256);
}
// One piece to each where that is no more than `most` warps: a warp that takes one at a time is
// done soonest. Eight else, which leave more registers for the next kernel's blocks.
int warps_for(int pieces, int most) {
  return pieces > kWarps && pieces <= most ? pieces : kWarps;
}
// Of a head's matrix, one piece to each warp of a block: more blocks would bring the same part of
// a row to the grid again, with idle warps.
int tiles_of_head(const Matrix& m) {
  return std::clamp(kWarps / slices(m.cols), 1, metal::blocks(m.rows, 16));
}
// Of a row's values on the grid, and of its partial sums for `tiles` tiles of output.
int grid_bytes(int columns, int tiles) {
  return slices(columns) * (140 + 4 + 4 + tiles * 64) * 4;
}

// Tiles to a block whose warps share each of `rows` rows' `products` evenly, at most: as many as
// shared memory holds, one where the slices of a tile would be added up in another order than
// alone.
int most_tiles(int columns, int warps, int rows, int products, int most) {
  const int parts = std::min(slices(columns), warps);
  if (slices(columns) % parts != 0) return 1;
  const auto bytes = [&](int tiles) {
    return rows * (grid_bytes(columns, 0) + products * parts * tiles * 256);
  };
  while (most > 1 && bytes(most) > kStaticShared) --most;
  return most;
}

// Of latent attention: two stages of positions, so many heads' queries and probabilities, in tiles
// of 64 dimensions.
int latent_shared_bytes(int heads, int latent, int rope) {
  const int row = 2 * 64, tiles = metal::blocks(latent + rope, 64);
  return (2 * kStage * tiles + heads * tiles + 4 * heads) * row;
}

int most_splits(const ModelConfig& config) {
  return config.kv_lora_rank > 0 ? kLatentSplits : kSplits;
}

// The first thing that a stage has and the kernels do not take, or "".
struct Taker {
  int top_k;
  std::string matrix(const Matrix& m, const char* name) const {
    if (m.bits != 4) return std::string(name) + " of " + std::to_string(m.bits) + " bits";
    if (m.group_size != 64)
      return std::string(name) + " in groups of " + std::to_string(m.group_size);
    return "";
  }
  std::string all(std::initializer_list<std::string> answers) const {
    for (const std::string& a : answers)
      if (!a.empty()) return a;
    return "";
  }
  std::string when(bool refused, const char* what) const { return refused ? what : ""; }
  std::string shared(int bytes) const {
    return when(bytes > kStaticShared, "more columns than shared memory holds");
  }

  std::string operator()(const Embed&) const { return ""; }
  std::string operator()(const GroupedProjection& s) const {
    return all({matrix(s.q, "q"), matrix(s.k, "k"), matrix(s.v, "v"),
                when(s.q.rows % 16 || s.k.rows % 16, "rows that are no multiple of 16"),
                shared(kTensorRows * grid_bytes(s.q.cols, 3))});
  }
  std::string operator()(const GroupedAttention& s) const {
    return all({when(s.head_dim % 32 || s.head_dim > 128, "head_dim that is no 32, 64, 96 or 128"),
                when(s.heads / s.kv_heads > 8, "more than 8 heads to a KV head")});
  }
  std::string operator()(const LatentProjection& s) const {
    return all({matrix(s.q_a, "q_a"), matrix(s.kv_a, "kv_a"),
                when(s.q_a.rows % 16, "rows that are no multiple of 16"),
                shared(kTensorRows * grid_bytes(s.q_a.cols, 3))});
  }
  std::string operator()(const LatentQuery& s) const {
    return all({matrix(s.q_b, "q_b"), matrix(s.embed_q, "embed_q"),
                when(s.latent_dim % 128 || s.latent_dim > 1024, "kv_lora_rank not in 128s"),
                when(s.rope_dim % 32, "rope dimensions that are no multiple of 32"),
                when((s.nope_dim + s.rope_dim) % 8, "a head that is no multiple of 8"),
                when(latent_shared_bytes(24, s.latent_dim, s.rope_dim) > kDynamicShared,
                     "more latent dimensions than shared memory holds")});
  }
  std::string operator()(const LatentAttention&) const { return ""; }
  std::string operator()(const LatentOutput& s) const { return matrix(s.unembed, "unembed_out"); }
  std::string operator()(const OutputProjection& s) const {
    return all({matrix(s.o, "o"), shared(grid_bytes(s.o.cols, 1))});
  }
  std::string operator()(const Router& s) const {
    const int width = static_cast<int>(s.norm.weight.size());
    return all({when(s.experts > 1024 || s.top_k > 16, "more experts than a warp selects from"),
                when(width % 64, "a width that is no multiple of 64"),
                when(metal::blocks(s.experts, metal::blocks(width, 16)) > kExpertsOfBlock,
                     "more experts than the output projection's blocks take"),
                when(s.options.n_group != 1, "groups of experts")});
  }
  std::string operator()(const ExpertsGateUp& s) const {
    return all({matrix(s.gate, "gate"), matrix(s.up, "up"),
                s.shared_gate ? matrix(*s.shared_gate, "shared gate") : "",
                s.shared_up ? matrix(*s.shared_up, "shared up") : "",
                shared(grid_bytes(s.gate.cols, 8))});
  }
  std::string operator()(const ExpertsDown& s) const {
    const int slots = top_k + (s.shared_down ? 1 : 0);
    return all({matrix(s.down, "down"), s.shared_down ? matrix(*s.shared_down, "shared down") : "",
                shared(slots * grid_bytes(s.down.cols, 1))});
  }
  std::string operator()(const DenseGateUp& s) const {
    return all({matrix(s.gate, "gate"), matrix(s.up, "up"),
                shared(kTensorRows * grid_bytes(s.gate.cols, 2))});
  }
  std::string operator()(const DenseDown& s) const {
    return all({matrix(s.down, "down"), shared(grid_bytes(s.down.cols, 1))});
  }
  std::string operator()(const Head& s) const {
    return all({matrix(s.lm_head, "lm_head"), shared(kTensorRows * grid_bytes(s.lm_head.cols, 0))});
  }
};

}  // namespace

std::string tensor_refusal(const Plan& plan) {
  if (plan.dtype != mx::bfloat16 && plan.dtype != mx::float16) return "float32 activations";
  for (const Stage& stage : plan.stages) {
    const std::string why = std::visit(Taker{plan.config.num_experts_per_tok}, stage.work);
    if (why.empty()) continue;
    return (stage.layer < 0 ? "" : "layers." + std::to_string(stage.layer) + ", ") + stage.name +
           ": " + why;
  }
  return "";
}

int cache_splits(const ModelConfig& config, int cached) {
  return std::min(most_splits(config), 1 + cached / kStretch);
}

const mx::array& FoldedRouters::of(int layer, const Router& router, const Matrix& o) {
  if (const auto found = made_.find(layer); found != made_.end()) return found->second;
  const auto fp32 = [](const mx::array& a) { return mx::astype(a, mx::float32); };
  mx::array gate{0};
  if (const auto& q = router.quantized_gate)
    gate = mx::dequantize(q->weight, fp32(q->scales), fp32(q->biases), q->group_size, q->bits);
  else
    gate = fp32(*router.dense_gate);
  constexpr int kEach = 4;  // as in kernels/fold_router.body
  const int words = (o.cols + o.rows) / 8;
  return made_
      .emplace(layer,
               launcher_({&metal::kernel_text("fold_router"),
                          {gate, router.norm.weight, o.weight, o.scales, o.biases},
                          {router.norm.weight.dtype(), router.experts, o.rows, o.cols},
                          {{router.experts, o.cols + o.rows}},
                          {mx::float32},
                          {metal::blocks(words, kThreads), metal::blocks(router.experts, kEach), 1},
                          kThreads})[0])
      .first->second;
}

TensorWalk::TensorWalk(const Plan& p, Accumulate a, metal::Constants& constants,
                       FoldedRouters& routers, const metal::WalkInputs& inputs, Launcher launcher,
                       int multiprocessors, int splits, bool greedy)
    : metal::Walk(p, a, constants, inputs, std::move(launcher)),
      routers_(routers),
      multiprocessors_(multiprocessors),
      splits_(splits),
      greedy_(greedy),
      most_splits_(splits == 1 ? 1 : most_splits(p.config)) {
  wide_constants = true;
  activations = mx::float32;
}

int TensorWalk::beside(int warps) const {
  return rows == 1 && (warps == kWarps || warps > 2 * kWarps) ? 2 : 1;
}

TensorWalk::Tiling TensorWalk::tiling(int tile_count, int piece_count, int copies,
                                      bool many) const {
  constexpr int kRegisters = 65536 / kThreads;
  std::array<int, 4> best = {1 << 30};
  for (int tiles = 1; tiles <= 4; ++tiles) {
    if (tiles > 1 && piece_count > kWarps && piece_count % kWarps) break;  // sums would not fit
    if (rows > 1 && tiles > 3) break;
    const int grid = metal::blocks(tile_count, tiles) * copies;
    const int pieces = metal::blocks(tiles * piece_count, kWarps);
    const int registers = 40 + 20 * pieces;  // 20 hold a piece
    const int wanted = metal::blocks(grid, multiprocessors_);
    const int resident = std::clamp(kRegisters / registers, 1, wanted);
    const int waves = metal::blocks(grid, multiprocessors_ * resident);
    best = std::min(
        best, {waves * resident * pieces, many && tiles == 1 ? 0 : resident, tiles, resident});
  }
  return {best[2], best[3]};
}

int TensorWalk::tiles_at_once(int tile_count, int copies, int resident, int most) const {
  int best = 1, least = 1 << 30;
  for (int tiles = 1; tiles <= most; ++tiles) {
    const int blocks = metal::blocks(metal::blocks(tile_count, tiles) * copies, multiprocessors_);
    if (blocks > resident || blocks * tiles >= least) continue;
    best = tiles;
    least = blocks * tiles;
  }
  return least < 1 << 30 ? best : most;
}

mx::array TensorWalk::project(const mx::array& x, const Norm& norm, const Matrix& a,
                              const Matrix* b, const Matrix* c) {
  std::vector<mx::array> inputs = {x, norm.weight, constant(norm.eps)};
  append(inputs, a);
  append(inputs, b ? *b : a);
  append(inputs, c ? *c : a);
  const int nk = b ? b->rows : 0, nv = c ? c->rows : 0, n = a.rows + nk + nv;
  const auto [tiles, resident] = tiling(metal::blocks(n, 16), slices(a.cols));
  const int warps = warps_for(tiles * slices(a.cols), 12);
  return output("grid_project", inputs,
                {dtype, rows, warps, tiles, a.cols, x.shape(-1), a.rows, nk, nv}, {rows, n},
                {metal::blocks(n, 16 * tiles), 1, 1}, 32 * warps,
                warps > kWarps ? 1 : std::max(resident, beside(warps)));
}

const Router* TensorWalk::router_of_layer() const {
  for (const Stage& stage : plan.stages)
    if (const auto* r = std::get_if<Router>(&stage.work); r && stage.layer == layer) return r;
  return nullptr;
}

void TensorWalk::add_to_residual(const char* kernel, std::vector<mx::array> inputs,
                                 std::vector<Arg> args, const Matrix& m, const Router* router,
                                 metal::Groups groups, int warps) {
  const int experts = router ? router->experts : 0;
  append(inputs, m);
  inputs.push_back(router ? routers_.of(layer, *router, m) : constant(0.0f));
  inputs.push_back(hidden);
  args.insert(args.end(), {m.rows, experts});
  const mx::Shape logits = router ? mx::Shape{rows, experts} : mx::Shape{1};
  const mx::Shape squares = router ? mx::Shape{rows, m.rows / 8} : mx::Shape{1};
  const auto out =
      outputs(kernel, inputs, args, {{rows, m.rows}, logits, squares},
              {mx::float32, mx::float32, mx::float32}, groups, 32 * warps, 0, beside(warps));
  hidden = out[0];
  router_logits_ = out[1];
  row_squares_ = out[2];
  router_ = router;
}

void TensorWalk::add_to_residual(const mx::array& x, const Matrix& m, const Router* router) {
  int together = rows;  // as many rows as shared memory holds
  while (rows % together || together * grid_bytes(m.cols, 1) > kStaticShared) --together;
  const int warps = warps_for(slices(m.cols), 20);
  add_to_residual("grid_linear_residual", {x}, {dtype, together, warps, m.cols}, m, router,
                  {metal::blocks(m.rows, 16), rows / together, 1}, warps);
}

void TensorWalk::run(const GroupedProjection& s) {
  projected = project(hidden, s.norm, s.q, &s.k, &s.v);
}

void TensorWalk::run(const GroupedAttention& s) {
  const LayerCache& cache = caches[layer];
  // A multiprocessor has registers for 16 warps: two blocks where their clusters run at once, else
  // four smaller ones.
  const int at_once = 2 * (multiprocessors_ / metal::kCluster - 1);
  const int warps = splits_ * s.kv_heads * rows <= at_once ? 8 : 4;
  auto out = outputs("cluster_attention_gqa",
                     {projected, s.q_norm.weight, s.k_norm.weight, constant(s.q_norm.eps),
                      constant(s.scale), angles, places, cache.keys, cache.values},
                     {dtype, warps, s.heads, s.kv_heads, s.head_dim, most_splits_},
                     {{rows, s.heads, most_splits_, s.head_dim}, {rows, s.heads, most_splits_, 2}},
                     {mx::float32, mx::float32}, {metal::kCluster * splits_, s.kv_heads, rows},
                     32 * warps, 0, 16 / warps);
  partial = out[0];
  stats = out[1];
  grouped = &s;
}

void TensorWalk::run(const LatentProjection& s) {
  projected = project(hidden, s.norm, s.q_a, &s.kv_a, nullptr);
}

void TensorWalk::run(const LatentQuery& s) {
  query = project(projected, s.q_a_norm, s.q_b, nullptr, nullptr);
  const Matrix& m = s.embed_q;
  const int tiles = tiles_of_head(m);
  latent_query_ = outputs("grid_heads", {query, m.weight, m.scales, m.biases},
                          {dtype, tiles, m.count, s.nope_dim + s.rope_dim, m.cols, m.rows},
                          {{rows, m.count, m.rows}}, {dtype},
                          {metal::blocks(m.rows, 16 * tiles), m.count, rows}, kThreads)[0];
  latent = &s;
}

void TensorWalk::run(const LatentAttention& s) {
  const LayerCache& cache = caches[layer];
  const LatentQuery& q = *latent;
  const int stride = projected.shape(-1);
  // Eight heads to a block where all clusters run at once, else 24, which read a position together.
  const int at_once = multiprocessors_ / metal::kCluster - 1;
  const int heads = metal::blocks(s.heads, 8) * splits_ * rows <= at_once ? 8 : 24;
  auto out = outputs(
      "cluster_attention_mla",
      {latent_query_, query, projected, q.kv_a_norm.weight, constant(q.kv_a_norm.eps),
       constant(s.scale), angles, places, cache.keys, cache.values},
      {dtype, heads, s.heads, q.nope_dim, s.rope_dim, s.latent_dim, most_splits_, stride,
       stride - s.latent_dim - s.rope_dim},
      {{rows, s.heads, most_splits_, s.latent_dim}, {rows, s.heads, most_splits_, 2}},
      {mx::float32, mx::float32}, {metal::kCluster * splits_, metal::blocks(s.heads, heads), rows},
      kThreads, latent_shared_bytes(heads, s.latent_dim, s.rope_dim));
  partial = out[0];
  stats = out[1];
  grouped = nullptr;
}

void TensorWalk::run(const LatentOutput& s) {
  const Matrix& m = s.unembed;
  const int tiles = tiles_of_head(m);
  attended =
      output("grid_unembed", {partial, stats, places, m.weight, m.scales, m.biases},
             {dtype, tiles, m.count, m.cols, m.rows, partial.shape(2)}, {rows, m.count, m.rows},
             {metal::blocks(m.rows, 16 * tiles), m.count, rows}, kThreads);
}

void TensorWalk::run(const OutputProjection& s) {
  const Router* router = router_of_layer();
  if (!grouped) {
    add_to_residual(attended, s.o, router);
    return;
  }
  const int warps = warps_for(slices(s.o.cols), 20);
  add_to_residual("grid_attention_out", {partial, stats, places},
                  {dtype, rows, warps, grouped->heads, grouped->head_dim, most_splits_}, s.o,
                  router, {metal::blocks(s.o.rows, 16), 1, 1}, warps);
}

// Of a router that has no bias, zeros; of a softmax, what its kernels do not read.
mx::array TensorWalk::router_bias() {
  if (router_->options.scoring == Scoring::softmax) return constant(0.0f);
  if (router_->correction_bias) return *router_->correction_bias;
  return mx::zeros({router_->experts}, mx::float32);
}

void TensorWalk::run(const ExpertsGateUp& s) {
  const Router& r = *router_;
  const bool shared = s.shared_gate.has_value();
  std::vector<mx::array> inputs = {hidden,         r.norm.weight, constant(r.norm.eps),
                                   router_logits_, row_squares_,  router_bias()};
  for (const Matrix* m :
       {&s.gate, &s.up, shared ? &*s.shared_gate : &s.gate, shared ? &*s.shared_up : &s.up})
    append(inputs, *m);
  const int slots = r.top_k + (shared ? 1 : 0), tile_count = metal::blocks(s.gate.rows, 16);
  auto [tiles, resident] = tiling(tile_count, slices(s.gate.cols) * 2, slots, true);
  if (rows > 1)
    tiles = tiles_at_once(tile_count, slots * rows, 3,
                          most_tiles(s.gate.cols, kWarps, 1, 2, kMostTiles));
  // Pieces of a warp on their way, and blocks that a multiprocessor has registers for. Of one tile
  // for one row, or of several rows, two pieces do. One row's one tile: three blocks; with
  // registers for four a weight's scale is put aside in memory, which waits for it before the last
  // weights are asked for. Several rows: as many blocks as there are.
  const int count = metal::blocks(tile_count, tiles) * slots * rows;
  int depth = 2, blocks = 3;
  if (rows > 1) {
    blocks = std::clamp(metal::blocks(count, multiprocessors_), 2, 3);
  } else if (tiles > 1) {
    depth = 4;
    blocks = std::max(resident, 2);
  }
  inner = output("grid_gate_up", inputs,
                 {dtype, tiles, depth, r.experts, r.top_k, s.gate.cols, s.gate.rows,
                  r.options.scoring == Scoring::softmax, shared},
                 {rows, slots, s.gate.rows}, {metal::blocks(tile_count, tiles), slots, rows},
                 kThreads, blocks);
}

void TensorWalk::run(const ExpertsDown& s) {
  const Router& r = *router_;
  const bool shared = s.shared_down.has_value();
  const bool softmax = r.options.scoring == Scoring::softmax;
  std::vector<mx::array> inputs = {
      inner,         router_logits_,
      row_squares_,  constant(r.norm.eps),
      router_bias(), constant(softmax ? 1.0f : r.options.scaling_factor)};
  append(inputs, s.down);
  append(inputs, shared ? *s.shared_down : s.down);
  inputs.push_back(hidden);
  const int slots = r.top_k + (shared ? 1 : 0);
  // About three pieces of 256 columns to a warp, and no more than 1,024 threads.
  const int warps = std::clamp(metal::blocks(slices(s.down.cols), 3), 1, 32 / slots);
  const mx::Dtype weight_dtype =
      s.shared_down || r.options.scoring == Scoring::sigmoid ? mx::float32 : dtype;
  const int tile_count = metal::blocks(s.down.rows, 16), threads = 32 * slots * warps;
  const int resident = threads > kThreads && rows == 1 ? 1 : 2;
  // Four threads finish a row of output.
  const int tiles = rows > 1 ? tiles_at_once(tile_count, rows, resident,
                                             most_tiles(s.down.cols, warps, slots, 1, threads / 64))
                             : 1;
  const int depth = rows > 1 ? 2 : 0;  // one row: all of a warp's pieces
  hidden =
      output("grid_down", inputs,
             {dtype, tiles, warps, depth, r.experts, r.top_k, s.down.cols, s.down.rows,
              metal::combine_steps(accumulate, dtype, weight_dtype), r.options.norm_topk_prob,
              softmax, shared},
             {rows, s.down.rows}, {metal::blocks(tile_count, tiles), rows, 1}, threads, resident);
}

void TensorWalk::run(const DenseGateUp& s) {
  std::vector<mx::array> inputs = {hidden, s.norm.weight, constant(s.norm.eps)};
  append(inputs, s.gate);
  append(inputs, s.up);
  inner = output("grid_gate_up_dense", inputs, {dtype, rows, s.gate.cols, s.gate.rows},
                 {rows, s.gate.rows}, {metal::blocks(s.gate.rows, 16), 1, 1}, kThreads);
}

void TensorWalk::run(const DenseDown& s) {
  add_to_residual(inner, s.down, nullptr);
}

void TensorWalk::run(const Head& s) {
  const Matrix& m = s.lm_head;
  // Two pieces on their way for each warp; four rows leave registers for one block only.
  const int depth = slices(m.cols) % 2 == 0 ? 2 : 1, resident = rows > 2 ? 1 : 2;
  const int blocks = resident * multiprocessors_;
  const std::vector<mx::array> inputs = {hidden,   s.norm.weight, constant(s.norm.eps),
                                         m.weight, m.scales,      m.biases};
  std::vector<Arg> args = {dtype, rows, depth, m.cols, m.rows};
  if (!greedy_) {
    result = output("grid_head", inputs, args, {rows, m.rows}, {blocks, 1, 1}, kThreads, resident);
    return;
  }
  args.push_back(blocks);
  const mx::Shape best = {rows, blocks};
  const auto parts = outputs("grid_head_greedy", inputs, args, {best, best},
                             {mx::uint32, mx::uint32}, {blocks, 1, 1}, kThreads, 0, resident);
  result = outputs("sample_greedy", {parts[0], parts[1]}, {blocks}, {{rows}}, {mx::uint32},
                   {rows, 1, 1}, 32)[0];
}

}  // namespace moefuse::cuda
