// Sixteen lanes of a vector, written once, so that every build computes the same bits. With
// AVX-512 they are one of the compiler's vectors. Elsewhere they are a Pair of halves, down to the
// processor's registers: GCC keeps a vector wider than a register in memory.
//
// Everything here has internal linkage. The file is compiled with different target flags in
// different objects, and the linker must not merge an AVX-512 copy into the plain build.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace moefuse::cpu {
namespace {

#define MOEFUSE_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kRegisters = 1;  // that sixteen floats take
#elif defined(__AVX2__)
constexpr int kRegisters = 2;
#else
constexpr int kRegisters = 4;
#endif

template <class V>
constexpr bool kIsPair = requires {
  typename V::Half;
};
template <class V>
using LaneOf = std::remove_cvref_t<decltype(std::declval<const V&>()[0])>;
template <class V>
constexpr int kLanesOf = sizeof(V) / sizeof(LaneOf<V>);

template <class V>
struct Pair;
template <class T, int kCount, int kParts = kRegisters>
struct VectorOf {
  using type = Pair<typename VectorOf<T, kCount / 2, kParts / 2>::type>;
};
template <class T, int kCount>
struct VectorOf<T, kCount, 1> {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <class V>  // what a comparison of 32-bit lanes gives: -1 and 0
using MaskOf = typename VectorOf<int32_t, kLanesOf<V>, kRegisters * kLanesOf<V> / kLanes>::type;

// All lanes v.
template <class V>
MOEFUSE_INLINE V splat_to(LaneOf<V> v) {
  if constexpr (kIsPair<V>)
    return {splat_to<typename V::Half>(v), splat_to<typename V::Half>(v)};
  else
    return v - V{};
}

// Computes as the compiler's vectors do. The halves have names: an array of them would be stored
// wherever a loop indexes it.
template <class V>
struct Pair {
  using Half = V;
  V low, high;

