// Quantised matrix times activation vectors, in fp32 (modes fp32 and fp32_no_fma).
//
// The weights are used as MLX stores them. A chunk is 64 bytes of a row (16 words); lane l of a
// chunk is its word l, so a group covers group_size * bits / 32 neighbouring lanes. For each chunk
//   lanes += chunk_dot(lanes) * (scale of the lane's group)
// and for each group  bias_lanes[g % 16] += bias[g] * (sum of x over the group),  both fused; at
// the end of a row the lanes of both are added as a tree. That order depends on nothing but the
// shape. What a code and a scale stand for is the format's (formats.h): W = s q + b for each.
//
// Cost on AVX-512 with VNNI, of a chunk of 4 bits and one vector: 11 vector operations (and, shift,
// and, 4 dots, shift, convert, permute, fma) on two ports, 5.5 cycles for 64 bytes; reading them
// from memory takes some 6 to 10.
//
// Dot::grid. The activations of a group go on the grid of the step 2^e, the least power of two
// with max|x| <= 32639 * 2^e, as v = 256 * high + low, two int8 planes, or, where no instruction
// multiplies bytes without saturating, as int16. bfloat16 values down to 1/64 of their group's
// maximum lie on that grid exactly. Headroom: a lane adds up four products (eight with 4 bits) of
// at most 255 * 127, times 256: |sum| <= 4 * 255 * 32639 < 2^26; of int16, the same sum.
// Error, u = 2^-24, x~ = activations on the grid, C = chunks in a row, G = ceil(groups / 16):
//   |y - W x| <= sum_k |W_k| step/2  +  u (C + G + 8) sum_k (|s_g q_k x~_k| + |b_g x~_k|)
// The first term is the grid; in the second each chunk's sum is rounded on conversion (1), its
// scale by the step (1), then by up to C fused additions, each bias product by G, then both by 5
// more; 2 to spare. A group that holds an infinity or a NaN gives NaN.
//
// Dot::fma and Dot::separate. The activations stay fp32, the partial dot of a lane is a chain of
// 32 / bits products: the same second term with u (C + G + 8 + 32 / bits), and no first.
#include "cpu/formats.h"

