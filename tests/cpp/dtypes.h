// Elements of the three dtypes and of the fp4 formats as doubles, decoded apart from the kernels'
// own conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace moefuse::cpu {

inline double decode(Dtype dtype, const void* p, int64_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  if (dtype == Dtype::bfloat16) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

// A code of mxfp4 and nvfp4, and the scales of each.
inline double e2m1(unsigned code) {
  const int exponent = code >> 1 & 3, mantissa = code & 1;
  const double size = exponent ? std::ldexp(2 + mantissa, exponent - 2) : mantissa / 2.0;
  return code & 8 ? -size : size;
}
inline double e8m0(unsigned byte) {
  return std::ldexp(1, int(byte) - 127);
}
inline double e4m3(unsigned byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return byte & 128 ? -size : size;
}

// Truncates: only the stored value counts, and it is what the oracle reads.
inline void encode(Dtype dtype, std::vector<uint8_t>& out, double v) {
  const auto value = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  auto put = [&](uint32_t word, int bytes) {
    for (int i = 0; i < bytes; ++i) out.push_back(uint8_t(word >> 8 * i));
  };
  if (dtype == Dtype::float32) return put(bits, 4);
  if (dtype == Dtype::bfloat16) return put(bits >> 16, 2);
  const int exponent = int(bits >> 23 & 255) - 112;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (exponent <= 0) return put(sign, 2);
  put(exponent >= 31 ? sign | 0x7bff : sign | uint32_t(exponent) << 10 | (bits >> 13 & 1023), 2);
}

}  // namespace moefuse::cpu
