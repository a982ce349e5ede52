// What differs between instruction sets: the dot product of bytes, the fused multiply-add, a
// permutation, masked loads. Everything here gives the same bits on every one of them. The
// anonymous namespace keeps the linker from merging functions that were compiled for different
// processors.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/lanes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace moefuse::cpu {
namespace {

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

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kHasByteDots = true;
// acc[l] += sum of w[4l + i] * x[4l + i], i in 0..3, exactly.
[[maybe_unused]] MOEFUSE_INLINE Part<i32x16> dot_bytes(Part<i32x16> acc, Part<u8x64> w,
                                                       Part<s8x64> x) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#else
  // sdot takes signed bytes: w - 128 is one, and 128 * (sum of x) is added back.
  const int8x16_t bytes = (int8x16_t)x;
  const int8x16_t centred = vreinterpretq_s8_u8(veorq_u8((uint8x16_t)w, vdupq_n_u8(128)));
  const int32x4_t total = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), bytes);
  const int32x4_t sum = vdotq_s32((int32x4_t)acc, centred, bytes);
  return (Part<i32x16>)vaddq_s32(sum, vshlq_n_s32(total, 7));
#endif
}
#else
constexpr bool kHasByteDots = false;
// w[2l] * x[2l] + w[2l + 1] * x[2l + 1], exactly.
[[maybe_unused]] MOEFUSE_INLINE Part<i32x16> dot_pairs(Part<s16x32> w, Part<s16x32> x) {
#if defined(__AVX2__)
  return (Part<i32x16>)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
  return (Part<i32x16>)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
  return from_lanes<Part<i32x16>>(
      [&](int l) { return w[2 * l] * x[2 * l] + w[2 * l + 1] * x[2 * l + 1]; });
#endif
}
#endif

// a * b + c, rounded once.
[[maybe_unused]] MOEFUSE_INLINE Part<f32x16> fused(Part<f32x16> a, Part<f32x16> b, Part<f32x16> c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Part<f32x16>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Part<f32x16>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return from_lanes<Part<f32x16>>([&](int l) { return __builtin_fmaf(a[l], b[l], c[l]); });
#endif
}

// table[index[l]]; only the low four bits of an index count.
[[maybe_unused]] MOEFUSE_INLINE Part<f32x16> lookup(const float (&table)[kLanes],
                                                    Part<i32x16> index) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  const __m256 is_high = (__m256)_mm256_slli_epi32((__m256i)index, 28);  // bit 3 as the sign
  return (Part<f32x16>)_mm256_blendv_ps(low, high, is_high);
#else
  return from_lanes<Part<f32x16>>([&](int l) { return table[index[l] & 15]; });
#endif
}

// table[i] for each byte i, which is below 16.
[[maybe_unused]] MOEFUSE_INLINE Part<u8x64> lookup(const uint8_t (&table)[16], Part<u8x64> index) {
#if defined(__AVX512BW__)
  const __m128i entries = _mm_loadu_si128((const __m128i*)table);
  return (u8x64)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), (__m512i)index);
#elif defined(__AVX2__)
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return (Part<u8x64>)_mm256_shuffle_epi8(entries, (__m256i)index);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Part<u8x64>)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index);
#else
  return from_lanes<Part<u8x64>>([&](int l) { return table[index[l]]; });
#endif
}

#if defined(__ARM_FEATURE_DOTPROD) || defined(__clang__)
using Float16 = __fp16;
#elif !defined(__F16C__)
using Float16 = _Float16;
#endif
[[maybe_unused]] inline float half_to_float(uint16_t v) {
#if defined(__F16C__)
  return _cvtsh_ss(v);
#else
  Float16 half;
  memcpy(&half, &v, sizeof half);
  return static_cast<float>(half);
#endif
}