  Pair() = default;
  MOEFUSE_INLINE Pair(V low, V high) : low(low), high(high) {}
  // NOLINTNEXTLINE(google-explicit-constructor): a number stands for a vector of it.
  MOEFUSE_INLINE Pair(LaneOf<V> all) : low(splat_to<V>(all)), high(splat_to<V>(all)) {}
  LaneOf<V> operator[](int l) const { return l < kLanesOf<V> ? low[l] : high[l - kLanesOf<V>]; }

// NOLINTBEGIN(bugprone-macro-parentheses): `Pair& operator` is no expression.
#define MOEFUSE_OPERATOR(op)                                    \
  friend MOEFUSE_INLINE Pair operator op(Pair a, Pair b) {      \
    return {a.low op b.low, a.high op b.high};                  \
  }                                                             \
  friend MOEFUSE_INLINE Pair& operator op##=(Pair& a, Pair b) { \
    return a = a op b;                                          \
  }
#define MOEFUSE_COMPARISON(op)                                                          \
  friend MOEFUSE_INLINE auto operator op(Pair a, Pair b) {                              \
    return Pair<MaskOf<V>>{(MaskOf<V>)(a.low op b.low), (MaskOf<V>)(a.high op b.high)}; \
  }
  // NOLINTEND(bugprone-macro-parentheses)
  MOEFUSE_OPERATOR(+)
  MOEFUSE_OPERATOR(-)
  MOEFUSE_OPERATOR(*)
  MOEFUSE_OPERATOR(/)
  MOEFUSE_OPERATOR(&)
  MOEFUSE_OPERATOR(|)
  MOEFUSE_OPERATOR(^)
  MOEFUSE_OPERATOR(<<)
  MOEFUSE_OPERATOR(>>)
  MOEFUSE_COMPARISON(==)
  MOEFUSE_COMPARISON(!=)
  MOEFUSE_COMPARISON(<)
  MOEFUSE_COMPARISON(<=)
  MOEFUSE_COMPARISON(>)
  MOEFUSE_COMPARISON(>=)
#undef MOEFUSE_OPERATOR
#undef MOEFUSE_COMPARISON
  friend MOEFUSE_INLINE Pair operator-(Pair a) {
    return {-a.low, -a.high};
  }
};

template <class T, int kCount>
using Vector = typename VectorOf<T, kCount>::type;
using f32x16 = Vector<float, 16>;
using i32x16 = Vector<int32_t, 16>;
using u32x16 = Vector<uint32_t, 16>;
using u16x16 = Vector<uint16_t, 16>;
using u8x16 = Vector<uint8_t, 16>;
using s16x32 = Vector<int16_t, 32>;
using u16x32 = Vector<uint16_t, 32>;
using u8x64 = Vector<uint8_t, 64>;
using s8x64 = Vector<int8_t, 64>;
typedef uint64_t u64x2 __attribute__((vector_size(16)));

// One register of a vector: what an instruction takes.
template <class V>
struct PartOf {
  using type = V;
};
template <class V>
struct PartOf<Pair<V>> : PartOf<V> {};
template <class V>
using Part = typename PartOf<V>::type;

template <int kPart, class V>
MOEFUSE_INLINE auto& part(V& v) {
  if constexpr (kIsPair<V>) {
    constexpr int kHalf = sizeof v.low / sizeof(Part<V>);
    if constexpr (kPart < kHalf)
      return part<kPart>(v.low);
    else
      return part<kPart - kHalf>(v.high);
  } else {
    return v;
  }
}

template <class V>
MOEFUSE_INLINE V load(const void* p) {
  if constexpr (kIsPair<V>) {
    using Half = typename V::Half;
    return {load<Half>(p), load<Half>((const char*)p + sizeof(Half))};
  } else {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class V>
MOEFUSE_INLINE void store(void* p, V v) {
  if constexpr (kIsPair<V>) {
    store(p, v.low);
    store((char*)p + sizeof v.low, v.high);
  } else {
    memcpy(p, &v, sizeof v);
  }
}

// Lane l is f(l), l from `first` on.
template <class V, class F>
MOEFUSE_INLINE V from_lanes(const F& f, int first = 0) {
  if constexpr (kIsPair<V>) {
    using Half = typename V::Half;
    return {from_lanes<Half>(f, first), from_lanes<Half>(f, first + kLanesOf<Half>)};
  } else {
    return [&]<int... l>(std::integer_sequence<int, l...>) __attribute__((always_inline)) {
      return V{f(first + l)...};
    }
    (std::make_integer_sequence<int, kLanesOf<V>>{});
  }
}

// The same bits as lanes of another type, as many bytes.
template <class To, class V>
MOEFUSE_INLINE To cast(V v) {
  if constexpr (kIsPair<V>)
    return {cast<typename To::Half>(v.low), cast<typename To::Half>(v.high)};
  else
    return (To)v;
}

// The same numbers as lanes of another type, as many lanes.
template <class To, class V>
MOEFUSE_INLINE To convert(V v) {
  if constexpr (kIsPair<V>)
    return {convert<typename To::Half>(v.low), convert<typename To::Half>(v.high)};
  else
    return __builtin_convertvector(v, To);
}

// a where the mask's lane is -1, b where it is 0.
template <class Mask, class V>
MOEFUSE_INLINE V select(Mask mask, V a, V b) {
  if constexpr (kIsPair<V>)
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  else
    return mask ? a : b;
}

// a where it is larger than b, else b.
template <class V>
MOEFUSE_INLINE V larger(V a, V b) {
  if constexpr (kIsPair<V>)
    return {larger(a.low, b.low), larger(a.high, b.high)};
  else
    return a > b ? a : b;
}

[[maybe_unused]] MOEFUSE_INLINE f32x16 splat(float v) {
  return splat_to<f32x16>(v);
}
[[maybe_unused]] MOEFUSE_INLINE f32x16 as_float(u32x16 v) {
  return cast<f32x16>(v);
}
[[maybe_unused]] MOEFUSE_INLINE u32x16 as_bits(f32x16 v) {
  return cast<u32x16>(v);
}

// Round to nearest even on bfloat16's grid, kept as float. No test for NaN: the operands are
// bfloat16 values, so a NaN's low half is zero and the carry cannot reach its exponent.
[[maybe_unused]] MOEFUSE_INLINE f32x16 round_bfloat16(f32x16 v) {
  const u32x16 bits = as_bits(v);
  return as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// The sum of the lanes, always as a tree of halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
template <class V>
MOEFUSE_INLINE float sum_lanes(V v) {
  if constexpr (kIsPair<V>) {
    return sum_lanes(v.low + v.high);
  } else if constexpr (kLanesOf<V> == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    typename VectorOf<float, kLanesOf<V> / 2, 1>::type low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return sum_lanes(low + high);
  }
}

}  // namespace
}  // namespace moefuse::cpu
