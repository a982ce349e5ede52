// Sizes of the step's shared memory and exchange rings for a geometry and a number of SMs.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "step.h"

namespace moefuse::cuda {

inline int largest_share(int total, int blocks) {
  return (total + blocks - 1) / blocks;
}

struct RingWords {  // words of all slots
  size_t hidden, middle, qkv, partial, range, context, scores, act, keys;
};
template <class G>
RingWords ring_words(int blocks) {
  const size_t shared = kRing * kReplicas, own = kRing;
  return {shared * G::kHidden / 2,
          shared * G::kHidden / 2,
          own * G::kQkvRows / 2,
          own * G::kKvHeads * kSplits * 8 * G::kHeadDim,
          own * G::kQHeads * kSplits * 2,
          shared * G::kContext / 2,
          shared * G::kExperts,
          shared * G::kTopK * G::kWidth / 2,
          own * blocks * 2};
}

// Places in shared memory. `dense` and `kv` share theirs with `items` and the lm_head ring, the
// scratch of attention with `down`: the stages that use them never overlap.
template <class G>
Layout make_layout(int blocks, uint32_t limit) {
  const int qkv = largest_share(G::kQkvRows / kTileRows, blocks);
  const int out = largest_share(G::kHidden / kTileRows, blocks);
  const int items = largest_share(G::kItems, blocks), router = largest_share(G::kExperts, blocks);
  const int slices = G::kHidden / kSlice;
  auto align = [](uint32_t n) { return (n + 127) / 128 * 128; };
  Layout l{};
  l.slices = kControlBytes;
  l.red = l.slices + kWarps * kSlice * 2;
  l.red_floats = std::max({slices * qkv * kTileRows, slices * items * 2 * kTileRows,
                           slices * router, G::kExperts, G::kContext / kSlice * out * kTileRows,
                           G::kTopK * G::kWidth / kSlice * out * kTileRows});
  l.qkv = align(l.red + 2 * l.red_floats * 4);
  l.items = align(l.qkv + qkv * tile_bytes(G::kHidden));
  l.dense = l.items;
  l.kv = align(l.dense + out * tile_bytes(G::kContext) +
               router * (G::kHidden + 2 * (G::kHidden / kGroupSize * 2)));
  l.kv_slot = 2 * (kKvGroup + 1) * G::kHeadDim * 2;
  l.down =
      align(std::max(l.kv + kKvSlots * l.kv_slot, l.items + items * 2 * tile_bytes(G::kHidden)));
  const uint32_t scratch = 32 << 10;  // AttentionScratch
  l.total = l.down + std::max(G::kTopK * out * tile_bytes(G::kWidth), scratch);
  l.total = std::max(l.total, l.items + kWarps * tile_bytes(G::kHidden));  // lm_head
  if (items > kMaxItems || l.total > limit) {
    throw std::invalid_argument("[cuda step] shared memory: expected at most " +
                                std::to_string(limit) + " bytes and " + std::to_string(kMaxItems) +
                                " expert tiles a block, got " + std::to_string(l.total) + " and " +
                                std::to_string(items) + " on " + std::to_string(blocks) + " SMs");
  }
  return l;
}

}  // namespace moefuse::cuda
