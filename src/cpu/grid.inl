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
// with max|x| <= 32639 * 2^e, as v = 256 * high + low, two int8 planes. bfloat16 values down to
// 1/64 of their group's maximum lie on that grid exactly. Headroom: a lane adds up four products
// (eight with 4 bits) of at most 255 * 127, times 256: |sum| <= 4 * 255 * 32639 < 2^26.
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
constexpr int kPrefetch = 64 * 128;   // bytes ahead, to the second cache; rows lie in a row
constexpr float kGridMax = 32639.0f;  // 127 * 256 + 127

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
    most = bits > most ? bits : most;
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
    i32x16 v = __builtin_convertvector(rounded, i32x16);
    total += v;
    auto narrow = __builtin_convertvector(v, u16x16);
    memcpy(grid + i, &narrow, sizeof narrow);
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
      f32x16 v = load_floats(x, dtype, k + i, kLanes);
      memcpy(values + i, &v, sizeof v);
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
        split_planes<kBits>(grid + i, (int8_t*)planes);
      else
        transpose_words<kBits>(values + i, (float*)planes);
    }
  }
}

// A chunk's weights, unpacked once and used for every vector: Grid keeps bytes, Float floats.
template <class C>
struct Grid {
  using Codes = C;
  static constexpr Dot kDot = Dot::grid;
  static constexpr int kBits = Codes::kBits;
  u8x64 part[8 / kBits];
  explicit Grid(u8x64 w) {
    if constexpr (kBits == 8) {
      part[0] = Codes::integers(w);
    } else {
      part[0] = Codes::integers(w & 15);
      part[1] = Codes::integers((u8x64)((u32x16)w >> 4) & 15);
    }
  }
  f32x16 dot(const char* planes) const {
    constexpr int parts = 8 / kBits;
    i32x16 sum{};
    for (int i = 0; i < parts; ++i) sum = dot_bytes(sum, part[i], load<s8x64>(planes + i * kChunk));
    sum <<= 8;
    for (int i = 0; i < parts; ++i)
      sum = dot_bytes(sum, part[i], load<s8x64>(planes + (parts + i) * kChunk));
    return __builtin_convertvector(sum, f32x16);
  }
};

template <class C, bool kFused>
struct Float {
  using Codes = C;
  static constexpr Dot kDot = kFused ? Dot::fma : Dot::separate;
  static constexpr int kBits = Codes::kBits;
  f32x16 value[32 / kBits];
  explicit Float(u8x64 w) {
    for (int j = 0; j < 32 / kBits; ++j)
      value[j] = Codes::floats((u32x16)w >> (j * kBits) & ((1u << kBits) - 1));
  }
  f32x16 dot(const char* planes) const {
    f32x16 sum = value[0] * load<f32x16>(planes);
    for (int j = 1; j < 32 / kBits; ++j) {
      f32x16 x = load<f32x16>(planes + j * 64);
      sum = kFused ? fused(value[j], x, sum) : sum + value[j] * x;
    }
    return sum;
  }
};

// The group of each lane of a chunk, among the sixteen whose scales are at hand.
template <int kLanesPerGroup>
struct LaneGroups {
  i32x16 index;
  int chunk = 0;
  LaneGroups() {
    for (int l = 0; l < kLanes; ++l) index[l] = l / kLanesPerGroup;
  }
  void next() {
    if (++chunk * kLanes % kLanesPerGroup == 0)
      index += kLanesPerGroup > kLanes ? 1 : kLanes / kLanesPerGroup;
  }
};

template <class Codes>
using Fused = Float<Codes, true>;
template <class Codes>
using Separate = Float<Codes, false>;

