// CUDA's greedy sampling in the emulator, against the plain search.
#include "tensor_kernels.h"
// The texts come first.
#include "harness.h"

namespace {

using namespace harness;

template <typename Type, int Columns>
struct Of {
  using T = Type;
  static constexpr int N = Columns, PARTS = (Columns + 2047) / 2048;
};

template <typename P>
std::vector<uint> sampled(const std::vector<typename P::T>& logits, Order order) {
  const uint rows = logits.size() / P::N;
  Buffer<typename P::T> x(logits);
  auto tops = Buffer<uint>::output(rows * P::PARTS);
  auto places = Buffer<uint>::output(rows * P::PARTS);
  auto token = Buffer<uint>::output(rows);
  kernels::sample_greedy_parts<P> first{x, tops, places};
  kernels::sample_greedy<P> second{tops, places, token};
  check_sizes(first, {.rows = rows});
  check_sizes(second, {.rows = rows});
  emulator::dispatch({P::PARTS, rows, 1}, 256, order, [&] { first(); });
  emulator::dispatch({rows, 1, 1}, 32, order, [&] { second(); });
  EXPECT_EQ(token.unwritten(), 0u);
  return token.values();
}

// As MLX's argmax has it on CUDA: what is not a number is larger than all.
template <typename T>
uint first_of_largest_in(const T* row, uint n) {
  uint place = 0;
  for (uint i = 0; i < n; ++i) {
    if (std::isnan(float(row[i]))) return i;
    if (float(row[i]) > float(row[place])) place = i;
  }
  return place;
}

template <typename P>
void expect_first_of_largest(const std::vector<typename P::T>& logits) {
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    const auto tokens = sampled<P>(logits, order);
    for (size_t row = 0; row < tokens.size(); ++row)
      EXPECT_EQ(tokens[row], first_of_largest_in(logits.data() + row * P::N, P::N)) << row;
  }
}

template <typename P>
class SampleGreedy : public testing::Test {};
using Shapes = testing::Types<Of<float, 1>, Of<float, 7>, Of<bfloat16_t, 2048>, Of<float16_t, 2049>,
                              Of<float, 70000>>;
TYPED_TEST_SUITE(SampleGreedy, Shapes);

// bfloat16 has so few numbers that most rows have equal ones.
TYPED_TEST(SampleGreedy, RandomRows) {
  using T = typename TypeParam::T;
  expect_first_of_largest<TypeParam>(uniform_vector<T>(4 * TypeParam::N, -9.0f, 9.0f));
}

TYPED_TEST(SampleGreedy, EachPlaceOnItsOwn) {
  using T = typename TypeParam::T;
  constexpr uint kN = TypeParam::N;
  for (uint at : {0u, 1u, 31u, 255u, 256u, 2047u, 2048u, kN - 2, kN - 1}) {
    if (at >= kN) continue;
    std::vector<T> row(kN, T(-INFINITY));
    row[at] = T(-3.0f);
    EXPECT_EQ(sampled<TypeParam>(row, Order::forward)[0], at);
    if (at + 1 < kN) row[kN - 1] = T(-3.0f);  // an equal one later
    EXPECT_EQ(sampled<TypeParam>(row, Order::shuffled)[0], at);
  }
}

TYPED_TEST(SampleGreedy, WhatIsNoNumberIsTheLargest) {
  using T = typename TypeParam::T;
  constexpr uint kN = TypeParam::N;
  std::vector<T> rows = uniform_vector<T>(4 * kN, -9.0f, 9.0f);
  for (uint i = 0; i < kN; ++i) {
    if (i % 3 == 1) rows[i] = T(NAN);
    rows[kN + i] = T(NAN);
    rows[2 * kN + i] = T(-INFINITY);
    rows[3 * kN + i] = T(i % 2 ? 0.0f : -0.0f);
  }
  expect_first_of_largest<TypeParam>(rows);
}

}  // namespace
