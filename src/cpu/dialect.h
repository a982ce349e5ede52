// What differs between instruction sets: the dot product of bytes, the fused multiply-add, a
// permutation, masked loads. Everything here gives the same bits on every one of them. The
// anonymous namespace keeps the linker from merging functions that were compiled for different
// processors.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace moefuse::cpu {
namespace {

typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef int8_t s8x64 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class Vector>
inline Vector load(const void* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <int kCount>
struct Count {
  constexpr int operator()() const { return kCount; }
};

// f(Count<0>) to f(Count<kCount - 1>). Sums that a loop indexes, or whose address anybody takes,
// are kept in memory and stored in every turn: here each index is a constant from the start.
template <int kCount, class F>
inline __attribute__((always_inline)) void unrolled(F&& f) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(f);
    f(Count<kCount - 1>{});
  }
}

// acc[l] += sum of w[4l + i] * x[4l + i], i in 0..3, exactly.
[[maybe_unused]] inline i32x16 dot_bytes(i32x16 acc, u8x64 w, s8x64 x) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  // maddubs saturates at 16 bits (255 * 128 * 2 does not fit), so the weights go in two nibbles.
  __m256i part[2], wide[2], bytes[2];
  memcpy(part, &acc, 64);
  memcpy(wide, &w, 64);
  memcpy(bytes, &x, 64);
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i sixteen = _mm256_set1_epi16(16);
  for (int i = 0; i < 2; ++i) {
    __m256i low = _mm256_and_si256(wide[i], nibble);
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(wide[i], 4), nibble);
    __m256i low_sum = _mm256_madd_epi16(_mm256_maddubs_epi16(low, bytes[i]), ones);
    __m256i high_sum = _mm256_madd_epi16(_mm256_maddubs_epi16(high, bytes[i]), sixteen);
    part[i] = _mm256_add_epi32(part[i], _mm256_add_epi32(low_sum, high_sum));
  }
  memcpy(&acc, part, 64);
  return acc;
#elif defined(__ARM_FEATURE_DOTPROD)
  // sdot takes signed bytes: w - 128 is one, and 128 * (sum of x) is added back.
  for (int i = 0; i < 4; ++i) {
    int32x4_t sum = vld1q_s32((const int32_t*)&acc + 4 * i);
    int8x16_t bytes = vld1q_s8((const int8_t*)&x + 16 * i);
    uint8x16_t weights = vld1q_u8((const uint8_t*)&w + 16 * i);
    int8x16_t centred = vreinterpretq_s8_u8(veorq_u8(weights, vdupq_n_u8(128)));
    sum = vdotq_s32(sum, centred, bytes);
    int32x4_t total = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), bytes);
    sum = vaddq_s32(sum, vshlq_n_s32(total, 7));
    vst1q_s32((int32_t*)&acc + 4 * i, sum);
  }
  return acc;
#else
  for (int l = 0; l < kLanes; ++l)
    for (int i = 4 * l; i < 4 * l + 4; ++i) acc[l] += int32_t(w[i]) * x[i];
  return acc;
#endif
}

// a * b + c, rounded once.
[[maybe_unused]] inline f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  for (int l = 0; l < kLanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
#endif
}

// v[index[l]]; only the low four bits of an index count.
[[maybe_unused]] inline f32x16 permute(f32x16 v, i32x16 index) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)v);
#else
  f32x16 out;
  for (int l = 0; l < kLanes; ++l) out[l] = v[index[l] & 15];
  return out;
#endif
}

// The first n <= 64 bytes at p, the rest zero; reads nothing past them.
[[maybe_unused]] inline u8x64 load_bytes(const void* p, int n) {
#if defined(__AVX512BW__)
  return (u8x64)_mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p);
#else
  u8x64 v{};
  memcpy(&v, p, n);
  return v;
#endif
}

// table[i] for each byte i, which is below 16.
[[maybe_unused]] inline u8x64 lookup(const uint8_t (&table)[16], u8x64 index) {
#if defined(__AVX512BW__)
  const __m128i entries = _mm_loadu_si128((const __m128i*)table);
  return (u8x64)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), (__m512i)index);
#elif defined(__AVX2__)
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  for (int i = 0; i < 2; ++i) {
    __m256i part;
    memcpy(&part, (const char*)&index + 32 * i, 32);
    part = _mm256_shuffle_epi8(entries, part);
    memcpy((char*)&index + 32 * i, &part, 32);
  }
  return index;
#elif defined(__ARM_FEATURE_DOTPROD)
  const uint8x16_t entries = vld1q_u8(table);
  for (int i = 0; i < 4; ++i) {
    uint8_t* part = (uint8_t*)&index + 16 * i;
    vst1q_u8(part, vqtbl1q_u8(entries, vld1q_u8(part)));
  }
  return index;
#else
  for (int i = 0; i < 64; ++i) index[i] = table[index[i]];
  return index;
#endif
}

