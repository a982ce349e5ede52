// Attention on tiles. An instruction multiplies A [16, 32] by B [32, 16], both bfloat16, and adds
// the product to C [16, 16] in fp32; B's rows lie in pairs, row 2k beside row 2k + 1.
//
// The cache's rows are bfloat16 as they are. A query or weight x in fp32 goes in as two bfloat16,
// high and low: each rounding leaves at most 2^-8, so |x - high - low| <= 2^-16 |x|. Products are
// exact in fp32. An instruction adds up to 16 of them in each of two chains, adds the two, and adds
// that to C: with two instructions for each 32 of the n terms of a sum, u = 2^-24,
//   |error| <= (2^-16 + u (1 + 2^-7) (2 ceil(n / 32) + 17)) sum |x y|
// (16 in a chain, 1 for the two; |high| + |low| <= (1 + 2^-7) |x|). Numbers below 2^-126 count as
// zero.
#include "cpu/tiles.h"

#include <immintrin.h>

#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

constexpr int kStep = 32;       // terms in an instruction
constexpr int kTile = 16 * 64;  // bytes
constexpr int kGroups = Tiles::kMaxHeads / kLanes, kSteps = Tiles::kMaxDim / kStep;
constexpr int kParts = 2;    // high, low
constexpr int kBlock = 128;  // rows of a weighted sum in one go

// GCC 12 does not know that tiles are loaded from memory.
inline void memory_is_written() {
  asm volatile("" ::: "memory");
}

// All eight tiles whole; released at the end of the scope, so that nobody saves them for nothing.
struct TileScope {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  TileScope() {
    memory_is_written();
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// Tiles 0 to 3, or the first two: the sums of up to 32 heads, from zero or from c.
template <int kHeadGroups>
inline void begin_sums(bool first, const float* c) {
  memory_is_written();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kTile / 4, 64);
  if constexpr (kHeadGroups == 2) {
    _tile_loadd(2, c + 2 * kTile / 4, 64);
    _tile_loadd(3, c + 3 * kTile / 4, 64);
  }
}
template <int kHeadGroups>
inline void store_sums(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTile / 4, 64);
  if constexpr (kHeadGroups == 2) {
    _tile_stored(2, c + 2 * kTile / 4, 64);
    _tile_stored(3, c + 3 * kTile / 4, 64);
  }
}