namespace moefuse::cpu {
namespace {

constexpr int kChunk = 64;            // bytes of a row handled at once
constexpr int kPrefetch = 64 * 128;   // bytes ahead, to the second cache
constexpr float kGridMax = 32639.0f;  // 127 * 256 + 127

// What the grid's planes are made of, two bytes for each k in any case.
using PlaneType = std::conditional_t<kHasByteDots, int8_t, int16_t>;

// Where the parts of a prepared vector are: planes, then step and sum for each group.
struct Layout {
  int chunks, groups, padded_groups;
  int64_t plane_bytes;  // of one chunk
  Layout(Dot dot, int cols, int group_size, int bits)
      : chunks((cols * bits / 8 + kChunk - 1) / kChunk),
        groups(cols / group_size),
        padded_groups((groups + kLanes - 1) / kLanes * kLanes),
        plane_bytes(dot == Dot::grid ? 2 * kChunk * (8 / bits) : 4 * kChunk * (8 / bits)) {}
  int64_t steps() const { return chunks * plane_bytes; }
  int64_t sums() const { return steps() + 4 * padded_groups; }
  int64_t bytes() const { return (sums() + 4 * padded_groups + 63) / 64 * 64; }
};

// The exponent e of the group's step, from the largest |x|'s bits. Finite x only.
inline int grid_exponent(uint32_t max_bits) {
  float largest;
  memcpy(&largest, &max_bits, 4);
  int exponent = int(max_bits >> 23) - 127 - 14;
  if (exponent < -120) return -120;
  uint32_t step_bits = uint32_t(exponent + 127) << 23;
  float step;
  memcpy(&step, &step_bits, 4);
  return largest > kGridMax * step ? exponent + 1 : exponent;
}

// Puts one group on its grid: 256 * high + low = x / step. Returns the step, NaN if x is not
// finite; *sum is the sum of the grid's values.
inline float grid_group(const float* x, int n, int16_t* grid, float* sum) {
  u32x16 most{};
  for (int i = 0; i < n; i += kLanes) {
    u32x16 bits = load<u32x16>(x + i) & 0x7fffffffu;
    most = larger(bits, most);
  }
  uint32_t max_bits = 0;
  for (int l = 0; l < kLanes; ++l) max_bits = most[l] > max_bits ? most[l] : max_bits;
  if (max_bits >= 0x7f800000u) {
    memset(grid, 0, n * sizeof *grid);
    return *sum = __builtin_nanf("");
  }
  int exponent = grid_exponent(max_bits);
  uint32_t step_bits = uint32_t(127 + exponent) << 23, inverse_bits = uint32_t(127 - exponent)
                                                                      << 23;
  float step, inverse;
  memcpy(&step, &step_bits, 4);
  memcpy(&inverse, &inverse_bits, 4);
  i32x16 total{};
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < n; i += kLanes) {
    f32x16 rounded = (load<f32x16>(x + i) * inverse + magic) - magic;
    i32x16 v = convert<i32x16>(rounded);
    total += v;
    store(grid + i, convert<u16x16>(v));
  }
  int32_t sum_of_grid = 0;
  for (int l = 0; l < kLanes; ++l) sum_of_grid += total[l];
  *sum = step * float(sum_of_grid);  // |sum_of_grid| < 2^22, so exact
  return step;
}

// The int8 planes of one chunk: high then low; with 4 bits even k, then odd k of each.
template <int kBits>
inline void split_planes(const int16_t* grid, int8_t* planes) {
  constexpr int parts = 8 / kBits;
  for (int part = 0; part < parts; ++part) {
    for (int i = 0; i < kChunk; ++i) {
      int v = grid[i * parts + part];
      int high = (v + 128) >> 8;
      planes[part * kChunk + i] = int8_t(high);
      planes[(parts + part) * kChunk + i] = int8_t(v - 256 * high);
    }
  }
}

// The int16 planes of one chunk, for the even bytes of its weights and for the odd ones; with 4
// bits both of the low codes, then both of the high ones.
template <int kBits>
inline void split_planes(const int16_t* grid, int16_t* planes) {
  constexpr int parts = 8 / kBits, kPlane = kChunk / 2;
  for (int j = 0; j < 2 * parts; ++j) {
    const int first = j % 2 * parts + j / 2;
    for (int i = 0; i < kPlane; ++i) planes[j * kPlane + i] = grid[i * 2 * parts + first];
  }
}

// Float planes of one chunk: plane j holds value j of each of the 16 words.
template <int kBits>
inline void transpose_words(const float* x, float* planes) {
  constexpr int per_word = 32 / kBits;
  for (int j = 0; j < per_word; ++j)
    for (int l = 0; l < kLanes; ++l) planes[j * kLanes + l] = x[l * per_word + j];
}

template <int kBits>
void prepare_bits(Dot dot, const void* x, Dtype dtype, int cols, int group_size, void* out) {
  const Layout at(dot, cols, group_size, kBits);
  char* base = (char*)out;
  float* steps = (float*)(base + at.steps());
  float* sums = (float*)(base + at.sums());
  memset(steps, 0, 8 * at.padded_groups);
  constexpr int span = kChunk * 8 / kBits;  // k of one chunk
  constexpr int buffer = span < 128 ? 128 : span;
  const int piece = group_size > span ? group_size : span;  // whole groups and whole chunks
  float values[buffer];
  int16_t grid[buffer];
  for (int k = 0; k < cols; k += piece) {
    int n = cols - k < piece ? cols - k : piece;
    memset(values, 0, sizeof values);
    memset(grid, 0, sizeof grid);
    for (int i = 0; i < n; i += kLanes) {
      store(values + i, load_floats(x, dtype, k + i, kLanes));
    }
    for (int i = 0; i < n; i += group_size) {
      int g = (k + i) / group_size;
      if (dot == Dot::grid) {
        steps[g] = grid_group(values + i, group_size, grid + i, sums + g);
        continue;
      }
      double sum = 0;
      for (int j = 0; j < group_size; ++j) sum += values[i + j];
      steps[g] = 1.0f;
      sums[g] = float(sum);
    }
    for (int i = 0; i < n; i += span) {
      char* planes = base + (k + i) / span * at.plane_bytes;
      if (dot == Dot::grid)
        split_planes<kBits>(grid + i, (PlaneType*)planes);
      else
        transpose_words<kBits>(values + i, (float*)planes);
    }
  }
}

// The weights in one register of a chunk, unpacked once and used for every vector: Grid keeps bytes
// or int16, Float floats.
template <class C>
struct Grid {
  using Codes = C;
  static constexpr Dot kDot = Dot::grid;
  static constexpr int kBits = Codes::kBits, kParts = 8 / kBits;
  Part<u8x64> bytes[kParts];
  MOEFUSE_INLINE explicit Grid(Part<u8x64> w) {
    if constexpr (kBits == 8) {
      bytes[0] = Codes::integers(w);
    } else {
      bytes[0] = Codes::integers(w & 15);
      bytes[1] = Codes::integers((Part<u8x64>)((Part<u32x16>)w >> 4) & 15);
    }
  }
  template <int kVectors>
  MOEFUSE_INLINE void dots(const char* planes, int64_t stride,
                           Part<f32x16> (&out)[kVectors]) const {
    Part<i32x16> sum[kVectors] = {};
    if constexpr (kHasByteDots)
      add_bytes(planes, stride, sum);
    else
      add_pairs(planes, stride, sum);
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      out[v()] = convert<Part<f32x16>>(sum[v()]);
    });
  }

 private:
  // All vectors take each step together: one alone is a chain of four dots and a shift.
  template <int kVectors>
  MOEFUSE_INLINE void add_bytes(const char* planes, int64_t stride,
                                Part<i32x16> (&sum)[kVectors]) const {
    unrolled<2 * kParts>([&](auto i) __attribute__((always_inline)) {
      unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
        if (i() == kParts) sum[v()] <<= 8;
        const auto plane = load<Part<s8x64>>(planes + v() * stride + i() * kChunk);
        sum[v()] = dot_bytes(sum[v()], bytes[i() % kParts], plane);
      });
    });
  }
  // One vector after the other: sixteen registers do not hold what all of them multiply.
  template <int kVectors>
  MOEFUSE_INLINE void add_pairs(const char* planes, int64_t stride,
                                Part<i32x16> (&sum)[kVectors]) const {
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      unrolled<2 * kParts>([&](auto i) __attribute__((always_inline)) {
        const auto pairs = (Part<u16x32>)bytes[i() / 2];
        const auto w = (Part<s16x32>)(i() % 2 ? pairs >> 8 : pairs & 255);
        sum[v()] += dot_pairs(w, load<Part<s16x32>>(planes + v() * stride + i() * kChunk));
      });
    });
  }
};

