// Attention on tiles. An instruction multiplies A [16, 32] by B [32, 16], both bfloat16, and adds
// the product to C [16, 16] in fp32; B's rows lie in pairs, row 2k beside row 2k + 1.
//
// The cache's rows are bfloat16 as they are. A query or weight x in fp32 goes in as two bfloat16,
// high and low: each rounding leaves at most 2^-8, so |x - high - low| <= 2^-16 |x|. Products are
// exact in fp32. An instruction adds up to 16 of them in each of two chains, adds the two, and adds
// that to C. High and low parts have sums of their own, added at the end: with an instruction for
// each 32 of the n terms of a sum, u = 2^-24,
//   |error| <= (2^-16 + u (1 + 2^-7) (ceil(n / 32) + 18)) sum |x y|
// (16 in a chain, 1 for the two, 1 for the parts; |high| + |low| <= (1 + 2^-7) |x|). Numbers below
// 2^-126 count as zero.
#include "cpu/tiles.h"

#include <immintrin.h>

#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

constexpr int kStep = 32;       // terms in an instruction
constexpr int kTile = 16 * 64;  // bytes
constexpr int kHeads = 8;       // of a group: their high parts and their low parts fill a tile
constexpr int kGroups = Tiles::kMaxHeads / kHeads, kSteps = Tiles::kMaxDim / kStep;
constexpr int kRows = 2 * kLanes;  // of the cache that are multiplied at once
// Rows that all columns go over in turn, of one group and of more: their weights and 32 of their
// columns stay in the first cache, and the more they are, the more rarely the sums leave their
// tiles. One group keeps up with the memory, so that its rows should come evenly.
constexpr int kFewRows = 64, kBlock = 192;
constexpr int kAhead = 32;  // rows between what is read and what is asked for
constexpr int kGroupSums = 2 * kTile / 4, kGroupWeights = kBlock / kStep * kTile;

// GCC 12 does not know that tiles are loaded from memory.
inline void memory_is_written() {
  asm volatile("" ::: "memory");
}

// All eight tiles, whole; released at the end of the scope, so that nobody saves them for nothing.
struct TileScope {
  TileScope() { set(kLanes); }
  ~TileScope() { _tile_release(); }
  // Tile 6, which holds rows of the cache or weights, and its sums in 0 to 5 have this many rows.
  static void set(int rows) {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    for (int t = 0; t < 7; ++t) config.rows[t] = rows;
    memory_is_written();
    _tile_loadconfig(&config);
  }
};

// Tiles 2g and 2g + 1 are the sums of group g, up to three groups together: from zero or from c.
template <int kTogether>
inline void begin_sums(bool first, const float* c) {
  memory_is_written();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    return;
  }
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kTile / 4, 64);
  if constexpr (kTogether > 1) {
    _tile_loadd(2, c + kGroupSums, 64);
    _tile_loadd(3, c + kGroupSums + kTile / 4, 64);
  }
  if constexpr (kTogether > 2) {
    _tile_loadd(4, c + 2 * kGroupSums, 64);
    _tile_loadd(5, c + 2 * kGroupSums + kTile / 4, 64);
  }
}
template <int kTogether>
inline void store_sums(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTile / 4, 64);
  if constexpr (kTogether > 1) {
    _tile_stored(2, c + kGroupSums, 64);
    _tile_stored(3, c + kGroupSums + kTile / 4, 64);
  }
  if constexpr (kTogether > 2) {
    _tile_stored(4, c + 2 * kGroupSums, 64);
    _tile_stored(5, c + 2 * kGroupSums + kTile / 4, 64);
  }
}

// Calls f(group, how many together as a constant) for all groups.
template <class F>
inline void with_groups(int heads, F&& f) {
  const int groups = (heads + kHeads - 1) / kHeads;
  int g = 0;
  for (; g + 3 <= groups; g += 3) f(g, Count<3>{});
  if (g + 2 == groups) f(g, Count<2>{});
  if (g + 1 == groups) f(g, Count<1>{});
}

// Asks for 32 rows' share of a step, evenly in the order of the memory.
inline void ask_for(const char* at) {
  for (int i = 0; i < kRows; ++i) __builtin_prefetch(at + i * 64, 0, 2);
}