[[maybe_unused]] inline float half_to_float(uint16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v);
#elif defined(__ARM_FEATURE_DOTPROD)
  __fp16 half;
  memcpy(&half, &v, sizeof half);
  return half;
#else
  _Float16 half;
  memcpy(&half, &v, sizeof half);
  return static_cast<float>(half);
#endif
}

[[maybe_unused]] inline f32x16 widen_half(u16x16 v) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
#else
  f32x16 out;
  for (int l = 0; l < kLanes; ++l) out[l] = half_to_float(v[l]);
  return out;
#endif
}

// Rounds to nearest even; a NaN becomes 0x7d00, as in MLX.
[[maybe_unused]] inline u16x16 narrow_half(f32x16 v) {
  u16x16 out;
#if defined(__F16C__)
  for (int i = 0; i < 2; ++i) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps((const float*)&v + 8 * i),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy((char*)&out + 16 * i, &half, 16);
  }
#else
  for (int l = 0; l < kLanes; ++l) {
#if defined(__ARM_FEATURE_DOTPROD)
    const auto half = static_cast<__fp16>(v[l]);
#else
    const auto half = static_cast<_Float16>(v[l]);
#endif
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    out[l] = bits;
  }
#endif
  const u16x16 nan = u16x16{} + 0x7d00;
  return __builtin_convertvector(v != v, u16x16) ? nan : out;
}

[[maybe_unused]] inline f32x16 widen_bfloat16(u16x16 v) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v), 16);
#else
  return as_float(__builtin_convertvector(v, u32x16) << 16);
#endif
}

// Rounds to nearest even; a NaN becomes 0x7fc0, as in MLX.
[[maybe_unused]] inline u16x16 narrow_bfloat16(f32x16 v) {
  const u32x16 bits = as_bits(v);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v != v ? u32x16{} + 0x7fc0u : rounded, u16x16);
}

// Elements [first, first + n) of an array, n <= 16, as floats; missing lanes are zero.
[[maybe_unused]] inline f32x16 load_floats(const void* array, Dtype dtype, int64_t first, int n) {
  if (dtype == Dtype::float32) {
    const float* from = (const float*)array + first;
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_loadu_ps((1u << n) - 1, from);
#else
    f32x16 v{};
    memcpy(&v, from, n == kLanes ? 64 : 4 * n);
    return v;
#endif
  }
  const uint16_t* from = (const uint16_t*)array + first;
  u16x16 v{};
#if defined(__AVX512VL__) && defined(__AVX512BW__)
  v = (u16x16)_mm256_maskz_loadu_epi16((1u << n) - 1, from);
#else
  memcpy(&v, from, n == kLanes ? 32 : 2 * n);
#endif
  return dtype == Dtype::bfloat16 ? widen_bfloat16(v) : widen_half(v);
}

[[maybe_unused]] inline void store_floats(void* array, Dtype dtype, int64_t first, int n,
                                          f32x16 v) {
  if (dtype == Dtype::float32) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps((float*)array + first, (1u << n) - 1, (__m512)v);
#else
    memcpy((float*)array + first, &v, n == kLanes ? 64 : 4 * n);
#endif
    return;
  }
  const u16x16 narrow = dtype == Dtype::bfloat16 ? narrow_bfloat16(v) : narrow_half(v);
  memcpy((uint16_t*)array + first, &narrow, n == kLanes ? 32 : 2 * n);
}

// The sum of the lanes, always as a tree of halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
[[maybe_unused]] inline float sum_lanes(f32x16 v) {
  typedef float f32x8 __attribute__((vector_size(32)));
  typedef float f32x4 __attribute__((vector_size(16)));
  f32x8 low8, high8;
  memcpy(&low8, &v, 32);
  memcpy(&high8, (const char*)&v + 32, 32);
  low8 += high8;
  f32x4 low4, high4;
  memcpy(&low4, &low8, 16);
  memcpy(&high4, (const char*)&low8 + 16, 16);
  low4 += high4;
  return (low4[0] + low4[2]) + (low4[1] + low4[3]);
}

// Replaces v[0] by the sums of the lanes of v[0] to v[15], each in sum_lanes' order.
[[maybe_unused]] inline void sum_lanes16(f32x16* v) {
#if defined(__AVX512F__)
  // Each level adds the halves of two vectors' parts and leaves both in one.
#define MOEFUSE_PARTS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] =
        MOEFUSE_PARTS(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        MOEFUSE_PARTS(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    v[i] =
        MOEFUSE_PARTS(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
        MOEFUSE_PARTS(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    v[i] =
        MOEFUSE_PARTS(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        MOEFUSE_PARTS(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  v[0] = MOEFUSE_PARTS(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         MOEFUSE_PARTS(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#undef MOEFUSE_PARTS
#else
  f32x16 sums{};
  for (int i = 0; i < kLanes; ++i) sums[i] = sum_lanes(v[i]);
  v[0] = sums;
#endif
}

}  // namespace
}  // namespace moefuse::cpu