template <class C, bool kFused>
struct Float {
  using Codes = C;
  static constexpr Dot kDot = kFused ? Dot::fma : Dot::separate;
  static constexpr int kBits = Codes::kBits;
  Part<f32x16> value[32 / kBits];
  MOEFUSE_INLINE explicit Float(Part<u8x64> w) {
    for (int j = 0; j < 32 / kBits; ++j)
      value[j] = Codes::floats((Part<u32x16>)w >> (j * kBits) & ((1u << kBits) - 1));
  }
  template <int kVectors>
  MOEFUSE_INLINE void dots(const char* planes, int64_t stride,
                           Part<f32x16> (&out)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v, planes += stride) {
      Part<f32x16> sum = value[0] * load<Part<f32x16>>(planes);
      for (int j = 1; j < 32 / kBits; ++j) {
        const auto x = load<Part<f32x16>>(planes + j * kChunk);
        sum = kFused ? fused(value[j], x, sum) : sum + value[j] * x;
      }
      out[v] = sum;
    }
  }
};

// The scales of sixteen groups, and which of them the lanes of their chunk j take, from `lane` on.
#if defined(__AVX512F__)
template <int kLanesPerGroup>
struct LaneGroups {
  alignas(64) int32_t of[kLanesPerGroup][kLanes];
  constexpr LaneGroups() : of{} {
    for (int j = 0; j < kLanesPerGroup; ++j)
      for (int l = 0; l < kLanes; ++l) of[j][l] = (j * kLanes + l) / kLanesPerGroup;
  }
};
template <int kLanesPerGroup>
constexpr LaneGroups<kLanesPerGroup> kLaneGroups;

using GroupScales = f32x16;
template <int kLanesPerGroup>
struct ChunkLanes {
  i32x16 groups;
  explicit ChunkLanes(int j) : groups(load<i32x16>(kLaneGroups<kLanesPerGroup>.of[j])) {}
  f32x16 scales(GroupScales all, int) const {
    return (f32x16)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)groups, (__m512)all);
  }
};
#else  // in memory: no instruction permutes more than a register
struct GroupScales {
  alignas(64) float of[kLanes];
  MOEFUSE_INLINE void operator=(f32x16 v) { store(of, v); }
};
template <int kLanesPerGroup>
struct ChunkLanes {
  int first;
  explicit ChunkLanes(int j) : first(j * kLanes) {}
  MOEFUSE_INLINE Part<f32x16> scales(const GroupScales& all, int lane) const {
    return spread<kLanesPerGroup>(all.of, first + lane);
  }
};
#endif

