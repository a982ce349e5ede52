// Weights into shared memory, each as early as its place is free and its address known: dense
// weights and the cache a layer ahead, experts the moment they are selected. One warp issues a
// load; call after the block_sync that ended the last use of its place.
#pragma once
#include "exchange.cuh"

namespace moefuse::cuda {

// Tiles [first, first + count) of a matrix into places at, at + 1, ... of a run of `all` tiles;
// part 0 is the weights, 1 the scales, 2 the biases.
template <int K>
MOEFUSE_DEVICE void copy_tiles(const Matrix& m, size_t first, int count, uint8_t* run, int all,
                               int at, int part, uint64_t* full) {
  if (count <= 0) return;
  const uint32_t bytes = part ? scale_bytes(K) : weight_bytes(K);
  const void* from = part == 0   ? static_cast<const void*>(m.weight)
                     : part == 1 ? m.scales
                                 : m.biases;
  uint8_t* to = run + (part ? all * weight_bytes(K) + (part - 1) * all * scale_bytes(K) : 0);
  copy_in(to + at * bytes, static_cast<const uint8_t*>(from) + first * bytes, count * bytes, full);
}

// qkv weights of the layer `ahead` of this one, and the pointers of the layer after that
template <class G>
MOEFUSE_DEVICE void load_qkv(const Warp& c, int ahead, int index) {
  const int tiles = c.s.qkv.end - c.s.qkv.begin;
  const Layer& layer = c.layer(ahead);
  if (c.lane == 0) announce(&c.s.full_qkv, tiles * tile_bytes(G::kHidden) + sizeof(Layer));
  warp_sync();
  if (c.lane == 9) {
    copy_in(&c.layer(ahead + 1), c.p.layers + (index + ahead + 1) % c.p.num_layers, sizeof(Layer),
            &c.s.full_qkv);
  }
  if (c.lane < 9) {
    const int which = c.lane / 3;
    constexpr int kQ = G::kContext / kTileRows, kKv = G::kKvHeads * G::kHeadDim / kTileRows;
    const int start = which == 0 ? 0 : which == 1 ? kQ : kQ + kKv;
    const int stop = which == 0 ? kQ : which == 1 ? kQ + kKv : kQ + 2 * kKv;
    const int begin = c.s.qkv.begin > start ? c.s.qkv.begin : start;
    const int end = c.s.qkv.end < stop ? c.s.qkv.end : stop;
    const Matrix& m = which == 0 ? layer.q : which == 1 ? layer.k : layer.v;
    copy_tiles<G::kHidden>(m, begin - start, end - begin, c.shared + c.p.layout.qkv, tiles,
                           begin - c.s.qkv.begin, c.lane % 3, &c.s.full_qkv);
  }
  finish(&c.s.full_qkv);
}

// o tiles, then the router's 8-bit rows behind them
template <class G>
MOEFUSE_DEVICE void load_dense(const Warp& c, const Layer& layer) {
  const int tiles = c.s.output.end - c.s.output.begin, rows = c.s.router.end - c.s.router.begin;
  constexpr uint32_t kScale = G::kHidden / kGroupSize * 2;
  uint8_t* base = c.shared + c.p.layout.dense;
  uint64_t* full = &c.s.full_dense;
  if (c.lane == 0) {
    announce(full, tiles * tile_bytes(G::kContext) + rows * (G::kHidden + 2 * kScale));
  }
  warp_sync();
  if (c.lane < 3) {
    copy_tiles<G::kContext>(layer.o, c.s.output.begin, tiles, base, tiles, 0, c.lane, full);
  } else if (c.lane < 6 && rows > 0) {
    const int part = c.lane - 3;
    const uint32_t bytes = part ? kScale : G::kHidden;
    const void* from = part == 0   ? static_cast<const void*>(layer.router.weight)
                       : part == 1 ? layer.router.scales
                                   : layer.router.biases;
    uint8_t* to = base + tiles * tile_bytes(G::kContext) +
                  (part ? rows * (G::kHidden + (part - 1) * kScale) : 0);
    copy_in(to, static_cast<const uint8_t*>(from) + static_cast<size_t>(c.s.router.begin) * bytes,
            rows * bytes, full);
  }
  finish(full);
}

// This block's share of the context: whole groups of kKvGroup, the new token in split 0.
struct Span {
  int head, split, begin, end, groups;
  bool fresh;
};
MOEFUSE_DEVICE Span make_span(const StepParams& p, int block, int position, int kv_heads) {
  Span s{};
  if (block >= kv_heads * p.splits) return s;
  s.head = block / p.splits, s.split = block % p.splits;
  const int chunk = ((position + p.splits - 1) / p.splits + 15) / 16 * 16;
  s.begin = s.split * chunk < position ? s.split * chunk : position;
  s.end = s.begin + chunk < position ? s.begin + chunk : position;
  s.fresh = s.split == 0;
  s.groups = (s.end - s.begin + kKvGroup - 1) / kKvGroup;
  if (s.fresh && s.groups == 0) s.groups = 1;
  return s;
}

// group `i` of this block's cached tokens into slot `use` of the KV ring
template <class G>
MOEFUSE_DEVICE void load_kv(const Warp& c, const Layer& layer, const Span& span, int i, int use) {
  const int at = use % kKvSlots, begin = span.begin + i * kKvGroup, left = span.end - begin;
  const int count = left < kKvGroup ? left : kKvGroup;
  constexpr int kRow = G::kHeadDim * 2;
  if (c.lane == 0) announce(&c.s.full_kv[at], 2 * count * kRow);
  warp_sync();
  if (c.lane < 2 && count > 0) {
    const uint16_t* cache = c.lane ? layer.v_cache : layer.k_cache;
    const size_t row = static_cast<size_t>(span.head) * c.p.cache_stride + begin;
    copy_in(c.shared + c.p.layout.kv + at * c.p.layout.kv_slot + c.lane * (kKvGroup + 1) * kRow,
            cache + row * G::kHeadDim, count * kRow, &c.s.full_kv[at]);
  }
  finish(&c.s.full_kv[at]);
}

// what attention needs before it starts: o, router and as much of the cache as fits; by two warps
template <class G>
MOEFUSE_DEVICE void load_ahead(const Warp& c, const Layer& layer, int position) {
  if (c.warp == kWarps - 1) load_dense<G>(c, layer);
  if (c.warp != kWarps - 2) return;
  const Span span = make_span(c.p, c.block, position, G::kKvHeads);
#pragma unroll 1
  for (int i = 0; i < span.groups && i < kKvSlots; ++i) {
    load_kv<G>(c, layer, span, i, c.kv_uses + i);
  }
}

// the selected experts' tiles, each warp its share: gate and up a pair at a time
template <class G>
MOEFUSE_DEVICE void load_gate_up(const Warp& c, const Layer& layer) {
  constexpr int kTiles = G::kWidth / kTileRows;
  constexpr uint32_t kTile = tile_bytes(G::kHidden);
#pragma unroll 1
  for (int i = c.warp; i < c.s.items.end - c.s.items.begin; i += kWarps) {
    const int item = c.s.items.begin + i, half = c.lane / 3;
    uint64_t* full = &c.s.full_item[i];
    if (c.lane == 0) announce(full, 2 * kTile);
    warp_sync();
    if (c.lane < 6) {
      const size_t tile = static_cast<size_t>(c.s.expert[item / kTiles]) * kTiles + item % kTiles;
      copy_tiles<G::kHidden>(half ? layer.up : layer.gate, tile, 1,
                             c.shared + c.p.layout.items + (2 * i + half) * kTile, 1, 0, c.lane % 3,
                             full);
    }
    finish(full);
  }
}
template <class G>
MOEFUSE_DEVICE void load_down(const Warp& c, const Layer& layer) {
  constexpr int kRows = G::kHidden / kTileRows;
  const int rank = c.warp - (kWarps - G::kTopK), tiles = c.s.output.end - c.s.output.begin;
  if (rank < 0) return;
  const uint32_t run = tiles * tile_bytes(G::kWidth);
  if (c.lane == 0) announce(&c.s.full_down, run);
  warp_sync();
  if (c.lane < 3) {
    const size_t tile = static_cast<size_t>(c.s.expert[rank]) * kRows + c.s.output.begin;
    copy_tiles<G::kWidth>(layer.down, tile, tiles, c.shared + c.p.layout.down + rank * run, tiles,
                          0, c.lane, &c.s.full_down);
  }
  finish(&c.s.full_down);
}

// one tile of the lm_head into this warp's own place
template <class G>
MOEFUSE_DEVICE void load_lm_tile(const Warp& c, int tile) {
  uint64_t* full = &c.s.full_lm[c.warp];
  if (c.lane == 0) announce(full, tile_bytes(G::kHidden));
  warp_sync();
  if (c.lane < 3) {
    copy_tiles<G::kHidden>(c.p.lm_head, tile, 1,
                           c.shared + c.p.layout.items + c.warp * tile_bytes(G::kHidden), 1, 0,
                           c.lane, full);
  }
  finish(full);
}

}  // namespace moefuse::cuda