// The lanes of v[0..15] transposed; of v[0..7], each half of the lanes for itself.
// NOLINTBEGIN(bugprone-macro-parentheses): `low` and `high` bring their own.
template <int kCount>
inline void transpose(f32x16* v) {
#define MOEFUSE_SWAP(step, low, high)                                   \
  for (int i = 0; i < kCount; ++i)                                      \
    if (!(i & (step))) {                                                \
      const f32x16 a = v[i], b = v[i + (step)];                         \
      v[i] = __builtin_shufflevector(a, b, MOEFUSE_LIST low);           \
      v[i + (step)] = __builtin_shufflevector(a, b, MOEFUSE_LIST high); \
    }
  // NOLINTEND(bugprone-macro-parentheses)
#define MOEFUSE_LIST(...) __VA_ARGS__
  if constexpr (kCount == 16) {
#pragma GCC unroll 16
    MOEFUSE_SWAP(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                 (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  }
#pragma GCC unroll 16
  MOEFUSE_SWAP(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
               (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#pragma GCC unroll 16
  MOEFUSE_SWAP(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
               (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#pragma GCC unroll 16
  MOEFUSE_SWAP(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
               (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef MOEFUSE_LIST
#undef MOEFUSE_SWAP
}

// 32 floats in two bfloat16 parts.
struct Split {
  __m512bh high, low;
};
inline Split split(f32x16 x, f32x16 y) {
  const __m512bh high = _mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  const u16x32 bits = (u16x32)high;
  u16x16 first, second;
  memcpy(&first, &bits, 32);
  memcpy(&second, (const char*)&bits + 32, 32);
  x -= widen_bfloat16(first);
  y -= widen_bfloat16(second);
  return {high, _mm512_cvtne2ps_pbh((__m512)y, (__m512)x)};
}

// [group][step] tiles B.
void queries(const float* q, int heads, int dim, char* out) {
  for (int first = 0; first < heads; first += kHeads)
    for (int k = 0; k < dim; k += kStep, out += kTile) {
      f32x16 columns[kLanes] = {};
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        if (first + h >= heads) continue;
        const float* from = q + int64_t(first + h) * dim + k;
        const Split parts = split(load<f32x16>(from), load<f32x16>(from + kLanes));
        columns[h] = (f32x16)parts.high;
        columns[kHeads + h] = (f32x16)parts.low;
      }
      transpose<kLanes>(columns);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + 64 * i, columns[i]);
    }
}

// Tiles 2g += `steps` steps of the scores of sixteen rows, `bytes` from one to the next, tiles
// 2g + 1 those of sixteen more. A group's queries lie `group` bytes behind the last's. Asks for the
// rows at `ahead` if there are any.
template <int kTogether>
inline void add_scores(const char* rows, const char* more, int64_t bytes, const char* queries,
                       int64_t group, int steps, const char* ahead) {
  for (int s = 0; s < steps; ++s, queries += kTile, rows += kStep * 2, more += kStep * 2) {
    if (ahead) ask_for(ahead + s * kRows * kStep * 2);
    _tile_loadd(7, queries, 64);
    _tile_loadd(6, rows, bytes);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, more, bytes);
    _tile_dpbf16ps(1, 6, 7);
    if constexpr (kTogether > 1) {
      _tile_loadd(7, queries + group, 64);
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(6, rows, bytes);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (kTogether > 2) {
      _tile_loadd(7, queries + 2 * group, 64);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, more, bytes);
      _tile_dpbf16ps(5, 6, 7);
    }
  }
}

// Tile [group][r / 16] of c holds the scores of rows r: out[h * out_stride + r], r < count <= 32.
void store_scores(const float* c, int heads, int count, float* out, int64_t out_stride) {
  for (int first = 0; first < heads; first += kHeads)
    for (int r = 0; r < kRows; r += kLanes, c += kTile / 4) {
      if (r >= count) continue;
      f32x16 v[kHeads];  // of the rows i and 8 + i
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const f32x16 x = load<f32x16>(c + i * kLanes), y = load<f32x16>(c + (8 + i) * kLanes);
        v[i] =
            __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
            __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                    31);
      }
      transpose<kHeads>(v);
      const __mmask16 mask = (1u << (count - r < kLanes ? count - r : kLanes)) - 1;
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h)
        if (first + h < heads)
          _mm512_mask_storeu_ps(out + (first + h) * out_stride + r, mask, (__m512)v[h]);
    }
}

// c [group][2] tiles = the scores of `count` rows from row r on: 32, or up to sixteen.
void score_rows(const TilePart* parts, int count_parts, int heads, int r, int count, float* c) {
  with_groups(heads, [&](int g, auto together) {
    begin_sums<together()>(true, c);
    for (const TilePart* part = parts; part < parts + count_parts; ++part) {
      const int64_t bytes = part->rows.stride * 2, group = int64_t(part->rows.dim) / kStep * kTile;
      const char* rows = (const char*)part->rows.data + r * bytes;
      add_scores<together()>(rows, count == kRows ? rows + kLanes * bytes : rows, bytes,
                             part->queries + g * group, group, part->rows.dim / kStep,
                             g == 0 ? rows + kAhead * bytes : nullptr);
    }
    store_sums<together()>(c + g * kGroupSums);
  });
}

// The scores of some rows leave their tiles while the next rows' are multiplied: what a tile has
// just stored is not to be had for a while.
void dots(const TilePart* parts, int count_parts, int heads, float* out, int64_t out_stride) {
  const int rows = parts->rows.rows;
  const TileScope scope;
  alignas(64) float c[2][kGroups * kGroupSums];
  int last = 0, count = 0;
  bool odd = false;
  for (int r = 0; r < rows; last = r, r += count, odd = !odd) {
    const int before = count, left = rows - r;
    count = left >= kRows ? kRows : left >= kLanes ? kLanes : left;
    if (count < kLanes) scope.set(count);
    score_rows(parts, count_parts, heads, r, count, c[odd]);
    store_scores(c[!odd], heads, before, out + last, out_stride);
  }
  store_scores(c[!odd], heads, count, out + last, out_stride);
}

// The weights of the rows [j, j + count) as tiles A: [group][kBlock / kStep], zeros behind.
void weights_as_tiles(const float* weights, int heads, int64_t stride, int j, int count,
                      char* out) {
  for (int h = 0; h < heads; ++h) {
    const float* from = weights + h * stride + j;
    char* to = out + h / kHeads * kGroupWeights + h % kHeads * 64;
    for (int i = 0; i < count; i += kStep, to += kTile) {
      const int n = count - i;
      const Split parts =
          n >= kStep
              ? split(load<f32x16>(from + i), load<f32x16>(from + i + kLanes))
              : split(load_floats(from, Dtype::float32, i, n < kLanes ? n : kLanes),
                      load_floats(from, Dtype::float32, i + kLanes, n < kLanes ? 0 : n - kLanes));
      memcpy(to, &parts.high, 64);
      memcpy(to + kHeads * 64, &parts.low, 64);
    }
  }
}

// 32 columns of up to 32 rows as two tiles B, zeros behind. The unpacking leaves the columns
// 8q + i in the first, 8q + 4 + i in the second, at place 4q + i.
inline void columns_as_tiles(const char* rows, int64_t bytes, int count, char* out) {
  if (count >= kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kStep; j += 2, out += 64) {
      const __m512i a = _mm512_loadu_si512(rows + j * bytes);
      const __m512i b = _mm512_loadu_si512(rows + (j + 1) * bytes);
      _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(out + kTile, _mm512_unpackhi_epi16(a, b));
    }
    return;
  }
  for (int j = 0; j < kStep; j += 2, out += 64) {
    const __m512i a = j < count ? _mm512_loadu_si512(rows + j * bytes) : __m512i{};
    const __m512i b = j + 1 < count ? _mm512_loadu_si512(rows + (j + 1) * bytes) : __m512i{};
    _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(out + kTile, _mm512_unpackhi_epi16(a, b));
  }
}

// Tiles 2g += one step of group g's weights times the first half of the columns, 2g + 1 the other.
template <int kTogether>
inline void add_columns(const char* weights, const char* columns) {
  _tile_loadd(7, columns, 64);
  if constexpr (kTogether > 1) {
    _tile_loadd(6, weights + kGroupWeights, 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  if constexpr (kTogether > 2) {
    _tile_loadd(6, weights + 2 * kGroupWeights, 64);
    _tile_dpbf16ps(4, 6, 7);
  }
  _tile_loadd(6, weights, 64);
  _tile_dpbf16ps(0, 6, 7);
  _tile_loadd(7, columns + kTile, 64);
  _tile_dpbf16ps(1, 6, 7);
  if constexpr (kTogether > 1) {
    _tile_loadd(6, weights + kGroupWeights, 64);
    _tile_dpbf16ps(3, 6, 7);
  }
  if constexpr (kTogether > 2) {
    _tile_loadd(6, weights + 2 * kGroupWeights, 64);
    _tile_dpbf16ps(5, 6, 7);
  }
}

// sums [dim / 32][group][2] tiles (+)= the weights of `count` rows times the rows. The next 32
// columns are laid out step by step as the last group is done with the place.
void add_rows(const RowsArgs& a, int begin, int count, const char* weights, int heads, float* sums,
              bool ask) {
  constexpr int kSums = kGroups * kGroupSums;
  alignas(64) char columns[kBlock / kStep * 2 * kTile];
  const int steps = (count + kStep - 1) / kStep, groups = (heads + kHeads - 1) / kHeads;
  const int64_t bytes = a.stride * 2;
  const char* rows = (const char*)a.data + begin * bytes;
  const char* ahead = rows + (count + kAhead) * bytes;
  const auto lay_out = [&](int s, int d) {
    columns_as_tiles(rows + s * kStep * bytes + d * 2, bytes, count - s * kStep,
                     columns + s * 2 * kTile);
  };
  for (int s = 0; s < steps; ++s) lay_out(s, 0);
  for (int d = 0; d < a.dim; d += kStep, sums += kSums)
    with_groups(heads, [&](int g, auto together) {
      const bool last = g + together() >= groups && d + kStep < a.dim;
      float* c = sums + g * kGroupSums;
      begin_sums<together()>(begin == 0, c);
      for (int s = 0; s < steps; ++s) {
        if (ask && g == 0) ask_for(ahead + (d / kStep * steps + s) * kRows * kStep * 2);
        add_columns<together()>(weights + g * kGroupWeights + s * kTile, columns + s * 2 * kTile);
        if (last) lay_out(s, d + kStep);
      }
      store_sums<together()>(c);
    });
}

// High and low parts added, the columns in their order.
void store_columns(const float* sums, int heads, int dim, float* out, int64_t out_stride) {
  for (int h = 0; h < heads; ++h)
    for (int d = 0; d < dim; d += kStep) {
      const float* c = sums + (d / kStep * kGroups + h / kHeads) * kGroupSums + h % kHeads * kLanes;
      const f32x16 x = load<f32x16>(c) + load<f32x16>(c + kHeads * kLanes);
      c += kTile / 4;
      const f32x16 y = load<f32x16>(c) + load<f32x16>(c + kHeads * kLanes);
      const f32x16 low =
          __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const f32x16 high = __builtin_shufflevector(x, y, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14,
                                                  15, 28, 29, 30, 31);
      store(out + h * out_stride + d, low);
      store(out + h * out_stride + d + kLanes, high);
    }
}

void weighted_sum(const RowsArgs& a, const float* weights, int heads, int64_t weights_stride,
                  float* out, int64_t out_stride, bool ask) {
  const TileScope scope;
  alignas(64) float sums[kSteps * kGroups * kGroupSums];
  alignas(64) char parts[kGroups * kGroupWeights];
  if (heads % kHeads)  // the last group's missing heads
    memset(parts + heads / kHeads * kGroupWeights, 0, kGroupWeights);
  const int block = heads > kHeads ? kBlock : kFewRows;
  for (int j = 0; j < a.rows; j += block) {
    const int count = a.rows - j < block ? a.rows - j : block;
    weights_as_tiles(weights, heads, weights_stride, j, count, parts);
    add_rows(a, j, count, parts, heads, sums, ask);
  }
  store_columns(sums, heads, a.dim, out, out_stride);
}

}  // namespace

extern const Tiles kTiles;
const Tiles kTiles = {.queries = queries, .dots = dots, .weighted_sum = weighted_sum};

}  // namespace moefuse::cpu