[[maybe_unused]] MOEFUSE_INLINE Part<f32x16> widen_half(Part<u16x16> v) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
#elif defined(__F16C__)
  return (Part<f32x16>)_mm256_cvtph_ps((__m128i)v);
#else
  return from_lanes<Part<f32x16>>([&](int l) { return half_to_float(v[l]); });
#endif
}

#if !defined(__F16C__)
[[maybe_unused]] inline uint16_t float_to_half(float v) {
  const auto half = static_cast<Float16>(v);
  uint16_t bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
#endif

// Rounds to nearest even; a NaN becomes 0x7d00, as in MLX.
[[maybe_unused]] MOEFUSE_INLINE Part<u16x16> narrow_half(Part<f32x16> v) {
  using Half = Part<u16x16>;
#if defined(__AVX512F__)
  Half out;
  for (int i = 0; i < 2; ++i) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps((const float*)&v + 8 * i),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy((char*)&out + 16 * i, &half, 16);
  }
#elif defined(__F16C__)
  const Half out = (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Half out = from_lanes<Half>([&](int l) { return float_to_half(v[l]); });
#endif
  const Half nan = Half{} + 0x7d00;
  return __builtin_convertvector(v != v, Half) ? nan : out;
}

[[maybe_unused]] MOEFUSE_INLINE Part<f32x16> widen_bfloat16(Part<u16x16> v) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v), 16);
#elif defined(__AVX2__)
  return (Part<f32x16>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
  return (Part<f32x16>)(convert<Part<u32x16>>(v) << 16);
#endif
}

// Rounds to nearest even; a NaN becomes 0x7fc0, as in MLX.
[[maybe_unused]] MOEFUSE_INLINE u16x16 narrow_bfloat16(f32x16 v) {
  const u32x16 bits = as_bits(v);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return convert<u16x16>(select(v != v, u32x16{} + 0x7fc0u, rounded));
}

// What is written above for one register goes over the halves of a Pair.
template <class V>
MOEFUSE_INLINE Pair<V> fused(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
}
template <class V>
MOEFUSE_INLINE auto lookup(const float (&table)[kLanes], Pair<V> index) {
  return Pair{lookup(table, index.low), lookup(table, index.high)};
}
template <class V>
MOEFUSE_INLINE auto widen_half(Pair<V> v) {
  return Pair{widen_half(v.low), widen_half(v.high)};
}
template <class V>
MOEFUSE_INLINE auto narrow_half(Pair<V> v) {
  return Pair{narrow_half(v.low), narrow_half(v.high)};
}
template <class V>
MOEFUSE_INLINE auto widen_bfloat16(Pair<V> v) {
  return Pair{widen_bfloat16(v.low), widen_bfloat16(v.high)};
}

// Lane l of a register is p[(first + l) / kRepeat], `first` a multiple of its lanes.
template <int kRepeat>
MOEFUSE_INLINE Part<f32x16> spread(const float* p, int first) {
  const float* from = p + first / kRepeat;
  if constexpr (kRepeat >= kLanesOf<Part<f32x16>>) return splat_to<Part<f32x16>>(*from);
#if defined(__AVX2__) && !defined(__AVX512F__)
  // No more than is wanted: a load of parts of two stores would wait for both.
  const __m128 some =
      kRepeat == 4 ? _mm_castpd_ps(_mm_load_sd((const double*)from)) : _mm_loadu_ps(from);
  const auto index = from_lanes<Part<i32x16>>([](int l) { return l / kRepeat; });
  return (Part<f32x16>)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(some), (__m256i)index);
#else
  return from_lanes<Part<f32x16>>([&](int l) { return from[l / kRepeat]; });
#endif
}

