// What the codes and scales of each format stand for: all that the fp32 kernels ask of one.
//
// e2m1 is a sign, two bits of exponent and one of mantissa: sixteen values from -6 to 6. Twice the
// value plus 12 is an integer from 0 to 24, and
//   scale * e2m1(code) = scale / 2 * integer(code) - 6 * scale,
// which is the affine form: mxfp4 and nvfp4 share its kernels and its error bound. Both products
// are exact in fp32 up to scales of 2^124; a larger one may overflow where e2m1 itself would not.
#pragma once

#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

// Sixteen groups of a row: W = scale * integer + bias.
struct Groups {
  f32x16 scale, bias;
};

// integers: a code's integer, of bytes that hold one code each. floats: the same as floats, of
// words whose other bits are zero. groups: the groups [first, first + n), n <= 16; scale_bytes: of
// one group's scale, and of its bias where it has one.
template <int bits>
struct AffineCodes {
  static constexpr int kBits = bits;
  static Part<u8x64> integers(Part<u8x64> codes) { return codes; }
  static Part<f32x16> floats(Part<u32x16> codes) {
    return convert<Part<f32x16>>((Part<i32x16>)codes);
  }
  static int scale_bytes(const QuantizedMatrix& w) { return itemsize(w.dtype); }
  static Groups groups(const QuantizedMatrix& w, int64_t first, int n) {
    return {load_floats(w.scales, w.dtype, first, n), load_floats(w.biases, w.dtype, first, n)};
  }
};

// 2^(v - 127); 2^-127 for 0 and infinity for 255, as MLX reads e8m0.
inline f32x16 e8m0(u32x16 v) {
  return as_float(select(v == 0u, u32x16{} + 0x400000u, v << 23));
}

// A sign, four bits of exponent (7 stands for 2^0) and three of mantissa; 127 is NaN.
inline f32x16 e4m3(u32x16 v) {
  const u32x16 size = v & 127u, sign = (v & 128u) << 24;
  const u32x16 bits = as_bits(as_float(size << 20) * 0x1p120f);
  return as_float(select(size == 127u, u32x16{} + 0x7fc00000u, bits) | sign);
}

constexpr float kE2m1[kLanes] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                 -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

template <f32x16 (*kScale)(u32x16)>
struct Fp4Codes {
  static constexpr int kBits = 4;
  static Part<u8x64> integers(Part<u8x64> codes) {
    static constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                          12, 11, 10, 9,  8,  6,  4,  0};
    return lookup(table, codes);
  }
  static Part<f32x16> floats(Part<u32x16> codes) {
    static constexpr float table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    return lookup(table, (Part<i32x16>)codes);
  }
  static int scale_bytes(const QuantizedMatrix&) { return 1; }
  static Groups groups(const QuantizedMatrix& w, int64_t first, int n) {
    const auto bytes = load_bytes<u8x16>((const char*)w.scales + first, n);
    const f32x16 scale = kScale(convert<u32x16>(bytes));
    return {scale * 0.5f, scale * -6.0f};
  }
};
using Mxfp4Codes = Fp4Codes<e8m0>;
using Nvfp4Codes = Fp4Codes<e4m3>;

}  // namespace
}  // namespace moefuse::cpu
