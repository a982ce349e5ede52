// Kernel dialect for the emulator: what dialect_metal.h and dialect_cuda.h give on their devices.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "emulator.h"
#include "mlx/types/half_types.h"

using uint = uint32_t;
using bfloat16_t = mlx::core::bfloat16_t;
using float16_t = mlx::core::float16_t;

#define FUNC inline
#define UNROLL
#define SHARED_ARRAY(type, name, size) \
  const emulator::Shared<type> name(emulator::shared_block(#name, size, sizeof(type), {}))
#define group_x (emulator::group_position().x)
#define group_y (emulator::group_position().y)
#define group_z (emulator::group_position().z)
#define lane_id (emulator::lane())
#define simd_id (emulator::simdgroup())
#define thread_id (emulator::thread_in_group())

inline void group_barrier(emulator::Where where = {}) {
  emulator::barrier(where);
}

inline uint as_uint(float v) {
  return std::bit_cast<uint>(v);
}
inline float as_float(uint v) {
  return std::bit_cast<float>(v);
}

inline uint shuffle(uint v, uint lane, emulator::Where where = {}) {
  return emulator::shuffle(v, lane, where);
}
inline float shuffle(float v, uint lane, emulator::Where where = {}) {
  return as_float(emulator::shuffle(as_uint(v), lane, where));
}
inline uint shuffle_xor(uint v, uint mask, emulator::Where where = {}) {
  return emulator::shuffle(v, emulator::lane() ^ mask, where);
}
inline float shuffle_xor(float v, uint mask, emulator::Where where = {}) {
  return as_float(emulator::shuffle(as_uint(v), emulator::lane() ^ mask, where));
}

// Compiled without contraction: these are the roundings that they name.
inline float mul_rn(float a, float b) {
  return a * b;
}
inline float add_rn(float a, float b) {
  return a + b;
}
inline float fma_rn(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline float div_rn(float a, float b) {
  return a / b;
}
inline float sqrt_rn(float a) {
  return __builtin_sqrtf(a);
}
inline float round_even(float a) {
  return __builtin_rintf(a);
}

template <int N>
struct Words {
  uint w[N];
};

template <int N>
Words<N> load_words(const emulator::Pointer<const uint>& p, emulator::At at) {
  if ((p.offset() + at.index) % N != 0) emulator::fail(at.where, "misaligned vector load");
  Words<N> words;
  for (int i = 0; i < N; ++i) {
    words.w[i] = p[emulator::At(at.index + i, at.where.file, at.where.line)];
  }
  return words;
}

// An input that the kernel updates in place (the KV cache).
template <typename T>
auto writable(const emulator::Pointer<T>& p) {
  return p.writable();
}
