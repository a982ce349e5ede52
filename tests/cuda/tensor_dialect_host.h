// What tensor_dialect.h gives on CUDA, for the emulator: its tensor cores see every lane's words,
// its copies in the background land when they are waited for.
#pragma once

#include "lanes.h"

#define groups_x (emulator::group_count().x)
#define ROLLED

inline void let_next_start() {}
inline void wait_for_inputs() {}
inline void warp_barrier(emulator::Where where = {}) {
  emulator::warp_barrier(where);
}

template <int N>
struct Integers {
  int v[N];
};
inline Words<4> no_words() {
  return {};
}
template <typename P>
P settled(const P& p) {
  return p;
}
template <typename T>
T load_one(const emulator::Pointer<const T>& p, emulator::At at) {
  return p[at];
}
template <typename T>
Floats<8> load_fresh(const emulator::Pointer<const T>& p, emulator::At at) {
  if ((p.offset() + at.index) % 8 != 0) emulator::fail(at.where, "misaligned vector load");
  Floats<8> f;
  for (int i = 0; i < 8; ++i)
    f.v[i] = float(p[emulator::At(at.index + i, at.where.file, at.where.line)]);
  return f;
}

// N consecutive values, aligned to as many (to 16 bytes at most).
template <int N, typename T>
Floats<N> load_values(const emulator::Pointer<const T>& p, emulator::Where where = {}) {
  if (p.offset() % (N % 8 == 0 ? 16 / sizeof(T) : N) != 0)
    emulator::fail(where, "misaligned vector load");
  Floats<N> f;
  for (int i = 0; i < N; ++i) f.v[i] = float(p[emulator::At(i, where.file, where.line)]);
  return f;
}

