// Stock MLX's quantised matrix-vector product on x86, bit for bit: it keeps one sum per row in the
// activation dtype, k ascending, and rounds every operation. The order in k is the contract, so the
// sixteen lanes are sixteen rows.
//   affine        sum += x * (scale * q + bias)
//   mxfp4, nvfp4  group += x * e2m1(q), and for each group  sum += scale * group
#include "cpu/formats.h"

namespace moefuse::cpu {
namespace {

template <Dtype T>
MOEFUSE_INLINE f32x16 rounded(f32x16 v) {
  if constexpr (T == Dtype::bfloat16) return round_bfloat16(v);
  if constexpr (T == Dtype::float16) return widen_half(narrow_half(v));
  return v;
}

template <Dtype T>
inline float load_one(const void* p, int64_t i) {
  if constexpr (T == Dtype::float32) return ((const float*)p)[i];
  if constexpr (T == Dtype::float16) return half_to_float(((const uint16_t*)p)[i]);
  uint32_t bits = uint32_t(((const uint16_t*)p)[i]) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The sum over one group of sixteen rows: `first` has the group's place in the scales, row by row.
template <Dtype T, int bits>
struct AffineSum {
  static constexpr int kBits = bits;
  f32x16 scale, bias;
  AffineSum(const QuantizedMatrix& w, const int64_t (&first)[kLanes]) {
    scale = from_lanes<f32x16>([&](int l) { return load_one<T>(w.scales, first[l]); });
    bias = from_lanes<f32x16>([&](int l) { return load_one<T>(w.biases, first[l]); });
  }
  MOEFUSE_INLINE f32x16 add(f32x16 sum, u32x16 codes, f32x16 x) {
    const f32x16 q = convert<f32x16>(cast<i32x16>(codes));
    return rounded<T>(sum + rounded<T>(x * rounded<T>(rounded<T>(scale * q) + bias)));
  }
  MOEFUSE_INLINE f32x16 finish(f32x16 sum) const { return sum; }
};

template <Dtype T, f32x16 (*kScale)(u32x16)>
struct Fp4Sum {
  static constexpr int kBits = 4;
  f32x16 scale, group = {};
  Fp4Sum(const QuantizedMatrix& w, const int64_t (&first)[kLanes]) {
    const auto* scales = (const uint8_t*)w.scales;
    scale = rounded<T>(kScale(from_lanes<u32x16>([&](int l) { return scales[first[l]]; })));
  }
  MOEFUSE_INLINE f32x16 add(f32x16 sum, u32x16 codes, f32x16 x) {
    group = rounded<T>(group + rounded<T>(x * lookup(kE2m1, cast<i32x16>(codes))));
    return sum;
  }
  MOEFUSE_INLINE f32x16 finish(f32x16 sum) const {
    return rounded<T>(sum + rounded<T>(scale * group));
  }
};

template <Dtype T, class GroupSum>
f32x16 exact_rows(const QuantizedMatrix& w, const void* x, const int64_t (&row)[kLanes]) {
  constexpr int kBits = GroupSum::kBits, per_word = 32 / kBits;
  const int words = w.cols / per_word, groups = w.cols / w.group_size;
  f32x16 sum = {};
  for (int g = 0; g < groups; ++g) {
    int64_t first[kLanes];
    for (int l = 0; l < kLanes; ++l) first[l] = row[l] * groups + g;
    GroupSum group(w, first);
    for (int j = g * w.group_size / per_word; j < (g + 1) * w.group_size / per_word; ++j) {
      auto word = from_lanes<u32x16>([&](int l) { return w.weight[row[l] * words + j]; });
      for (int p = 0; p < per_word; ++p, word >>= kBits)
        sum = group.add(sum, word & ((1u << kBits) - 1), splat(load_one<T>(x, j * per_word + p)));
    }
    sum = group.finish(sum);
  }
  return sum;
}

template <Dtype T, class GroupSum>
void exact_qmv_rows(const QuantizedMatrix& w, const void* x, void* y, int begin, int end) {
  for (int n = begin; n < end; n += kLanes) {
    const int count = end - n < kLanes ? end - n : kLanes;
    int64_t row[kLanes];  // past the end the last row again, not stored
    for (int l = 0; l < kLanes; ++l) row[l] = n + (l < count ? l : count - 1);
    store_floats(y, T, n, count, exact_rows<T, GroupSum>(w, x, row));
  }
}

template <Dtype T>
void exact_qmv_typed(const QuantizedMatrix& w, const void* x, void* y, int begin, int end) {
  switch (w.format) {
    case Format::mxfp4:
      return exact_qmv_rows<T, Fp4Sum<T, e8m0>>(w, x, y, begin, end);
    case Format::nvfp4:
      return exact_qmv_rows<T, Fp4Sum<T, e4m3>>(w, x, y, begin, end);
    case Format::affine:
      if (w.bits == 4) return exact_qmv_rows<T, AffineSum<T, 4>>(w, x, y, begin, end);
      return exact_qmv_rows<T, AffineSum<T, 8>>(w, x, y, begin, end);
  }
}

void exact_qmv(const QuantizedMatrix& w, const void* x, void* y, int begin, int end) {
  switch (w.dtype) {
    case Dtype::float32:
      return exact_qmv_typed<Dtype::float32>(w, x, y, begin, end);
    case Dtype::float16:
      return exact_qmv_typed<Dtype::float16>(w, x, y, begin, end);
    case Dtype::bfloat16:
      return exact_qmv_typed<Dtype::bfloat16>(w, x, y, begin, end);
  }
}

// Stock's exp: 2^whole * 2^part with a polynomial of degree 6; 0 below -88, infinity above 88. The
// half is added in double precision there, which decides the ties.
MOEFUSE_INLINE f32x16 stock_exp(f32x16 x) {
  const f32x16 y = x * 1.442695f;
  const auto whole =
      from_lanes<f32x16>([&](int l) { return float(__builtin_floor(double(y[l]) + 0.5)); });
  const f32x16 part = y - whole;
  f32x16 p = splat(1.535336188319500e-4f);
  for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                  2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
    p = fused(p, part, splat(c));
  const i32x16 in_range = (x <= 88.0f) & (x >= -88.0f);
  const i32x16 exponent = convert<i32x16>(select(in_range, whole, f32x16{}));
  const f32x16 value = cast<f32x16>((exponent + 127) << 23) * p;
  const f32x16 outside = select(x > 88.0f, splat(__builtin_inff()), f32x16{});
  return select(x != x, x, select(in_range, value, outside));
}

template <Dtype T>
void exact_swiglu_typed(const void* gate, const void* up, void* out, int n) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    const f32x16 g = load_floats(gate, T, i, count), u = load_floats(up, T, i, count);
    const f32x16 magnitude = as_float(as_bits(g) & 0x7fffffffu);
    const f32x16 y = 1.0f / (1.0f + rounded<T>(stock_exp(magnitude)));
    const f32x16 sigmoid = rounded<T>(select(g < 0.0f, y, 1.0f - y));
    store_floats(out, T, i, count, rounded<T>(rounded<T>(g * sigmoid) * u));
  }
}

void exact_swiglu(Dtype dtype, const void* gate, const void* up, void* out, int n) {
  switch (dtype) {
    case Dtype::float32:
      return exact_swiglu_typed<Dtype::float32>(gate, up, out, n);
    case Dtype::float16:
      return exact_swiglu_typed<Dtype::float16>(gate, up, out, n);
    case Dtype::bfloat16:
      return exact_swiglu_typed<Dtype::bfloat16>(gate, up, out, n);
  }
}

}  // namespace
}  // namespace moefuse::cpu
