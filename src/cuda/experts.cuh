// The MoE half of a layer: router, selection, gate and up with SwiGLU, down with the combine and
// the residual. The router selects on fp32 logits and normalises over the selected.
#pragma once
#include "loader.cuh"

namespace moefuse::cuda {

// 8 columns of an 8-bit row of the router with this lane's x; rows lie behind the o tiles
template <int K>
MOEFUSE_DEVICE float router_row(const uint8_t* rows, int count, int row, int column,
                                const float (&x)[8]) {
  const uint2 q = *reinterpret_cast<const uint2*>(rows + row * K + column);
  const uint8_t* s = rows + count * K + (row * (K / kGroupSize) + column / kGroupSize) * 2;
  const float scale = bf16_low(*reinterpret_cast<const uint16_t*>(s));
  const float bias = bf16_low(*reinterpret_cast<const uint16_t*>(s + count * (K / kGroupSize) * 2));
  float dot = 0.f, sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    dot += x[i] * static_cast<float>(((i < 4 ? q.x : q.y) >> (8 * (i & 3))) & 255u);
    sum += x[i];
  }
  return scale * dot + bias * sum;
}

// middle -> router logits, fp32. Leaves the vector's fragment for gate and up.
template <class G>
MOEFUSE_DEVICE void router_stage(Warp& c, uint4 gain, Fragment& f) {
  constexpr int kSlices = G::kHidden / kSlice, kStep = kWarps / kSlices;
  const int slice = c.warp % kSlices, rows = c.s.router.end - c.s.router.begin;
  float v[8];
  poll_slice(c, read_slot(c, c.p.x.middle, c.clock, G::kHidden / 2), slice, kRouter, v);
  mark(c, kRouter, kInput);
  const float ssq = apply_gain(v, gain);
  if (c.warp < kSlices && c.lane == 0) c.s.ssq[1][slice] = ssq;
  const uint8_t* weights =
      c.shared + c.p.layout.dense + (c.s.output.end - c.s.output.begin) * tile_bytes(G::kContext);
#pragma unroll 1
  for (int r = c.warp / kSlices; r < rows; r += kStep) {
    const float y =
        warp_sum(router_row<G::kHidden>(weights, rows, r, slice * kSlice + 8 * c.lane, v));
    if (c.lane == 0) c.red()[slice * rows + r] = y;
  }
  block_sync();
  mark(c, kRouter, kProducts);
  if (c.thread < rows) {
    const float y = sum_slices<kSlices>(c.red() + c.thread, rows) *
                    norm_factor<kSlices>(c.s.ssq[1], G::kHidden, c.p.eps);
    publish(c.p.x.scores, c.clock, G::kExperts, kReplicas, c.s.router.begin + c.thread, as_bits(y));
  }
  make_fragment(f, c.slice(), v, c.lane);
  stage_done(c, kRouter);
}

// One warp fetches the logits; every warp ranks its share of the experts (how many are larger, or
// equal with a lower index), then fetches its share of the selected ones' weights.
template <class G>
MOEFUSE_DEVICE void select_stage(Warp& c, const Layer& layer) {
  constexpr int kPerLane = G::kExperts / 32, kShare = G::kExperts / kWarps;
  float* logits = c.red();
  if (c.warp == 0) {
    uint32_t bits[kPerLane];
    poll(c, read_slot(c, c.p.x.scores, c.clock, G::kExperts) + c.lane, 32, kSelect, bits);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) logits[32 * i + c.lane] = as_float(bits[i]);
  }
  release_to_copies();  // attention's scratch and the new KV row become copy targets
  block_sync();
  mark(c, kSelect, kInput);
  uint32_t key[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) key[i] = sortable(logits[32 * i + c.lane]);
#pragma unroll 2
  for (int j = 0; j < kShare; ++j) {
    const int expert = c.warp * kShare + j;
    const uint32_t mine = sortable(logits[expert]);
    uint32_t above = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      above += key[i] > mine || (key[i] == mine && 32 * i + c.lane < expert);
    }
    const uint32_t rank = warp_add(above);
    if (rank < G::kTopK && c.lane == 0) {
      c.s.expert[rank] = expert;
      c.s.score[rank] = logits[expert];
    }
  }
  block_sync();
  mark(c, kSelect, kProducts);
  load_gate_up<G>(c, layer);
  if (c.warp == 0) {
    const float e = c.lane < G::kTopK ? fast_exp(c.s.score[c.lane % 8] - c.s.score[0]) : 0.f;
    const float total = warp_sum(e);
    if (c.lane < G::kTopK) c.s.weight[c.lane] = e / total;
  }
  stage_done(c, kSelect);
}