// Shared memory in pieces of 16 bytes, and as numbers of another type.
#define DYNAMIC_SHARED_ARRAY(type, name, size) \
  const emulator::Shared<type> name(emulator::shared_block(#name, size, sizeof(type), {}, true))
template <typename T>
emulator::Shared<float> as_floats(const emulator::Shared<T>& p, emulator::Where where = {}) {
  if (p.offset() * sizeof(T) % 4 != 0) emulator::fail(where, "misaligned floats");
  return emulator::Shared<float>(p.block(), p.offset() * int64_t(sizeof(T)) / 4);
}
template <typename T>
Words<4> load_line(const emulator::Shared<T>& p, bool unwritten_too, emulator::Where where) {
  p.block().on_read(p.line(where), 16, unwritten_too);
  Words<4> w;
  std::memcpy(w.w, p.bytes(), 16);
  return w;
}
template <typename T>
void store_line(const emulator::Shared<T>& p, const void* words, emulator::Where where) {
  p.block().on_write(p.line(where), 16);
  std::memcpy(p.bytes(), words, 16);
}
template <typename T>
void store_zeros(const emulator::Shared<T>& to, emulator::Where where = {}) {
  const Words<4> zero = {};
  store_line(to, zero.w, where);
}
// Reads through the buffer, which checks bounds and writers.
template <typename T>
Words<4> load_line(const emulator::Pointer<const T>& p, emulator::Where where) {
  constexpr int N = 16 / sizeof(T);
  if (p.offset() % N != 0) emulator::fail(where, "misaligned access to a buffer");
  T values[N];
  for (int i = 0; i < N; ++i) values[i] = p[emulator::At(i, where.file, where.line)];
  Words<4> w;
  std::memcpy(w.w, values, 16);
  return w;
}
template <typename T>
Words<4> load_stream(const emulator::Pointer<const T>& p, emulator::At at) {
  return load_line(p + at.index, at.where);
}
template <typename T>
void copy_async(const emulator::Shared<T>& to, const emulator::Pointer<const T>& from,
                emulator::Where where = {}) {
  to.block().on_write(to.line(where), 16, false, true);
  load_line(from, where);  // may happen right away, so it has to be allowed already
  emulator::start_copy([=] { store_line(to, load_line(from, where).w, where); });
}
inline void commit_copies() {
  emulator::commit_copies();
}
template <int N>
void wait_for_copies() {
  emulator::wait_for_copies(N);
}

template <typename T>
Words<4> load_shared(const emulator::Shared<T>& p, emulator::At at) {
  return load_line(p + at.index, false, at.where);
}
inline void store_four(const emulator::Shared<float>& to, const Floats<4>& v,
                       emulator::Where where = {}) {
  store_line(to, v.v, where);
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

template <typename T>
float half_of(uint word, uint which) {
  return float(std::bit_cast<T>(uint16_t(word >> 16 * which)));
}

// a: rows g and g + 8, columns 2 t and 2 t + 1, then the same 8 columns further; b: rows 2 t and
// 2 t + 1 of column g, then 8 rows further; c: rows g and g + 8 of columns 2 t and 2 t + 1. The sum
// begins with c; on the device its order is unknown.
template <typename T>
Floats<4> multiply_halves(Floats<4> c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1,
                          emulator::Where where = {}) {
  const uint words[6] = {a0, a1, a2, a3, b0, b1}, own = emulator::lane();
  const auto lanes = emulator::exchange(words, 6, where);
  for (uint k = 0; k < 16; ++k) {
    const uint t = k % 8 / 2, half = k / 8, odd = k % 2;
    for (uint column = 0; column < 2; ++column) {
      const float b = half_of<T>(lanes[(own % 4 * 2 + column) * 4 + t][4 + half], odd);
      for (uint row = 0; row < 2; ++row) {
        const float a = half_of<T>(lanes[own / 4 * 4 + t][2 * half + row], odd);
        c.v[2 * row + column] += a * b;
      }
    }
  }
  return c;
}

template <typename T>
uint two_halves(float a, float b) {
  return std::bit_cast<uint16_t>(T(a)) | uint(std::bit_cast<uint16_t>(T(b))) << 16;
}
inline uint transposed(uint halves, emulator::Where where = {}) {
  const uint own = emulator::lane(), column = own / 4, first = own % 4 * 2;
  const auto lanes = emulator::exchange(&halves, 1, where);
  const auto element = [&](uint row) {
    return lanes[4 * row + column / 2][0] >> column % 2 * 16 & 65535u;
  };
  return element(first) | element(first + 1) << 16;
}
template <typename T>
void store_turned(const emulator::Shared<T>& p, const Words<4>& w, emulator::Where where = {}) {
  const uint own = emulator::lane(), column = own % 8;
  const auto lanes = emulator::exchange(w.w, 4, where);
  uint16_t halves[8];
  for (uint row = 0; row < 8; ++row)
    halves[row] = uint16_t(lanes[4 * row + column / 2][own / 8] >> column % 2 * 16);
  store_line(p, halves, where);
}

inline void tiles_written() {}
inline void begin_products() {}
inline void wait_for_products() {}
template <int N>
void settle(Floats<N>&) {}

// Element (row, column) of a tile at p, whose rows have 64 halves. Keeps the 16 bytes read last.
template <typename T>
class SwizzledTile {
 public:
  SwizzledTile(const emulator::Shared<T>& p, emulator::Where where) : p_(p), where_(where) {}
  float at(uint row, uint column) {
    int64_t byte = p_.offset() * 2 + row * 128 + column * 2;
    byte ^= (byte >> 7 & 7) << 4;
    const int64_t line = byte / 16;
    if (line != line_) words_ = load_line(emulator::Shared<T>(p_.block(), line * 8), true, where_);
    line_ = line;
    return half_of<T>(words_.w[byte % 16 / 4], byte / 2 % 2);
  }

 private:
  emulator::Shared<T> p_;
  emulator::Where where_;
  int64_t line_ = -1;
  Words<4> words_ = {};
};
// The sum begins with c; on the device its order is unknown.
template <typename T, int N, bool TURNED>
void multiply_tiles(Floats<N / 2>& c, const emulator::Shared<T>& a, const emulator::Shared<T>& b,
                    emulator::Where where = {}) {
  const uint lane = emulator::lane(), warp = emulator::simdgroup() % 4;
  float first[2][16];
  for (uint r = 0; r < 2; ++r) {
    SwizzledTile<T> tile(a, where);
    const uint row = 16 * warp + lane / 4 + 8 * r;
    for (uint k = 0; k < 16; ++k) first[r][k] = TURNED ? tile.at(k, row) : tile.at(row, k);
  }
  for (uint j = 0; j < N / 4; ++j) {
    SwizzledTile<T> tile(b, where);
    const uint column = j / 2 * 8 + lane % 4 * 2 + j % 2;
    for (uint k = 0; k < 16; ++k)
      for (uint r = 0; r < 2; ++r)
        c.v[j / 2 * 4 + 2 * r + j % 2] += first[r][k] * tile.at(column, k);
  }
}

inline void cluster_arrive(emulator::Where where = {}) {
  emulator::cluster_arrive(where);
}
inline void cluster_wait(emulator::Where where = {}) {
  emulator::cluster_wait(where);
}

// The bytes that have come from the cluster's blocks.
using Arrivals = uint64_t;
inline void expect_parts(const emulator::Shared<Arrivals>& arrivals, uint bytes,
                         emulator::Where where = {}) {
  arrivals.block().expect(bytes, where);
}
// N floats at p, aligned to all of them, in the shared memory of the cluster's block `rank`, whose
// arrivals count them.
template <int N>
void send_part(const emulator::Shared<float>& p, const emulator::Shared<Arrivals>& arrivals,
               uint rank, Floats<N> v, emulator::Where where = {}) {
  if (p.offset() % N != 0) emulator::fail(where, "misaligned part");
  arrivals.block().of_rank(rank, where).arrive(4 * N, where);
  emulator::SharedBlock& there = p.block().of_rank(rank, where);
  for (int i = 0; i < N; ++i)
    there.on_write(emulator::At(p.offset() + i, where.file, where.line), 4, true);
  std::memcpy(there.data() + p.offset() * 4, v.v, 4 * N);
}
inline void wait_for_parts(const emulator::Shared<Arrivals>& arrivals, emulator::Where where = {}) {
  emulator::wait_for_parts(arrivals.block(), where);
}