// `bytes` < 16 from p, the rest zero, without a detour through memory: a vector read from where
// bytes were just stored waits for them.
[[maybe_unused]] inline u64x2 load_few(const char* p, int bytes) {
  const auto overlap = [&]<class T>(T, int n) {  // sizeof(T) <= n < 2 * sizeof(T)
    T low, high;
    memcpy(&low, p, sizeof low);
    memcpy(&high, p + n - sizeof high, sizeof high);
    return u64x2{low, high};
  };
  if (bytes > 8) {
    const u64x2 v = overlap(uint64_t{}, bytes);
    return u64x2{v[0], v[1] >> (128 - 8 * bytes)};
  }
  if (bytes >= 4) {
    const u64x2 v = overlap(uint32_t{}, bytes);
    return u64x2{v[0] | v[1] << (8 * bytes - 32), 0};
  }
  uint64_t v = 0;
  for (int i = bytes; i-- > 0;) v = v << 8 | (uint8_t)p[i];
  return u64x2{v, 0};
}

// The first n lanes from p, the rest zero, and back; neither touches anything behind them.
template <class V>
MOEFUSE_INLINE V load_first(const LaneOf<V>* p, int n) {
  if (n >= kLanesOf<V>) return load<V>(p);
  if constexpr (kIsPair<V>) {
    using Half = typename V::Half;
    constexpr int kHalf = kLanesOf<Half>;
    return {load_first<Half>(p, n), n > kHalf ? load_first<Half>(p + kHalf, n - kHalf) : Half{}};
  } else if constexpr (sizeof(V) == 16) {
    return (V)load_few((const char*)p, n * sizeof *p);
  } else {
    LaneOf<V> lanes[kLanesOf<V>] = {};
    memcpy(lanes, p, n * sizeof *p);
    return load<V>(lanes);
  }
}
template <class V>
MOEFUSE_INLINE void store_first(LaneOf<V>* p, int n, V v) {
  if (n == kLanesOf<V>) return store(p, v);
  LaneOf<V> lanes[kLanesOf<V>];
  store(lanes, v);
  memcpy(p, lanes, n * sizeof *p);
}

// The same of 16 or 64 bytes.
template <class V>
MOEFUSE_INLINE V load_bytes(const void* p, int n) {
#if defined(__AVX512VL__) && defined(__AVX512BW__)
  if constexpr (sizeof(V) == 16)
    return (V)_mm_maskz_loadu_epi8((1u << n) - 1, p);
  else
    return (V)_mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p);
#else
  return load_first<V>((const uint8_t*)p, n);
#endif
}

// Elements [first, first + n) of an array, n <= 16, as floats; missing lanes are zero.
[[maybe_unused]] MOEFUSE_INLINE f32x16 load_floats(const void* array, Dtype dtype, int64_t first,
                                                   int n) {
  if (dtype == Dtype::float32) {
    const float* from = (const float*)array + first;
#if defined(__AVX512F__)
    return (f32x16)_mm512_maskz_loadu_ps((1u << n) - 1, from);
#else
    return load_first<f32x16>(from, n);
#endif
  }
  const uint16_t* from = (const uint16_t*)array + first;
#if defined(__AVX512VL__) && defined(__AVX512BW__)
  const u16x16 v = (u16x16)_mm256_maskz_loadu_epi16((1u << n) - 1, from);
#else
  const u16x16 v = load_first<u16x16>(from, n);
#endif
  return dtype == Dtype::bfloat16 ? widen_bfloat16(v) : widen_half(v);
}

[[maybe_unused]] MOEFUSE_INLINE void store_floats(void* array, Dtype dtype, int64_t first, int n,
                                                  f32x16 v) {
  if (dtype == Dtype::float32) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps((float*)array + first, (1u << n) - 1, (__m512)v);
#else
    store_first((float*)array + first, n, v);
#endif
    return;
  }
  store_first((uint16_t*)array + first, n,
              dtype == Dtype::bfloat16 ? narrow_bfloat16(v) : narrow_half(v));
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
  v[0] = from_lanes<f32x16>([&](int i) { return sum_lanes(v[i]); });
#endif
}

}  // namespace
}  // namespace moefuse::cpu