// One row of W against kVectors prepared vectors. kLanesPerGroup = group_size * bits / 32.
template <class Chunk, int kLanesPerGroup, int kVectors>
inline void qmv_row(const QuantizedMatrix& w, int row, const Layout& at, const char* x,
                    int64_t x_stride, float* y, int64_t y_stride) {
  const int row_bytes = w.cols * w.bits / 8;
  const char* weight = (const char*)w.weight + int64_t(row) * row_bytes;
  const char* const end = weight + row_bytes;
  const int64_t first = int64_t(row) * at.groups;
  f32x16 sum[kVectors] = {}, bias_sum[kVectors] = {};
  const char* planes = x;
  for (int g = 0; g < at.groups; g += kLanes) {
    const int n = at.groups - g < kLanes ? at.groups - g : kLanes;
    const Groups groups = Chunk::Codes::groups(w, first + g, n);
    f32x16 scale[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const char* vector = x + v * x_stride;
      scale[v] = groups.scale * load<f32x16>(vector + at.steps() + 4 * g);
      bias_sum[v] = fused(groups.bias, load<f32x16>(vector + at.sums() + 4 * g), bias_sum[v]);
    }
    LaneGroups<kLanesPerGroup> lane_groups;
    auto step = [&](u8x64 bytes) {
      const Chunk weights(bytes);
      for (int v = 0; v < kVectors; ++v) {
        const f32x16 dot = weights.dot(planes + v * x_stride);
        sum[v] = fused(dot, permute(scale[v], lane_groups.index), sum[v]);
      }
      planes += at.plane_bytes;
      lane_groups.next();
    };
    for (int j = 0; j < kLanesPerGroup && end - weight >= kChunk; ++j, weight += kChunk) {
      __builtin_prefetch(weight + kPrefetch, 0, 2);
      step(load<u8x64>(weight));
    }
    if (g + kLanes >= at.groups && weight < end) step(load_bytes(weight, end - weight));
  }
  for (int v = 0; v < kVectors; ++v) y[v * y_stride] = sum_lanes(sum[v] + bias_sum[v]);
}

template <class Chunk, int kLanesPerGroup>
void qmv_rows(const QuantizedMatrix& w, const void* x, int vectors, float* y, int64_t y_stride,
              int row_begin, int row_end) {
  const Layout at(Chunk::kDot, w.cols, w.group_size, w.bits);
  const int64_t x_stride = at.bytes();
  for (int row = row_begin; row < row_end; ++row) {
    int v = 0;  // the row stays in the cache for the second and later passes over it
    auto pass = [&](auto count) {
      qmv_row<Chunk, kLanesPerGroup, count()>(w, row, at, (const char*)x + v * x_stride, x_stride,
                                              y + v * y_stride + row, y_stride);
      v += count();
    };
    while (vectors - v >= 4) pass([] { return 4; });
    if (vectors - v >= 2) pass([] { return 2; });
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
               int row_begin, int row_end) {
  auto run = [&](auto rows) { rows(w, x, vectors, y, y_stride, row_begin, row_end); };
  if (w.format == Format::mxfp4) return run(qmv_rows<Chunk<Mxfp4Codes>, 4>);
  if (w.format == Format::nvfp4) return run(qmv_rows<Chunk<Nvfp4Codes>, 2>);
  if (w.bits == 4) {
    if (w.group_size == 32) return run(qmv_rows<Chunk<AffineCodes<4>>, 4>);
    if (w.group_size == 64) return run(qmv_rows<Chunk<AffineCodes<4>>, 8>);
    return run(qmv_rows<Chunk<AffineCodes<4>>, 16>);
  }
  if (w.group_size == 32) return run(qmv_rows<Chunk<AffineCodes<8>>, 8>);
  if (w.group_size == 64) return run(qmv_rows<Chunk<AffineCodes<8>>, 16>);
  return run(qmv_rows<Chunk<AffineCodes<8>>, 32>);
}

void qmv(Dot dot, const QuantizedMatrix& w, const void* x, int vectors, float* y, int64_t y_stride,
         int row_begin, int row_end) {
  switch (dot) {
    case Dot::grid:
      return qmv_shape<Grid>(w, x, vectors, y, y_stride, row_begin, row_end);
    case Dot::fma:
      return qmv_shape<Fused>(w, x, vectors, y, y_stride, row_begin, row_end);
    default:
      return qmv_shape<Separate>(w, x, vectors, y, y_stride, row_begin, row_end);
  }
}

}  // namespace
}  // namespace moefuse::cpu
