// The end and the start of a token: final norm, logits, the greedy choice among all SMs, and the
// embedding of the chosen token.
#pragma once
#include "loader.cuh"

namespace moefuse::cuda {

// larger logit first, then the lower index
MOEFUSE_DEVICE uint64_t logit_key(float logit, int token) {
  return static_cast<uint64_t>(sortable(logit)) << 32 |
         (0xffffffffu - static_cast<uint32_t>(token));
}
MOEFUSE_DEVICE uint64_t warp_best(uint64_t key) {
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    const uint64_t other = shuffle_xor(key, m);
    key = other > key ? other : key;
  }
  return key;
}

// The vector's slices in shared memory, each with its chunks' sums and offsets: any warp can then
// take a whole tile.
struct LmVector {
  uint32_t columns[kSlice / 2];
  float sum[8], offset[8], unscale, pad[3];
};

MOEFUSE_DEVICE void store_slice(LmVector& v, const Fragment& f, int lane) {
  const int t = lane & 3;
  if (lane >= 4) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int chunk = 4 * (t >> 1) + (t & 1) + 2 * i;
    v.sum[chunk] = f.sum[i], v.offset[chunk] = f.offset[i];
  }
  v.unscale = f.unscale;
}
MOEFUSE_DEVICE void load_slice(Fragment& f, const LmVector& v, int lane) {
  const int t = lane & 3, chunk = 4 * (t >> 1) + (t & 1);
  load_columns(f, v.columns, lane);
  f.sum[0] = v.sum[chunk], f.sum[1] = v.sum[chunk + 2];
  f.offset[0] = v.offset[chunk], f.offset[1] = v.offset[chunk + 2];
  f.unscale = v.unscale;
}

// Every warp streams its own tiles through its own place: no barrier, 16 loads in flight an SM.
template <class G>
MOEFUSE_DEVICE uint64_t lm_head_rows(Warp& c, const LmVector* vector) {
  const Range tiles = share(G::kVocab / kTileRows, c.block, c.p.blocks);
  const float n = norm_factor<G::kHidden / kSlice>(c.s.ssq[0], G::kHidden, c.p.eps);
  const Run run{c.shared + c.p.layout.items + c.warp * tile_bytes(G::kHidden), 1};
  uint64_t best = 0;
#pragma unroll 1
  for (int tile = tiles.begin + c.warp; tile < tiles.end; tile += kWarps) {
    wait(c, &c.s.full_lm[c.warp], c.lm_uses++, kLmHead);
    float y = 0.f;
#pragma unroll 2
    for (int s = 0; s < G::kHidden / kSlice; ++s) {
      Fragment f;
      load_slice(f, vector[s], c.lane);
      y += unit_product(load_unit<G::kHidden>(run, 0, s, c.lane), f, c.lane);
    }
    y = quad_sum(y) * n;
    warp_sync();
    if (tile + kWarps < tiles.end) load_lm_tile<G>(c, tile + kWarps);
    const int row = tile * kTileRows + (c.lane >> 2);
    if ((c.lane & 3) == 0) c.p.logits[row] = y;
    const uint64_t key = logit_key(y, row);
    best = key > best ? key : best;
  }
  return best;
}

// hidden after the last layer -> logits, and this block's best token
template <class G>
MOEFUSE_DEVICE void lm_head_stage(Warp& c, uint4 gain) {
  constexpr int kSlices = G::kHidden / kSlice;
  const Range tiles = share(G::kVocab / kTileRows, c.block, c.p.blocks);
  LmVector* vector = reinterpret_cast<LmVector*>(c.shared + c.p.layout.slices);
  if (tiles.begin + c.warp < tiles.end) load_lm_tile<G>(c, tiles.begin + c.warp);
  publish_fence();  // once a token: emptied slots and cache rows are in place before the next token
  if (c.warp < kSlices) {
    float v[8];
    poll_slice(c, read_slot(c, c.p.x.hidden, c.hidden_clock(), G::kHidden / 2), c.warp, kLmHead, v);
    const float ssq = apply_gain(v, gain);
    if (c.lane == 0) c.s.ssq[0][c.warp] = ssq;
    Fragment f;
    make_fragment(f, vector[c.warp].columns, v, c.lane);
    store_slice(vector[c.warp], f, c.lane);
  }
  block_sync();
  const uint64_t best = warp_best(lm_head_rows<G>(c, vector));
  if (c.lane == 0) c.s.best[c.warp] = best;
  block_sync();
  if (c.warp == 0) {
    const uint64_t key = warp_best(c.lane < kWarps ? c.s.best[c.lane] : 0);
    if (c.lane == 0) {
      store_shared_key(c.p.x.keys + (c.sampled & (kRing - 1)) * c.p.blocks + c.block, key);
      store_shared_key(c.p.x.keys + ((c.sampled + 2) & (kRing - 1)) * c.p.blocks + c.block, 0);
    }
  }
  stage_done(c, kLmHead);
}

// every block's best -> the token, by each block for itself
MOEFUSE_DEVICE int sampled_token(const Warp& c) {
  const uint64_t* ring = c.p.x.keys + (c.sampled & (kRing - 1)) * c.p.blocks;
  uint64_t best = 0;
#pragma unroll 1
  for (int i = c.lane; i < c.p.blocks; i += 32) {
    unsigned count = 0;
    uint64_t key = load_shared_key(ring + i);
    while (key == 0) {
      spin(count, c.p.fault, c.code(kEmbed));
      key = load_shared_key(ring + i);
    }
    best = key > best ? key : best;
  }
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(warp_best(best)));
}

// this block's columns of the embedding row, 8 columns to four lanes
template <class G>
MOEFUSE_DEVICE void embed_stage(Warp& c, int token) {
  const Range words = share(G::kHidden / 8, c.block, c.p.blocks);
  const size_t row = static_cast<size_t>(token) * (G::kHidden / 8);
  const size_t groups = static_cast<size_t>(token) * (G::kHidden / kGroupSize);
#pragma unroll 1
  for (int i = c.lane; i < 4 * (words.end - words.begin); i += 32) {
    const int word = words.begin + i / 4, pair = i % 4;
    const uint32_t q = c.p.embed.weight[row + word] >> (8 * pair);
    const float scale = bf16_low(c.p.embed.scales[groups + word * 8 / kGroupSize]);
    const float bias = bf16_low(c.p.embed.biases[groups + word * 8 / kGroupSize]);
    publish(c.p.x.hidden, c.hidden_clock(), G::kHidden / 2, kReplicas, 4 * word + pair,
            pack_bf16(scale * static_cast<float>(q & 15) + bias,
                      scale * static_cast<float>((q >> 4) & 15) + bias));
  }
}

}  // namespace moefuse::cuda