// v[i] lane j <-> v[j] lane i.
// NOLINTBEGIN(bugprone-macro-parentheses): `low` and `high` bring their own.
inline void transpose(f32x16* v) {
#define MOEFUSE_SWAP(step, low, high)                                   \
  for (int i = 0; i < 16; ++i)                                          \
    if (!(i & (step))) {                                                \
      const f32x16 a = v[i], b = v[i + (step)];                         \
      v[i] = __builtin_shufflevector(a, b, MOEFUSE_LIST low);           \
      v[i + (step)] = __builtin_shufflevector(a, b, MOEFUSE_LIST high); \
    }
// NOLINTEND(bugprone-macro-parentheses)
#define MOEFUSE_LIST(...) __VA_ARGS__
#pragma GCC unroll 16
  MOEFUSE_SWAP(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
               (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
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

// Sixteen floats in two bfloat16 parts.
inline void split(f32x16 x, u16x16* parts) {
  parts[0] = (u16x16)_mm512_cvtneps_pbh((__m512)x);
  parts[1] = (u16x16)_mm512_cvtneps_pbh((__m512)(x - widen_bfloat16(parts[0])));
}

// The queries as tiles B: [group of 16 heads][step][part].
void queries_as_tiles(const float* q, int heads, int dim, char* out) {
  const int steps = dim / kStep;
  for (int g = 0; g * kLanes < heads; ++g)
    for (int s = 0; s < steps; ++s) {
      f32x16 pairs[kParts][kLanes] = {};
      for (int h = 0; h < kLanes && g * kLanes + h < heads; ++h) {
        const float* from = q + int64_t(g * kLanes + h) * dim + s * kStep;
        u16x16 low[kParts], high[kParts];
        split(load<f32x16>(from), low);
        split(load<f32x16>(from + kLanes), high);
        for (int p = 0; p < kParts; ++p) {
          memcpy((char*)&pairs[p][h], &low[p], 32);
          memcpy((char*)&pairs[p][h] + 32, &high[p], 32);
        }
      }
      for (int p = 0; p < kParts; ++p) {
        transpose(pairs[p]);
        memcpy(out + (int64_t(g * steps + s) * kParts + p) * kTile, pairs[p], kTile);
      }
    }
}

// c [2][groups] tiles (+)= some steps of the scores of 32 rows, `bytes` from one to the next. A
// group's queries lie `group` bytes behind the group's before.
template <int kHeadGroups>
inline void add_scores(const char* rows, int64_t bytes, const char* queries, int64_t group,
                       int steps, bool first, float* c) {
  begin_sums<kHeadGroups>(first, c);
  for (int s = 0; s < steps; ++s, rows += kStep * 2, queries += kParts * kTile) {
    for (int r = 0; r < 2 * kLanes; ++r) __builtin_prefetch(rows + (kBlock + r) * bytes, 0, 2);
    _tile_loadd(4, rows, bytes);
    _tile_loadd(5, rows + kLanes * bytes, bytes);
    _tile_loadd(6, queries, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, queries + kTile, 64);
    _tile_dpbf16ps(0, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (kHeadGroups == 2) {
      _tile_loadd(6, queries + group, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 5, 6);
      _tile_loadd(7, queries + group + kTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<kHeadGroups>(c);
}

// Tile [group][r / 16] of c holds the scores of rows r: out[h * out_stride + r], r < count <= 32.
void store_scores(const float* c, int heads, int count, float* out, int64_t out_stride) {
  for (int first = 0; first < heads; first += kLanes)
    for (int r = 0; r < count; r += kLanes) {
      f32x16 v[kLanes];
      memcpy(v, c + (2 * (first / kLanes) + r / kLanes) * kTile / 4, kTile);
      transpose(v);
      const __mmask16 mask = (1u << (count - r < kLanes ? count - r : kLanes)) - 1;
      for (int h = first; h < first + kLanes && h < heads; ++h)
        _mm512_mask_storeu_ps(out + h * out_stride + r, mask, (__m512)v[h - first]);
    }
}

// A few steps of the queries at a time, so that they stay in the first cache for kBlock rows.
void dots(const RowsArgs& a, const float* q, int heads, float* out, int64_t out_stride) {
  constexpr int kFew = 4, kRows = 2 * kLanes, kSums = kGroups * 2 * kTile / 4;
  const TileScope scope;
  alignas(64) char queries[kGroups * kSteps * kParts * kTile];
  alignas(64) uint16_t rest[kRows * Tiles::kMaxDim];
  alignas(64) float c[kBlock / kRows * kSums];
  queries_as_tiles(q, heads, a.dim, queries);
  const int steps = a.dim / kStep, whole = a.rows / kRows * kRows;
  const char* last = (const char*)a.data + whole * a.stride * 2;
  if (whole < a.rows) memset(rest, 0, int64_t(kRows) * a.dim * 2);  // not read past the last row
  for (int r = 0; r < a.rows - whole; ++r)
    memcpy(rest + r * a.dim, last + r * a.stride * 2, a.dim * 2);
  for (int j = 0; j < a.rows; j += kBlock) {
    const int end = a.rows - j < kBlock ? a.rows : j + kBlock;
    for (int s = 0; s < steps; s += kFew)
      for (int r = j; r < end; r += kRows) {
        const bool inside = r < whole;
        const char* rows = inside ? (const char*)a.data + r * a.stride * 2 : (const char*)rest;
        const int64_t bytes = inside ? a.stride * 2 : a.dim * 2;
        (heads > kLanes ? add_scores<2> : add_scores<1>)(rows + s * kStep * 2, bytes,
                                                         queries + s * kParts * kTile,
                                                         int64_t(steps) * kParts * kTile,
                                                         steps - s < kFew ? steps - s : kFew,
                                                         s == 0, c + (r - j) / kRows * kSums);
      }
    for (int r = j; r < end; r += kRows)
      store_scores(c + (r - j) / kRows * kSums, heads, end - r < kRows ? end - r : kRows, out + r,
                   out_stride);
  }
}

// The weights of the rows [j, j + count) as tiles A: [group][part][16 heads][kBlock], zeros behind.
void weights_as_tiles(const float* weights, int heads, int64_t stride, int j, int count,
                      uint16_t* out) {
  for (int h = 0; h < heads; ++h) {
    uint16_t* to = out + (h / kLanes * kParts * kLanes + h % kLanes) * kBlock;
    for (int i = 0; i < kBlock; i += kLanes) {
      const int n = count - i < 0 ? 0 : count - i < kLanes ? count - i : kLanes;
      u16x16 parts[kParts];
      split(load_floats(weights + h * stride, Dtype::float32, j + i, n), parts);
      for (int p = 0; p < kParts; ++p) memcpy(to + p * kLanes * kBlock + i, &parts[p], 32);
    }
  }
}

// 32 columns of `count` rows as tiles B: [2][kBlock / kStep]. The unpacking leaves the columns
// 8q + i in the first, 8q + 4 + i in the second, at place 4q + i.
inline void columns_as_tiles(const char* rows, int64_t bytes, int count, char* out) {
  constexpr int64_t second = kBlock / kStep * kTile;
  for (int j = 0; j < count; j += 2, out += 64) {
    __builtin_prefetch(rows + (j + kBlock) * bytes, 0, 2);
    __builtin_prefetch(rows + (j + 1 + kBlock) * bytes, 0, 2);
    const __m512i a = _mm512_loadu_si512(rows + j * bytes);
    const __m512i b = j + 1 < count ? _mm512_loadu_si512(rows + (j + 1) * bytes) : __m512i{};
    _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(out + second, _mm512_unpackhi_epi16(a, b));
  }
  for (int j = (count + 1) / 2; j % kLanes; ++j, out += 64) {
    memset(out, 0, 64);
    memset(out + second, 0, 64);
  }
}

// c [2][groups] tiles += weights * columns; the first block starts them.
template <int kHeadGroups>
inline void add_columns(const uint16_t* weights, const char* columns, int steps, bool first,
                        float* c) {
  constexpr int kPart = kLanes * kBlock, kGroup = kParts * kPart;
  begin_sums<kHeadGroups>(first, c);
  for (int s = 0; s < steps; ++s, columns += kTile, weights += kStep) {
    _tile_loadd(6, columns, 64);
    _tile_loadd(7, columns + kBlock / kStep * kTile, 64);
    _tile_loadd(4, weights, 2 * kBlock);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, weights + kPart, 2 * kBlock);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (kHeadGroups == 2) {
      _tile_loadd(4, weights + kGroup, 2 * kBlock);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
      _tile_loadd(5, weights + kGroup + kPart, 2 * kBlock);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<kHeadGroups>(c);
}

void weighted_sum(const RowsArgs& a, const float* weights, int heads, int64_t weights_stride,
                  float* out) {
  const TileScope scope;
  constexpr int kSums = kGroups * 2 * kTile / 4;  // of 32 columns
  alignas(64) float sums[kSteps * kSums];
  alignas(64) uint16_t parts[kGroups * kParts * kLanes * kBlock] = {};
  alignas(64) char columns[2 * kBlock / kStep * kTile];
  for (int j = 0; j < a.rows; j += kBlock) {
    const int count = a.rows - j < kBlock ? a.rows - j : kBlock,
              steps = (count + kStep - 1) / kStep;
    weights_as_tiles(weights, heads, weights_stride, j, count, parts);
    for (int d = 0; d < a.dim; d += kStep) {
      const char* rows = (const char*)a.data + (j * a.stride + d) * 2;
      columns_as_tiles(rows, a.stride * 2, count, columns);
      float* c = sums + d / kStep * kSums;
      if (heads > kLanes)
        add_columns<2>(parts, columns, steps, j == 0, c);
      else
        add_columns<1>(parts, columns, steps, j == 0, c);
    }
  }
  for (int h = 0; h < heads; ++h)
    for (int d = 0; d < a.dim; d += kStep) {
      const float* c = sums + d / kStep * kSums + h / kLanes * 2 * kTile / 4 + h % kLanes * kLanes;
      const f32x16 x = load<f32x16>(c), y = load<f32x16>(c + kTile / 4);
      const f32x16 low =
          __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const f32x16 high = __builtin_shufflevector(x, y, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14,
                                                  15, 28, 29, 30, 31);
      memcpy(out + int64_t(h) * a.dim + d, &low, 64);
      memcpy(out + int64_t(h) * a.dim + d + kLanes, &high, 64);
    }
}

}  // namespace

extern const Tiles kTiles;
const Tiles kTiles = {.dots = dots, .weighted_sum = weighted_sum};

}  // namespace moefuse::cpu
