// Sixteen lanes of a vector, written once with the compiler's vector types: the compiler splits
// them for narrower instruction sets, so that every build computes the same bits.
//
// Everything here has internal linkage. The file is compiled with different target flags in
// different objects, and the linker must not merge an AVX-512 copy into the plain build.
#pragma once

#include <cstdint>
#include <cstring>

namespace moefuse::cpu {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
constexpr int kLanes = 16;

[[maybe_unused]] inline f32x16 splat(float v) {
  return v - f32x16{};
}
[[maybe_unused]] inline f32x16 as_float(u32x16 v) {
  return (f32x16)v;
}
[[maybe_unused]] inline u32x16 as_bits(f32x16 v) {
  return (u32x16)v;
}

// Round to nearest even on bfloat16's grid, kept as float. No test for NaN: the operands are
// bfloat16 values, so a NaN's low half is zero and the carry cannot reach its exponent.
[[maybe_unused]] inline f32x16 round_bfloat16(f32x16 v) {
  u32x16 bits = as_bits(v);
  return as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

}  // namespace
}  // namespace moefuse::cpu
