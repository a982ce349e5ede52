// Vectors wider than a register (src/cpu/lanes.h) against plain loops, with all lanes different.
// This file is compiled for the plainest processor, so that a vector is a pair of pairs.
#include "cpu/lanes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

static_assert(kIsPair<f32x16> && kIsPair<f32x16::Half> && sizeof(f32x16) == 64);

f32x16 floats(float first, float step) {
  return from_lanes<f32x16>([&](int l) { return first + step * float(l * l); });
}
u32x16 words(uint32_t factor) {
  return from_lanes<u32x16>([&](int l) { return factor * uint32_t(l + 1); });
}

// f(l) in every lane l.
template <class V, class F>
void expect_lanes(V v, F f) {
  for (int l = 0; l < kLanesOf<V>; ++l) EXPECT_EQ(v[l], f(l)) << "lane " << l;
}

TEST(Lanes, FloatOperationsGoLaneByLane) {
  const f32x16 a = floats(-7.5f, 0.37f), b = floats(3.25f, -0.11f);
  expect_lanes(a + b, [&](int l) { return a[l] + b[l]; });
  expect_lanes(a - b, [&](int l) { return a[l] - b[l]; });
  expect_lanes(a * b, [&](int l) { return a[l] * b[l]; });
  expect_lanes(a / b, [&](int l) { return a[l] / b[l]; });
  expect_lanes(-a, [&](int l) { return -a[l]; });
  expect_lanes(2.0f - a * 3.0f, [&](int l) { return 2.0f - a[l] * 3.0f; });
  expect_lanes(fused(a, b, a), [&](int l) { return std::fmaf(a[l], b[l], a[l]); });
}

TEST(Lanes, IntegerOperationsGoLaneByLane) {
  const u32x16 a = words(0x9e3779b9u), b = words(0x85ebca6bu);
  expect_lanes(a & b, [&](int l) { return a[l] & b[l]; });
  expect_lanes(a | b, [&](int l) { return a[l] | b[l]; });
  expect_lanes(a ^ b, [&](int l) { return a[l] ^ b[l]; });
  expect_lanes(a << 7, [&](int l) { return a[l] << 7; });
  expect_lanes(a >> 7, [&](int l) { return a[l] >> 7; });
  expect_lanes(cast<i32x16>(a) >> 7, [&](int l) { return int32_t(a[l]) >> 7; });
  u32x16 sum = a;
  sum += b;
  expect_lanes(sum, [&](int l) { return a[l] + b[l]; });
}

TEST(Lanes, ComparisonsSelectAndLarger) {
  const f32x16 a = floats(-7.5f, 0.37f), b = floats(30.0f, -0.4f);
  expect_lanes(a < b, [&](int l) { return a[l] < b[l] ? -1 : 0; });
  expect_lanes(a >= b, [&](int l) { return a[l] >= b[l] ? -1 : 0; });
  expect_lanes(a == a, [&](int) { return -1; });
  expect_lanes(a != a, [&](int) { return 0; });
  expect_lanes(select(a > b, a, b * 2.0f), [&](int l) { return a[l] > b[l] ? a[l] : b[l] * 2; });
  expect_lanes(larger(a, b), [&](int l) { return a[l] > b[l] ? a[l] : b[l]; });
}

TEST(Lanes, ConversionsAndMemory) {
  const u32x16 a = words(0x01234567u);
  expect_lanes(cast<u8x64>(a), [&](int i) { return uint8_t(a[i / 4] >> 8 * (i % 4)); });
  expect_lanes(convert<u16x16>(a), [&](int l) { return uint16_t(a[l]); });
  expect_lanes(convert<f32x16>(cast<i32x16>(a)), [&](int l) { return float(int32_t(a[l])); });
  uint32_t memory[kLanes];
  store(memory, a);
  expect_lanes(load<u32x16>(memory), [&](int l) { return a[l]; });
  for (int l = 0; l < kLanes; ++l) EXPECT_EQ(memory[l], a[l]);
}

TEST(Lanes, TheSumIsATreeOfHalves) {
  const f32x16 v = floats(1.0f, 0x1.234568p-9f);
  float sums[kLanes];
  store(sums, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int l = 0; l < n; ++l) sums[l] += sums[l + n];
  EXPECT_EQ(sum_lanes(v), sums[0]);
}

// Nothing behind the first n is read (the copy ends there) or written.
template <class V>
void check_first(int n) {
  using Lane = LaneOf<V>;
  constexpr int kCount = kLanesOf<V>;
  auto* from = new Lane[n];
  Lane to[kCount];
  for (int l = 0; l < n; ++l) from[l] = Lane(3 * l + 129);
  const V v = load_first<V>(from, n);
  expect_lanes(v, [&](int l) { return l < n ? from[l] : Lane(0); });
  for (Lane& lane : to) lane = Lane(77);
  store_first(to, n, v);
  for (int l = 0; l < kCount; ++l) EXPECT_EQ(to[l], l < n ? from[l] : Lane(77)) << l;
  delete[] from;
}
TEST(Lanes, TheFirstFewAndNoMore) {
  for (int n = 0; n <= 16; ++n) {
    check_first<f32x16>(n);
    check_first<u16x16>(n);
    check_first<u8x16>(n);
  }
  for (int n = 0; n <= 64; ++n) check_first<u8x64>(n);
  // As AVX2 has them: sixteen bytes in one register.
  using Register = VectorOf<uint8_t, 16, 1>::type;
  for (int n = 0; n <= 16; ++n) check_first<Register>(n);
}

TEST(Lanes, TablesAndSpread) {
  float table[kLanes];
  store(table, floats(-7.5f, 0.37f));
  const i32x16 index = from_lanes<i32x16>([](int l) { return (l * 7 + 3) % 16 + 16 * l; });
  expect_lanes(lookup(table, index), [&](int l) { return table[(l * 7 + 3) % 16]; });
  constexpr int kCount = kLanesOf<Part<f32x16>>;
  for (int first = 0; first < kLanes; first += kCount) {
    expect_lanes(spread<2>(table, first), [&](int l) { return table[(first + l) / 2]; });
    expect_lanes(spread<4>(table, first), [&](int l) { return table[(first + l) / 4]; });
    expect_lanes(spread<8>(table, first), [&](int l) { return table[(first + l) / 8]; });
  }
}

}  // namespace
}  // namespace moefuse::cpu
