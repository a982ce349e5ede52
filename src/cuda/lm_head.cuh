// The end and the start of a token: final norm, logits, the greedy choice among all SMs, and the
// embedding of the chosen token.
#pragma once
#include "exchange.cuh"

namespace moefuse::cuda {

// larger logit first, then the lower index
MOEFUSE_DEVICE uint64_t logit_key(float logit, int token) {
  return static_cast<uint64_t>(sortable(logit)) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
MOEFUSE_DEVICE uint64_t warp_best(uint64_t key) {
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    const uint64_t other = shuffle_xor(key, m);
    key = other > key ? other : key;
  }
  return key;
}

// 16 rows from one slot of the ring; the warps take turns at the final sums
template <class G>
MOEFUSE_DEVICE uint64_t finish_slot(const Warp& c, const float* red, int first, int count, float n) {
  constexpr int kSlices = G::kHidden / kSlice;
  if (c.lane >= count * kTileRows) return 0;
  const float logit = sum_slices<kSlices>(red + c.lane, count * kTileRows) * n;
  const int row = first * kTileRows + c.lane;
  c.p.logits[row] = logit;
  return logit_key(logit, row);
}

template <class G>
MOEFUSE_DEVICE uint64_t lm_head_rows(Warp& c, const Fragment& f) {
  constexpr int kSlices = G::kHidden / kSlice, kStep = kWarps / kSlices;
  const Range tiles = share(G::kVocab / kTileRows, c.block, c.p.blocks);
  const int slice = c.warp % kSlices;
  const float n = norm_factor<kSlices>(c.s.ssq[0], G::kHidden, c.p.eps);
  uint64_t best = 0;
  for (int t = tiles.begin, turn = 0; t < tiles.end; t += 2, ++turn, ++c.flip) {
    const int use = c.lm_slots++, at = use % kLmSlots, count = tiles.end - t < 2 ? 1 : 2;
    wait(c, &c.s.full_lm[at], use / kLmSlots, kLmHead);
    const Run run{c.shared + c.p.layout.items + at * c.p.layout.lm_slot, 2};
    for (int i = c.warp / kSlices; i < count; i += kStep) {
      const float y =
          quad_sum(unit_product(load_unit<G::kHidden>(run, i, slice, c.lane), f, c.lane));
      if ((c.lane & 3) == 0) c.red()[(slice * count + i) * kTileRows + (c.lane >> 2)] = y;
    }
    arrive(c, &c.s.empty_lm[at]);
    block_sync(kThreads);
    if (c.warp == turn % kWarps) {
      const uint64_t key = finish_slot<G>(c, c.red(), t, count, n);
      best = key > best ? key : best;
    }
  }
  return best;
}

// hidden after the last layer -> logits, and this block's best token
template <class G>
MOEFUSE_DEVICE void lm_head_stage(Warp& c, uint4 gain) {
  constexpr int kSlices = G::kHidden / kSlice;
  const int slice = c.warp % kSlices;
  float v[8];
  poll_slice(c, read_slot(c, c.p.x.hidden, c.hidden_clock(), G::kHidden / 2), slice, kLmHead, v);
  const float ssq = apply_gain(v, gain);
  if (c.warp < kSlices && c.lane == 0) c.s.ssq[0][slice] = ssq;
  Fragment f;
  make_fragment(f, c.slice(), v, c.lane);
  publish_fence();  // once a token: emptied slots and cache rows are in place before the next token
  block_sync(kThreads);
  const uint64_t best = warp_best(lm_head_rows<G>(c, f));
  if (c.lane == 0) c.s.best[c.warp] = best;
  block_sync(kThreads);
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