template <class Codes>
using Fused = Float<Codes, true>;
template <class Codes>
using Separate = Float<Codes, false>;

// How far from a row lies what will be wanted some time after it, in bytes.
struct Distance {
  int64_t weight, scales, biases;
};

// One row of W against kVectors prepared vectors; leaves their sums in lanes. kLanesPerGroup =
// group_size * bits / 32.
template <class Chunk, int kLanesPerGroup, int kVectors>
inline __attribute__((always_inline)) void qmv_row(const QuantizedMatrix& w, int row,
                                                   const Distance& ahead, const Layout& at,
                                                   const char* x, int64_t x_stride,
                                                   f32x16 (&out)[kVectors]) {
  const int row_bytes = w.cols * w.bits / 8, scale_bytes = Chunk::Codes::scale_bytes(w);
  const char* weight = (const char*)w.weight + int64_t(row) * row_bytes;
  const char* const end = weight + row_bytes;
  const int64_t first = int64_t(row) * at.groups;
  const char* const scales_ahead = (const char*)w.scales + ahead.scales + first * scale_bytes;
  const char* const biases_ahead = (const char*)w.biases + ahead.biases + first * scale_bytes;
  f32x16 sum[kVectors] = {}, bias_sum[kVectors] = {};
  const char* planes = x;
  for (int g = 0; g < at.groups; g += kLanes) {
    const int n = at.groups - g < kLanes ? at.groups - g : kLanes;
    __builtin_prefetch(scales_ahead + g * scale_bytes);
    __builtin_prefetch(biases_ahead + g * scale_bytes);
    const Groups groups = Chunk::Codes::groups(w, first + g, n);
    GroupScales scale[kVectors];
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      const char* vector = x + v() * x_stride;
      scale[v()] = groups.scale * load<f32x16>(vector + at.steps() + 4 * g);
      bias_sum[v()] = fused(groups.bias, load<f32x16>(vector + at.sums() + 4 * g), bias_sum[v()]);
    });
    const auto step = [&](u8x64 bytes, int j) __attribute__((always_inline)) {
      const ChunkLanes<kLanesPerGroup> lanes(j);
      // One register after the other: what is unpacked serves all vectors and then makes room.
      unrolled<kRegisters>([&](auto r) __attribute__((always_inline)) {
        const Chunk weights(part<r()>(bytes));
        Part<f32x16> dot[kVectors];
        weights.dots(planes + r() * sizeof *dot, x_stride, dot);
        unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          auto& lane_sums = part<r()>(sum[v()]);
          const auto lane_scales = lanes.scales(scale[v()], r() * kLanesOf<Part<f32x16>>);
          lane_sums = fused(dot[v()], lane_scales, lane_sums);
        });
      });
      planes += at.plane_bytes;
    };
    int j = 0;
    for (; j < kLanesPerGroup && end - weight >= kChunk; ++j, weight += kChunk) {
      __builtin_prefetch(weight + ahead.weight, 0, 2);
      step(load<u8x64>(weight), j);
    }
    if (g + kLanes >= at.groups && weight < end) step(load_bytes<u8x64>(weight, end - weight), j);
  }
  unrolled<kVectors>([&](auto v)
                         __attribute__((always_inline)) { out[v()] = sum[v()] + bias_sum[v()]; });
}

// Up to sixteen rows; from row `last` on, it is `after` that will be wanted. The sums of several
// vectors are added up together at the end. Those of one are not: keeping sixteen back costs more
// than it saves where memory sets the pace (7 % of it).
template <class Chunk, int kLanesPerGroup, int kVectors>
void qmv_rows(const QuantizedMatrix w, const Layout at, const char* x, float* y, int64_t y_stride,
              int row, int rows, const Distance ahead, const Distance after, int last) {
  f32x16 sums[kVectors][kLanes] = {};
  for (int r = 0; r < rows; ++r) {
    f32x16 sum[kVectors];
    qmv_row<Chunk, kLanesPerGroup>(w, row + r, row + r < last ? ahead : after, at, x, at.bytes(),
                                   sum);
    if constexpr (kVectors == 1)
      y[row + r] = sum_lanes(sum[0]);
    else
      for (int v = 0; v < kVectors; ++v) sums[v][r] = sum[v];
  }
  if constexpr (kVectors > 1) {
    for (int v = 0; v < kVectors; ++v) {
      sum_lanes16(sums[v]);
      memcpy(y + v * y_stride + row, sums[v], 4 * rows);
    }
  }
}