// half of the warps take gate, half up, a tile pair at a time as it lands. down is asked for
// halfway, so that it does not hold up gate and up; more as in qkv_stage
template <class G>
MOEFUSE_DEVICE void gate_up_stage(Warp& c, bool more, const Fragment& f) {
  constexpr int kSlices = G::kHidden / kSlice, kStep = kWarps / kSlices / 2;
  constexpr uint32_t kTile = tile_bytes(G::kHidden);
  const int slice = c.warp % kSlices, group = c.warp / kSlices, up = group & 1;
  const int items = c.s.items.end - c.s.items.begin, rows = items * kTileRows;
  float* red = c.red() + up * kSlices * rows;
#pragma unroll 1
  for (int i = group >> 1; i < items; i += kStep) {
    wait(c, &c.s.full_item[i], c.layers, kGateUp);
    if (i == 0) mark(c, kGateUp, kInput);
    if (i == (group >> 1) + (items / 2 / kStep) * kStep) load_down<G>(c, c.layer(0));
    const Run run{c.shared + c.p.layout.items + (2 * i + up) * kTile, 1};
    const float y = quad_sum(unit_product(load_unit<G::kHidden>(run, 0, slice, c.lane), f, c.lane));
    if ((c.lane & 3) == 0) red[slice * rows + i * kTileRows + (c.lane >> 2)] = y;
  }
  mark(c, kGateUp, kWeights);
  block_sync();
  mark(c, kGateUp, kProducts);
  if (more) load_ahead<G>(c, c.layer(1), c.position);
  const int r = 2 * c.thread;
  if (r < rows) {
    const float n = norm_factor<kSlices>(c.s.ssq[1], G::kHidden, c.p.eps);
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float gate = sum_slices<kSlices>(c.red() + r + i, rows) * n;
      const float up_value = sum_slices<kSlices>(c.red() + kSlices * rows + r + i, rows) * n;
      y[i] = gate / (1.f + fast_exp(-gate)) * up_value;
    }
    publish(c.p.x.act, c.clock, G::kTopK * G::kWidth / 2, kReplicas,
            c.s.items.begin * (kTileRows / 2) + r / 2, pack_bf16(y[0], y[1]));
  }
  stage_done(c, kGateUp);
}

// sum over the ranks of weight * row, in rank order; red: [top_k][slices][rows]
template <class G>
MOEFUSE_DEVICE float weighted_sum(const Warp& c, const float* red, int rows) {
  constexpr int kSlices = G::kWidth / kSlice;
  float y = 0.f;
#pragma unroll
  for (int k = 0; k < G::kTopK; ++k) {
    y += c.s.weight[k] * sum_slices<kSlices>(red + k * kSlices * rows, rows);
  }
  return y;
}

// act -> the next layer's hidden = middle + sum of weight * down(act); a warp serves every 16th
// pair of an expert and a slice
template <class G>
MOEFUSE_DEVICE void down_stage(Warp& c) {
  constexpr int kSlices = G::kWidth / kSlice, kPairs = G::kTopK * kSlices;
  constexpr int kShare = (kPairs + kWarps - 1) / kWarps;
  static_assert(kShare <= 2);
  const int tiles = c.s.output.end - c.s.output.begin, rows = tiles * kTileRows;
  const int r = 2 * c.thread, at = (c.s.output.begin * kTileRows + r) / 2;
  uint32_t residual = 0;  // complete since the router stage
  if (r < rows) {
    residual = load_shared_word(read_slot(c, c.p.x.middle, c.clock, G::kHidden / 2) + at);
  }
  uint4 v[kShare];
  const int stride = c.warp + (kShare - 1) * kWarps < kPairs ? kWarps * (kSlice / 2) : 0;
  poll(c,
       read_slot(c, c.p.x.act, c.clock, G::kTopK * G::kWidth / 2) + c.warp % kPairs * (kSlice / 2) +
           4 * c.lane,
       stride, kDown, v);
  mark(c, kDown, kInput);
  wait(c, &c.s.full_down, c.layers, kDown);
  mark(c, kDown, kWeights);
#pragma unroll 1
  for (int j = 0; j < kShare; ++j) {
    const int pair = c.warp + j * kWarps, rank = pair / kSlices, slice = pair % kSlices;
    if (pair >= kPairs) break;
    Fragment f;
    float x[8];
    unpack_bf16(j ? v[kShare - 1] : v[0], x);
    make_fragment(f, c.slice(), x, c.lane);
    const Run run{c.shared + c.p.layout.down + rank * tiles * tile_bytes(G::kWidth), tiles};
    run_products<G::kWidth>(run, 0, 1, slice, f, c.red() + rank * kSlices * rows, c.lane);
  }
  block_sync();
  mark(c, kDown, kProducts);
  if (r < rows) {
    publish(c.p.x.hidden, c.hidden_clock() + 1, G::kHidden / 2, kReplicas, at,
            pack_bf16(bf16_low(residual) + weighted_sum<G>(c, c.red() + r, rows),
                      bf16_high(residual) + weighted_sum<G>(c, c.red() + r + 1, rows)));
  }
  stage_done(c, kDown);
}

}  // namespace moefuse::cuda
