// Random quantised data, running error analysis in fp64, and runs of a kernel in every lane order.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "kernels.h"

namespace harness {

using emulator::Buffer;
using emulator::Order;
using emulator::Uint3;

// ---- fp64 value and a bound on the error of what the kernel holds instead ----
constexpr double kUnit = 0x1p-24;  // largest relative error of one rounding to fp32

template <typename T>
constexpr double unit() {
  if constexpr (std::is_same_v<T, float>) return kUnit;
  if constexpr (std::is_same_v<T, bfloat16_t>) return 0x1p-8;
  return 0x1p-11;
}
template <typename T>
constexpr double tiny() {  // half the spacing of subnormal numbers
  return std::is_same_v<T, float16_t> ? 0x1p-25 : 0x1p-127;
}

struct Approx {
  double value = 0.0, error = 0.0;
};

// Where the whole interval rounds to one half-precision number, that is the number, without error.
// (Not so in fp32, where a kernel may fuse or reorder what is written here as separate steps.)
template <typename T>
Approx round_to(Approx a) {
  if (std::isinf(a.value)) return {a.value, 0.0};  // an overflow of T on the way is exact too
  const T low = T(static_cast<float>(a.value - a.error));
  const T high = T(static_cast<float>(a.value + a.error));
  const bool half = !std::is_same_v<T, float>;
  if (half && static_cast<float>(low) == static_cast<float>(high))
    return {static_cast<float>(low), 0.0};
  a.error += unit<T>() * (std::abs(a.value) + a.error) + tiny<T>();
  return a;
}
inline Approx fp32(Approx a) {
  return round_to<float>(a);
}
inline Approx add(Approx a, Approx b) {
  return fp32({a.value + b.value, a.error + b.error});
}
inline Approx mul(Approx a, Approx b) {
  return fp32({a.value * b.value,
               std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error});
}
inline Approx div(Approx a, Approx b) {
  const double low = std::abs(b.value) - b.error;
  EXPECT_GT(low, 0.0);
  const double v = a.value / b.value;
  return fp32({v, (a.error + std::abs(v) * b.error) / low});
}
// exp_fp32: 2 ulp beside the argument's error; below -87.3 it gives 0.
inline Approx exp(Approx a) {
  const double v = std::exp(a.value);
  return {v, v * (std::expm1(a.error) + 8 * kUnit) + 2e-38};
}
template <typename T>
Approx sigmoid(Approx x) {
  const bool negative = x.value < 0;
  const Approx e = round_to<T>(exp({std::abs(x.value), x.error}));
  const Approx y = round_to<T>(div({1, 0}, round_to<T>(add({1, 0}, e))));
  return negative ? y : round_to<T>(add({1, 0}, {-y.value, y.error}));
}
template <typename T, bool STEPS>
Approx swiglu(Approx g, Approx u) {
  if constexpr (STEPS) {
    g = round_to<T>(g);
    return round_to<T>(mul(round_to<T>(mul(g, sigmoid<T>(g))), round_to<T>(u)));
  } else {
    const Approx e = exp({-std::abs(g.value), g.error});
    const Approx s = div(g.value < 0 ? e : Approx{1, 0}, add({1, 0}, e));
    return mul(mul(g, s), u);
  }
}

// ---- data ----
inline std::mt19937& random_engine() {
  static std::mt19937 engine(20261123);
  return engine;
}
inline float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random_engine());
}
template <typename T>
std::vector<T> uniform_vector(size_t n, float low, float high) {
  std::vector<T> v(n);
  for (T& x : v) x = T(uniform(low, high));
  return v;
}

// A stack of matrices in MLX's affine layout.
template <typename T>
struct Stack {
  size_t rows, cols;
  int bits, group;
  Buffer<uint> weight;
  Buffer<T> scales, biases;

  Stack(size_t experts, size_t rows, size_t cols, int bits, int group)
      : rows(rows),
        cols(cols),
        bits(bits),
        group(group),
        weight(words(experts * rows * cols * bits / 32)),
        scales(uniform_vector<T>(experts * rows * cols / group, 0.002f, 0.01f)),
        biases(uniform_vector<T>(experts * rows * cols / group, -0.06f, 0.0f)) {}

  static std::vector<uint> words(size_t n) {
    std::vector<uint> w(n);
    for (uint& x : w) x = static_cast<uint>(random_engine()());
    return w;
  }
  double scale(size_t row, size_t k) const {
    return static_cast<float>(scales.values()[row * (cols / group) + k / group]);
  }
  double bias(size_t row, size_t k) const {
    return static_cast<float>(biases.values()[row * (cols / group) + k / group]);
  }
  double quant(size_t row, size_t k) const {
    const uint word = weight.values()[row * (cols * bits / 32) + k * bits / 32];
    return word >> (k * bits % 32) & ((1u << bits) - 1u);
  }

  // Row `row` of the stack times x. A term passes at most 9 roundings within its eight values, two
  // for each of its lane's steps, and the 5 of the butterfly.
  Approx dot(size_t row, const std::function<Approx(size_t)>& x) const {
    Approx sum;
    double magnitude = 0.0;
    for (size_t k = 0; k < cols; ++k) {
      const Approx xk = x(k);
      const double w = scale(row, k) * quant(row, k) + bias(row, k);
      const double size = std::abs(scale(row, k)) * quant(row, k) + std::abs(bias(row, k));
      sum.value += w * xk.value;
      sum.error += size * xk.error;
      magnitude += size * (std::abs(xk.value) + xk.error);
    }
    const double n = 9 + 2 * std::ceil(cols / 256.0) + 5;
    sum.error += 1.01 * n * kUnit * magnitude;
    return sum;
  }
};

// ---- runs ----
template <typename T>
void expect_same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(T)), 0)
      << "the result depends on the order in which lanes run";
}

template <typename T>
void expect_written(const Buffer<T>& b) {
  EXPECT_EQ(b.unwritten(), 0u) << "elements of an output that no thread wrote";
}

// run(order) launches and returns a tuple of output buffers: bit for bit the same in every order,
// every element written.
template <typename Run>
auto in_every_order(const Run& run) {
  auto forward = run(Order::forward), reverse = run(Order::reverse), mixed = run(Order::shuffled);
  auto check = [](auto&... a) {
    return [&](auto&... b) { (expect_same_bytes(a.values(), b.values()), ...); };
  };
  std::apply(
      [&](auto&... a) {
        (expect_written(a), ...);
        std::apply(check(a...), reverse);
        std::apply(check(a...), mixed);
      },
      forward);
  return forward;
}

template <typename K>
void launch(const K& kernel, const kernels::Sizes& sizes, Uint3 groups, uint threads, Order order) {
  check_sizes(kernel, sizes);
  emulator::dispatch(groups, threads, order, [&kernel] { kernel(); });
}

template <typename T>
void expect_near(const T& got, const Approx& want, const char* what, size_t at) {
  const double difference = std::abs(static_cast<double>(static_cast<float>(got)) - want.value);
  ASSERT_FALSE(std::isnan(difference)) << what << "[" << at << "] is NaN";
  ASSERT_LE(difference, want.error) << what << "[" << at << "], wanted " << want.value;
}

inline uint blocks(uint n, uint size) {
  return (n + size - 1) / size;
}

}  // namespace harness