template <class Chunk, int kLanesPerGroup>
void qmv_range(const QuantizedMatrix& w, const void* x, int vectors, float* y, int64_t y_stride,
               int row_begin, int row_end, const Ahead& next) {
  const Layout at(Chunk::kDot, w.cols, w.group_size, w.bits);
  const int64_t row_bytes = int64_t(w.cols) * w.bits / 8;
  const int64_t scales_bytes = int64_t(at.groups) * Chunk::Codes::scale_bytes(w);
  const int rows_ahead = int((kPrefetch + row_bytes - 1) / row_bytes);
  const Distance ahead = {rows_ahead * row_bytes, rows_ahead * scales_bytes,
                          rows_ahead * scales_bytes};
  Distance after = ahead;
  if (next.weight) {
    const auto distance = [&](const void* to, const void* from, int64_t bytes) {
      return (const char*)to - ((const char*)from + (row_end - rows_ahead) * bytes);
    };
    after = {distance(next.weight, w.weight, row_bytes),
             distance(next.scales, w.scales, scales_bytes),
             distance(next.biases, w.biases, scales_bytes)};
  }
  for (int row = row_begin; row < row_end; row += kLanes) {
    const int rows = row_end - row < kLanes ? row_end - row : kLanes;
    int v = 0;  // sixteen rows stay in the cache for the second and later passes over them
    auto pass = [&](auto count) {
      qmv_rows<Chunk, kLanesPerGroup, count()>(w, at, (const char*)x + v * at.bytes(),
                                               y + v * y_stride, y_stride, row, rows, ahead, after,
                                               row_end - rows_ahead);
      v += count();
    };
    // Without AVX-512 the sums of two have room in the registers.
    if constexpr (kRegisters == 1)
      while (vectors - v >= 4) pass([] { return 4; });
    while (vectors - v >= 2) pass([] { return 2; });
    if (vectors - v >= 1) pass([] { return 1; });
  }
}

int64_t prepared_bytes(Dot dot, int cols, int group_size, int bits) {
  return Layout(dot, cols, group_size, bits).bytes();
}

void prepare(Dot dot, const void* x, Dtype dtype, int cols, int group_size, int bits, void* out) {
  if (bits == 4) return prepare_bits<4>(dot, x, dtype, cols, group_size, out);
  prepare_bits<8>(dot, x, dtype, cols, group_size, out);
}

template <template <class> class Chunk>
void qmv_shape(const QuantizedMatrix& w, const void* x, int vectors, float* y, int64_t y_stride,
               int row_begin, int row_end, const Ahead& next) {
  auto run = [&](auto rows) { rows(w, x, vectors, y, y_stride, row_begin, row_end, next); };
  if (w.format == Format::mxfp4) return run(qmv_range<Chunk<Mxfp4Codes>, 4>);
  if (w.format == Format::nvfp4) return run(qmv_range<Chunk<Nvfp4Codes>, 2>);
  if (w.bits == 4) {
    if (w.group_size == 32) return run(qmv_range<Chunk<AffineCodes<4>>, 4>);
    if (w.group_size == 64) return run(qmv_range<Chunk<AffineCodes<4>>, 8>);
    return run(qmv_range<Chunk<AffineCodes<4>>, 16>);
  }
  if (w.group_size == 32) return run(qmv_range<Chunk<AffineCodes<8>>, 8>);
  if (w.group_size == 64) return run(qmv_range<Chunk<AffineCodes<8>>, 16>);
  return run(qmv_range<Chunk<AffineCodes<8>>, 32>);
}

void qmv(Dot dot, const QuantizedMatrix& w, const void* x, int vectors, float* y, int64_t y_stride,
         int row_begin, int row_end, const Ahead& next) {
  switch (dot) {
    case Dot::grid:
      return qmv_shape<Grid>(w, x, vectors, y, y_stride, row_begin, row_end, next);
    case Dot::fma:
      return qmv_shape<Fused>(w, x, vectors, y, y_stride, row_begin, row_end, next);
    default:
      return qmv_shape<Separate>(w, x, vectors, y, y_stride, row_begin, row_end, next);
  }
}

}  // namespace
}  // namespace moefuse::cpu
