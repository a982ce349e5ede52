// What tensor_dialect.h gives on CUDA, for the emulator: its tensor cores are shuffles. Clusters
// and matrix products of halves are not among it.
#pragma once

#include "lanes.h"

#define groups_x (emulator::group_count().x)

inline void let_next_start() {}
inline void wait_for_inputs() {}

template <int N>
struct Integers {
  int v[N];
};
template <typename T>
struct Pair {
  T v[2];
};
template <typename T>
Pair<T> pair_of(T a, T b) {
  return {{a, b}};
}
template <typename T>
float element(Pair<T> p, int i) {
  return float(p.v[i]);
}
template <typename T>
Pair<T> load_pair(const emulator::Pointer<const T>& p, emulator::At at) {
  if ((p.offset() + at.index) % 2 != 0) emulator::fail(at.where, "misaligned pair");
  return {{p[at], p[emulator::At(at.index + 1, at.where.file, at.where.line)]}};
}
inline Words<4> load_stream(const emulator::Pointer<const uint>& p, emulator::At at) {
  return load_words<4>(p, at);
}
template <typename T>
Floats<8> load_fresh(const emulator::Pointer<const T>& p, emulator::At at) {
  if ((p.offset() + at.index) % 8 != 0) emulator::fail(at.where, "misaligned vector load");
  Floats<8> f;
  for (int i = 0; i < 8; ++i)
    f.v[i] = float(p[emulator::At(at.index + i, at.where.file, at.where.line)]);
  return f;
}
inline Words<4> load_shared(const emulator::Shared<uint>& p, emulator::At at) {
  Words<4> w;
  for (int i = 0; i < 4; ++i) w.w[i] = p[emulator::At(at.index + i, at.where.file, at.where.line)];
  return w;
}

inline uint lane_max(uint v, emulator::Where where = {}) {
  for (uint m = 16; m > 0; m >>= 1) {
    const uint other = shuffle_xor(v, m, where);
    v = other > v ? other : v;
  }
  return v;
}
inline uint byte_permute(uint a, uint b, uint selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint r = 0;
  for (int i = 0; i < 4; ++i) r |= uint(bytes >> (selector >> 4 * i & 7u) * 8 & 255u) << 8 * i;
  return r;
}
inline float div_fast(float a, float b) {
  return a / b;
}
inline float rsqrt_fast(float x) {
  return 1.0f / std::sqrt(x);
}
inline float exp2_fast(float x) {
  return std::exp2(x);
}

// Row g of the first operand lies in the four lanes of g, columns 2 t and 2 t + 1 of the second in
// the four lanes of each.
inline Integers<4> multiply_bytes(Integers<4> c, uint a0, uint a1, uint a2, uint a3, uint b0,
                                  uint b1, emulator::Where where = {}) {
  const uint own = emulator::lane(), row = own / 4 * 4, a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  for (uint t = 0; t < 4; ++t) {
    uint x[4], y[2][2];
    for (int i = 0; i < 4; ++i) x[i] = emulator::shuffle(a[i], row + t, where);
    for (uint column = 0; column < 2; ++column)
      for (int i = 0; i < 2; ++i)
        y[column][i] = emulator::shuffle(b[i], (own % 4 * 2 + column) * 4 + t, where);
    for (int h = 0; h < 2; ++h)
      for (int column = 0; column < 2; ++column)
        for (int half = 0; half < 2; ++half)
          for (int byte = 0; byte < 4; ++byte)
            c.v[2 * h + column] += int(x[2 * half + h] >> 8 * byte & 255u) *
                                   int(int8_t(y[column][half] >> 8 * byte & 255u));
  }
  return c;
}
