// The loader warp: brings every stage's weights into shared memory as early as their place is free
// and their address known. Dense weights and the cache come a layer ahead; experts the moment they
// are selected; the lm_head through a ring.
#pragma once
#include "attention.cuh"
#include "exchange.cuh"

namespace moefuse::cuda {

struct Loader {
  const StepParams& p;
  Control& s;
  uint8_t* shared;
  int lane, block, position;
  int layers, kv_groups, lm_slots;  // as in Warp
};

MOEFUSE_DEVICE void wait(const Loader& l, uint64_t* b, int uses, int stage) {
  wait_barrier(b, uses, l.p.fault, ((l.layers << 8 | stage) + 1) | 0x80000000u);
}

// Tiles [first, first + count) of a matrix into places at, at + 1, ... of a run of `all` tiles;
// part 0 is the weights, 1 the scales, 2 the biases.
template <int K>
MOEFUSE_DEVICE void copy_tiles(const Matrix& m, size_t first, int count, uint8_t* run, int all,
                               int at, int part, uint64_t* full) {
  if (count <= 0) return;
  const uint32_t bytes = part ? scale_bytes(K) : weight_bytes(K);
  const void* from = part == 0 ? static_cast<const void*>(m.weight)
                               : part == 1 ? m.scales : m.biases;
  uint8_t* to = run + (part ? all * weight_bytes(K) + (part - 1) * all * scale_bytes(K) : 0);
  copy_in(to + at * bytes, static_cast<const uint8_t*>(from) + first * bytes, count * bytes, full);
}

template <class G>
MOEFUSE_DEVICE void load_qkv(const Loader& l, const Layer& layer) {
  const int tiles = l.s.qkv.end - l.s.qkv.begin;
  if (l.lane == 0) announce(&l.s.full_qkv, tiles * tile_bytes(G::kHidden));
  warp_sync();
  if (l.lane < 9) {
    const int which = l.lane / 3;
    constexpr int kQ = G::kContext / kTileRows, kKv = G::kKvHeads * G::kHeadDim / kTileRows;
    const int start = which == 0 ? 0 : which == 1 ? kQ : kQ + kKv;
    const int stop = which == 0 ? kQ : which == 1 ? kQ + kKv : kQ + 2 * kKv;
    const int begin = l.s.qkv.begin > start ? l.s.qkv.begin : start;
    const int end = l.s.qkv.end < stop ? l.s.qkv.end : stop;
    const Matrix& m = which == 0 ? layer.q : which == 1 ? layer.k : layer.v;
    copy_tiles<G::kHidden>(m, begin - start, end - begin, l.shared + l.p.layout.qkv, tiles,
                           begin - l.s.qkv.begin, l.lane % 3, &l.s.full_qkv);
  }
  finish(&l.s.full_qkv);
}

// o tiles, then the router's 8-bit rows behind them
template <class G>
MOEFUSE_DEVICE void load_dense(const Loader& l, const Layer& layer) {
  const int tiles = l.s.output.end - l.s.output.begin, rows = l.s.router.end - l.s.router.begin;
  constexpr uint32_t kScale = G::kHidden / kGroupSize * 2;
  uint8_t* base = l.shared + l.p.layout.dense;
  uint64_t* full = &l.s.full_dense;
  if (l.lane == 0) announce(full, tiles * tile_bytes(G::kContext) + rows * (G::kHidden + 2 * kScale));
  warp_sync();
  if (l.lane < 3) {
    copy_tiles<G::kContext>(layer.o, l.s.output.begin, tiles, base, tiles, 0, l.lane, full);
  } else if (l.lane < 6 && rows > 0) {
    const int part = l.lane - 3;
    const uint32_t bytes = part ? kScale : G::kHidden;
    const void* from = part == 0 ? static_cast<const void*>(layer.router.weight)
                                 : part == 1 ? layer.router.scales : layer.router.biases;
    uint8_t* to = base + tiles * tile_bytes(G::kContext) +
                  (part ? rows * (G::kHidden + (part - 1) * kScale) : 0);
    copy_in(to, static_cast<const uint8_t*>(from) + static_cast<size_t>(l.s.router.begin) * bytes,
            rows * bytes, full);
  }
  finish(full);
}

// group `i` of this block's cached tokens into the next KV slot
template <class G>
MOEFUSE_DEVICE void load_kv(Loader& l, const Layer& layer, const Span& span, int i) {
  const int use = l.kv_groups++, at = use % kKvSlots, begin = span.begin + i * kKvGroup;
  const int left = span.end - begin, count = left < kKvGroup ? left : kKvGroup;
  constexpr int kRow = G::kHeadDim * 2;
  if (use >= kKvSlots) wait(l, &l.s.empty_kv[at], use / kKvSlots - 1, kAttention);
  if (l.lane == 0) announce(&l.s.full_kv[at], 2 * count * kRow);
  warp_sync();
  if (l.lane < 2 && count > 0) {
    const uint16_t* cache = l.lane ? layer.v_cache : layer.k_cache;
    const size_t row = static_cast<size_t>(span.head) * l.p.cache_stride + begin;
    copy_in(l.shared + l.p.layout.kv + at * l.p.layout.kv_slot + l.lane * (kKvGroup + 1) * kRow,
            cache + row * G::kHeadDim, count * kRow, &l.s.full_kv[at]);
  }
  finish(&l.s.full_kv[at]);
}

// what attention needs before it starts: o, router and as much of the cache as fits
template <class G>
MOEFUSE_DEVICE void load_ahead(Loader& l, const Layer& layer, int position) {
  load_dense<G>(l, layer);
  const Span span = make_span(l.p, l.block, position, G::kKvHeads);
  for (int i = 0; i < span.groups && i < kKvSlots; ++i) load_kv<G>(l, layer, span, i);
}

template <class G>
MOEFUSE_DEVICE void load_gate_up(const Loader& l, const Matrix& gate, const Matrix& up) {
  constexpr int kTiles = G::kWidth / kTileRows;
  constexpr uint32_t kTile = tile_bytes(G::kHidden);
  const int items = l.s.items.end - l.s.items.begin;
  for (int i = l.lane; i < items; i += 32) announce(&l.s.full_item[i], 2 * kTile);
  warp_sync();
  for (int x = l.lane; x < 6 * items; x += 32) {
    const int i = x / 6, part = x % 6, item = l.s.items.begin + i;
    const size_t tile = static_cast<size_t>(l.s.expert[item / kTiles]) * kTiles + item % kTiles;
    copy_tiles<G::kHidden>(part < 3 ? gate : up, tile, 1,
                           l.shared + l.p.layout.items + (2 * i + part / 3) * kTile, 1, 0, part % 3,
                           &l.s.full_item[i]);
  }
  for (int i = 0; i < items; ++i) finish(&l.s.full_item[i]);
}

template <class G>
MOEFUSE_DEVICE void load_down(const Loader& l, const Matrix& down) {
  constexpr int kTiles = G::kHidden / kTileRows;
  const int tiles = l.s.output.end - l.s.output.begin;
  const uint32_t run = tiles * tile_bytes(G::kWidth);
  if (l.lane == 0) announce(&l.s.full_down, G::kTopK * run);
  warp_sync();
  for (int x = l.lane; x < 3 * G::kTopK; x += 32) {
    const int rank = x / 3;
    copy_tiles<G::kWidth>(
        down, static_cast<size_t>(l.s.expert[rank]) * kTiles + l.s.output.begin, tiles,
        l.shared + l.p.layout.down + rank * run, tiles, 0, x % 3, &l.s.full_down);
  }
  finish(&l.s.full_down);
}

// lm_head: two tiles a slot
template <class G>
MOEFUSE_DEVICE void load_lm_head(Loader& l) {
  const Range tiles = share(G::kVocab / kTileRows, l.block, l.p.blocks);
  for (int t = tiles.begin; t < tiles.end; t += 2) {
    const int use = l.lm_slots++, at = use % kLmSlots;
    const int count = tiles.end - t < 2 ? 1 : 2;
    if (use >= kLmSlots) wait(l, &l.s.empty_lm[at], use / kLmSlots - 1, kLmHead);
    if (l.lane == 0) announce(&l.s.full_lm[at], count * tile_bytes(G::kHidden));
    warp_sync();
    if (l.lane < 3) {
      copy_tiles<G::kHidden>(l.p.lm_head, t, count,
                             l.shared + l.p.layout.items + at * l.p.layout.lm_slot, 2, 0, l.lane,
                             &l.s.full_lm[at]);
    }
    finish(&l.s.full_lm[at]);
  }
}

template <class G>
MOEFUSE_DEVICE void load_layer(Loader& l, int index, bool more) {
  const Layer& layer = l.p.layers[index];
  const bool last = index + 1 == l.p.num_layers;
  const Layer& next = l.p.layers[last ? 0 : index + 1];
  const Matrix gate = layer.gate, up = layer.up, down = layer.down;
  wait(l, &l.s.empty_qkv, l.layers, kQkv);
  if (!last || more) load_qkv<G>(l, next);
  const Span span = make_span(l.p, l.block, l.position, G::kKvHeads);
  for (int i = kKvSlots; i < span.groups; ++i) load_kv<G>(l, layer, span, i);
  wait(l, &l.s.selected, l.layers, kSelect);
  load_gate_up<G>(l, gate, up);
  load_down<G>(l, down);
  wait(l, &l.s.empty_items, l.layers, kGateUp);
  if (!last) load_ahead<G>(l, next, l.position);
  ++l.layers;
}

template <class G>
MOEFUSE_DEVICE void load_tokens(Loader& l) {
  load_qkv<G>(l, l.p.layers[0]);
  for (int token = 0; token < l.p.tokens; ++token, ++l.position) {
    acquire_for_copies();
    load_ahead<G>(l, l.p.layers[0], l.position);
    for (int i = 0; i < l.p.num_layers; ++i) load_layer<G>(l, i, token + 1 < l.p.tokens);
    load_lm_head<G>(l);
    const int used = l.lm_slots < kLmSlots ? l.lm_slots : kLmSlots;
    for (int i = 0; i < used; ++i) {  // the ring's place is free once its last uses are
      const int use = l.lm_slots - used + i;
      wait(l, &l.s.empty_lm[use % kLmSlots], use / kLmSlots, kLmHead);
    }
  }
}

}  // namespace moefuse::cuda
