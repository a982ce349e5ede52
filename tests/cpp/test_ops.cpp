// The public ops: fp32 modes inside a computed bound of an fp64 oracle, errors that name the
// tensor. Identity with stock MLX in `exact` is tests/python/test_ops.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "dtypes.h"
#include "mlx/mlx.h"
#include "moefuse/ops.h"

namespace moefuse {
namespace {

constexpr double kUnit = 0x1p-24;  // fp32's unit roundoff

// A number and how far the kernel's value may be from it.
struct Bounded {
  double value = 0, bound = 0;
};

// One stack of experts, read back from MLX in the form W = scale * q + bias. That of the fp4 modes
// is the kernels': scale * e2m1 = scale / 2 * (2 * e2m1 + 12) - 6 * scale.
struct Matrix {
  std::vector<uint32_t> words;
  std::vector<float> scales, biases;
  int rows, cols, group_size, bits;
  bool fp4;

  double q(int64_t row, int k) const {
    const int per_word = 32 / bits;
    const auto code =
        words[(row * cols + k) / per_word] >> (k % per_word * bits) & ((1u << bits) - 1);
    return fp4 ? 2 * cpu::e2m1(code) + 12 : code;
  }
};

template <class T>
std::vector<T> read(const mx::array& a, mx::Dtype dtype) {
  auto copy = mx::contiguous(mx::astype(a, dtype));
  copy.eval();
  return {copy.data<T>(), copy.data<T>() + copy.size()};
}
std::vector<float> floats(const mx::array& a) {
  return read<float>(a, mx::float32);
}

struct Problem {
  mx::Dtype dtype;
  int rows, experts, k, hidden, width, group_size, bits;
  std::string mode;
  mx::array x, indices, weights;
  QuantizedExperts gate, up, down;

  Problem(mx::Dtype dtype, int rows, int experts, int k, int hidden, int width, int group_size,
          int bits, uint64_t seed, const std::string& mode = "affine")
      : dtype(dtype),
        rows(rows),
        experts(experts),
        k(k),
        hidden(hidden),
        width(width),
        group_size(group_size),
        bits(bits),
        mode(mode),
        x(mx::astype(mx::random::normal({rows, hidden}, mx::float32, 0, 1, mx::random::key(seed)),
                     dtype)),
        indices(mx::random::randint(0, experts, {rows, k}, mx::uint32, mx::random::key(seed + 1))),
        weights(mx::astype(
            mx::random::uniform(0.0f, 1.0f, {rows, k}, mx::float32, mx::random::key(seed + 2)),
            dtype)),
        gate(stack(width, hidden, seed + 3)),
        up(stack(width, hidden, seed + 4)),
        down(stack(hidden, width, seed + 5)) {}

  QuantizedExperts stack(int n, int cols, uint64_t seed) const {
    auto w = mx::random::normal({experts, n, cols}, mx::float32, 0, 0.05, mx::random::key(seed));
    auto q = mx::quantize(mx::astype(w, dtype), group_size, bits, mode);
    mx::eval(q);
    if (mode != "affine") return {q[0], q[1]};
    return {q[0], q[1], q[2]};
  }
  Matrix matrix(const QuantizedExperts& w) const {
    Matrix m = {read<uint32_t>(w.weight, mx::uint32), {},         {},   w.weight.shape(1),
                w.weight.shape(2) * 32 / bits,        group_size, bits, mode != "affine"};
    m.scales = floats(w.scales);
    if (!m.fp4) {
      m.biases = floats(*w.biases);
      return m;
    }
    for (float& scale : m.scales) {
      const double value = mode == "mxfp4" ? cpu::e8m0(scale) : cpu::e4m3(scale);
      m.biases.push_back(-6 * value);
      scale = value / 2;
    }
    return m;
  }
  mx::array run(Accumulate accumulate) const {
    return moe_gather_qmm_swiglu_downproj_combine(x, gate, up, down, indices, weights, accumulate,
                                                  group_size, bits, mode);
  }
};

// Row `row` of W times x: the bound of src/cpu/grid.inl, with the error that x already has.
Bounded product(const Matrix& w, int64_t row, const std::vector<Bounded>& x, bool grid) {
  Bounded y;
  double sizes = 0;
  for (int g = 0; g < w.cols / w.group_size; ++g) {
    const int64_t at = row * (w.cols / w.group_size) + g;
    const int first = g * w.group_size, last = first + w.group_size;
    double largest = 0, step = grid ? 0x1p-120 : 0;
    for (int k = first; k < last; ++k)
      largest = std::max(largest, std::fabs(x[k].value) + x[k].bound);
    while (grid && largest > 32639 * step) step *= 2;
    for (int k = first; k < last; ++k) {
      const double value = w.scales[at] * w.q(row, k) + w.biases[at];
      const double size = std::fabs(w.scales[at]) * w.q(row, k) + std::fabs(w.biases[at]);
      y.value += value * x[k].value;
      y.bound += std::fabs(value) * (x[k].bound + step / 2);
      sizes += size * (std::fabs(x[k].value) + x[k].bound + step / 2);
    }
  }
  const int chunks = (w.cols * w.bits / 8 + 63) / 64, groups = w.cols / w.group_size;
  const int roundings = chunks + (groups + 15) / 16 + 8 + (grid ? 0 : 32 / w.bits);
  y.bound += kUnit * roundings * sizes;
  return y;
}

// |d silu| <= 1.1 everywhere; the kernel's own error is 4 units in the last place.
Bounded swiglu(const Bounded& gate, const Bounded& up) {
  const double silu = gate.value / (1 + std::exp(-gate.value));
  Bounded h = {silu * up.value, 0};
  h.bound = 1.1 * gate.bound * (std::fabs(up.value) + up.bound) + std::fabs(silu) * up.bound;
  h.bound += 8 * kUnit * (std::fabs(h.value) + h.bound) + 1e-37;
  return h;
}

double unit(mx::Dtype dtype) {
  if (dtype == mx::float32) return kUnit;
  return dtype == mx::bfloat16 ? 0x1p-8 : 0x1p-11;
}

// sum of weight * y with k products and k sums in fp32 and one cast to dtype.
Bounded combine(const std::vector<Bounded>& y, const float* weights, mx::Dtype dtype) {
  Bounded out;
  double sizes = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    out.value += y[i].value * weights[i];
    out.bound += y[i].bound * std::fabs(weights[i]);
    sizes += (std::fabs(y[i].value) + y[i].bound) * std::fabs(weights[i]);
  }
  out.bound += kUnit * (y.size() + 1) * sizes;
  const double half_subnormal = dtype == mx::float16 ? 0x1p-25 : 0;
  out.bound += unit(dtype) * (std::fabs(out.value) + out.bound) + half_subnormal;
  return out;
}

std::vector<Bounded> oracle(const Problem& p) {
  const bool grid = p.dtype != mx::float32;
  const Matrix gate = p.matrix(p.gate), up = p.matrix(p.up), down = p.matrix(p.down);
  const auto x = floats(p.x), weights = floats(p.weights);
  const auto indices = read<uint32_t>(p.indices, mx::uint32);
  std::vector<Bounded> out;
  for (int r = 0; r < p.rows; ++r) {
    std::vector<Bounded> row(p.hidden), h(p.width);
    std::vector<std::vector<Bounded>> y(p.hidden, std::vector<Bounded>(p.k));
    for (int i = 0; i < p.hidden; ++i) row[i].value = x[r * p.hidden + i];
    for (int i = 0; i < p.k; ++i) {
      const int64_t e = indices[r * p.k + i];
      for (int n = 0; n < p.width; ++n)
        h[n] = swiglu(product(gate, e * p.width + n, row, grid),
                      product(up, e * p.width + n, row, grid));
      for (int d = 0; d < p.hidden; ++d) y[d][i] = product(down, e * p.hidden + d, h, grid);
    }
    for (int d = 0; d < p.hidden; ++d)
      out.push_back(combine(y[d], weights.data() + r * p.k, p.dtype));
  }
  return out;
}

int outside(const std::vector<Bounded>& truth, const std::vector<float>& values) {
  int count = values.size() != truth.size();
  for (size_t i = 0; i < truth.size() && i < values.size(); ++i)
    count += !(std::fabs(values[i] - truth[i].value) <= truth[i].bound);
  return count;
}

// Largest |value| against its bound: a bound that says nothing would pass any kernel.
double median_relative_bound(const std::vector<Bounded>& truth) {
  std::vector<double> all;
  for (auto& t : truth) all.push_back(t.bound / (std::fabs(t.value) + 1e-30));
  std::nth_element(all.begin(), all.begin() + all.size() / 2, all.end());
  return all[all.size() / 2];
}

class Experts : public ::testing::TestWithParam<std::tuple<mx::Dtype, Accumulate>> {
 protected:
  static void SetUpTestSuite() { mx::set_default_device(mx::Device::cpu); }
};

TEST_P(Experts, LieInsideTheBoundOfTheOracle) {
  const auto [dtype, accumulate] = GetParam();
  struct Shape {
    int rows, experts, k, hidden, width, group_size, bits;
    const char* mode = "affine";
  };
  for (const Shape& s : {Shape{1, 8, 8, 128, 64, 64, 4}, Shape{3, 4, 2, 192, 96, 32, 4},
                         Shape{8, 5, 3, 128, 128, 128, 4}, Shape{2, 6, 4, 64, 192, 64, 8},
                         Shape{1, 16, 16, 96, 32, 32, 8}, Shape{2, 6, 4, 160, 96, 32, 4, "mxfp4"},
                         Shape{2, 6, 4, 160, 96, 16, 4, "nvfp4"}}) {
    Problem p(dtype, s.rows, s.experts, s.k, s.hidden, s.width, s.group_size, s.bits, 7, s.mode);
    const auto truth = oracle(p);
    EXPECT_EQ(outside(truth, floats(p.run(accumulate))), 0)
        << s.hidden << "x" << s.width << " group " << s.group_size << " bits " << s.bits << " "
        << s.mode;
    EXPECT_LT(median_relative_bound(truth), dtype == mx::float32 ? 0.01 : 0.05);
  }
}

TEST_P(Experts, BoundCatchesAWrongExpertAMissingOneAndOneBadElement) {
  const auto [dtype, accumulate] = GetParam();
  Problem p(dtype, 2, 6, 4, 128, 64, 64, 4, 11);
  const auto truth = oracle(p);
  auto wrong = p;
  wrong.indices = mx::remainder(mx::add(p.indices, mx::array(1u)), mx::array(6u));
  EXPECT_GT(outside(truth, floats(wrong.run(accumulate))), 100);
  auto fewer = p;
  fewer.weights = mx::multiply(p.weights, mx::astype(mx::array({1, 1, 1, 0}), dtype));
  EXPECT_GT(outside(truth, floats(fewer.run(accumulate))), 100);
  auto values = floats(p.run(accumulate));
  ASSERT_EQ(outside(truth, values), 0);
  auto last = values;
  last.back() = -last.back();
  EXPECT_EQ(outside(truth, last), 1);
  last.back() = NAN;
  EXPECT_EQ(outside(truth, last), 1);
  last.pop_back();
  EXPECT_GT(outside(truth, last), 0);
}

INSTANTIATE_TEST_SUITE_P(
    Modes, Experts,
    ::testing::Combine(::testing::Values(mx::bfloat16, mx::float16, mx::float32),
                       ::testing::Values(Accumulate::fp32_no_fma, Accumulate::fp32)));

TEST(Combine, Fp32ModesLieInsideTheBound) {
  mx::set_default_device(mx::Device::cpu);
  for (auto dtype : {mx::bfloat16, mx::float16, mx::float32}) {
    for (int k : {1, 4, 8, 16}) {
      auto y = mx::astype(mx::random::normal({3, k, 77}, mx::random::key(k)), dtype);
      auto w = mx::random::uniform({3, k}, mx::float32, mx::random::key(k + 1));
      const auto ys = floats(y), ws = floats(w);
      std::vector<Bounded> truth;
      for (int r = 0; r < 3; ++r)
        for (int d = 0; d < 77; ++d) {
          std::vector<Bounded> part(k);
          for (int i = 0; i < k; ++i) part[i].value = ys[(r * k + i) * 77 + d];
          truth.push_back(combine(part, ws.data() + r * k, dtype));
        }
      for (auto mode : {Accumulate::fp32, Accumulate::fp32_no_fma})
        EXPECT_EQ(outside(truth, floats(moe_combine_weighted_sum_fp32_no_fma(y, w, mode))), 0);
    }
  }
}

// y and w of mixed sizes, so that another order or another rounding shows in the bits.
TEST(Combine, Fp32ModesAreTheSumInOrderBitForBit) {
  mx::set_default_device(mx::Device::cpu);
  for (auto dtype : {mx::bfloat16, mx::float16, mx::float32}) {
    const int rows = 3, k = 8, columns = 77;
    auto size = mx::exp(mx::random::normal({rows, k, columns}, mx::random::key(1)));
    auto y = mx::astype(size * mx::random::normal({rows, k, columns}, mx::random::key(2)), dtype);
    auto w = mx::random::uniform({rows, k}, mx::float32, mx::random::key(3));
    const auto ys = floats(y), ws = floats(w);
    const auto sum = [&](auto add) {
      std::vector<float> out;
      for (int r = 0; r < rows; ++r)
        for (int d = 0; d < columns; ++d) {
          float total = 0;
          for (int i = 0; i < k; ++i)
            total = add(total, ys[(r * k + i) * columns + d], ws[r * k + i]);
          out.push_back(total);
        }
      return floats(mx::astype(mx::array(out.begin(), {rows, columns}), dtype));
    };
    const auto apart = sum([](float total, float a, float b) { return total + a * b; });
    const auto fused = sum([](float total, float a, float b) { return std::fma(a, b, total); });
    EXPECT_EQ(floats(moe_combine_weighted_sum_fp32_no_fma(y, w, Accumulate::fp32_no_fma)), apart);
    EXPECT_EQ(floats(moe_combine_weighted_sum_fp32_no_fma(y, w, Accumulate::fp32)), fused);
    if (dtype == mx::float32) {  // the cast to a half hides most last bits
      EXPECT_NE(apart, fused) << "the inputs tell the modes apart";
    }
  }
}

std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "no error";
}

TEST(Errors, NameTheTensorWhatWasExpectedAndWhatCame) {
  Problem p(mx::bfloat16, 2, 6, 4, 128, 64, 64, 4, 3);
  const std::string op = "[moe_gather_qmm_swiglu_downproj_combine] ";
  auto broken = [&](auto change) {
    Problem q = p;
    change(q);
    return message([&] { q.run(Accumulate::fp32).eval(); });
  };
  EXPECT_EQ(broken([](Problem& q) { q.gate.scales = mx::astype(q.gate.scales, mx::float32); }),
            op + "gate.scales: expected bfloat16, got float32");
  EXPECT_EQ(broken([](Problem& q) { q.up = q.down; }),
            op + "up: expected gate's geometry [6, 64, 128], got [6, 128, 64]");
  EXPECT_EQ(broken([](Problem& q) {
              q.x = mx::zeros({2, 64}, mx::bfloat16);
            }),
            op + "x: expected a last axis of gate's K 128, got [2, 64]");
  EXPECT_EQ(broken([](Problem& q) {
              q.weights = mx::zeros({2, 3}, mx::bfloat16);
            }),
            op + "weights: expected shape [2, 4], got [2, 3]");
  EXPECT_EQ(broken([](Problem& q) { q.bits = 3; }), op + "bits: expected 4 or 8, got 3");
  EXPECT_EQ(broken([](Problem& q) { q.mode = "mxfp8"; }),
            op + "mode: expected one of 'affine', 'mxfp4', 'nvfp4', got 'mxfp8'");
  EXPECT_EQ(broken([](Problem& q) { q.mode = "mxfp4"; }),
            op + "group_size: expected 32 for mxfp4, got 64");
  EXPECT_EQ(broken([](Problem& q) { q.gate.biases.reset(); }),
            op + "gate.biases: expected an array in mode 'affine', got none");
  EXPECT_EQ(broken([](Problem& q) {
              q.indices = mx::full({2, 4}, 6, mx::uint32);
            }),
            op + "indices[0]: expected less than 6, got 6");
  EXPECT_EQ(broken([](Problem& q) {
              q.indices = mx::full({2, 4}, -1, mx::int32);
            }),
            op + "indices[0]: expected less than 6, got -1");
  EXPECT_EQ(message([] {
              moe_router_argpartition_logits_topk(mx::zeros({2, 4}), 5);
            }),
            "[moe_router_argpartition_logits_topk] k: expected at most the 4 experts, got 5");
  EXPECT_EQ(message([] { accumulate_from("double"); }),
            "[moefuse] accumulate: expected one of 'exact', 'fp32_no_fma', 'fp32', got 'double'");
}

TEST(Errors, AFailedEvaluationLeavesTheStreamUsable) {
  Problem p(mx::bfloat16, 1, 6, 4, 128, 64, 64, 4, 3);
  Problem bad = p;
  bad.indices = mx::full({1, 4}, 99, mx::uint32);
  EXPECT_THROW(bad.run(Accumulate::exact).eval(), std::exception);
  EXPECT_EQ(outside(oracle(p), floats(p.run(Accumulate::fp32))), 0);
}

TEST(Counters, GrowWithEveryEvaluation) {
  auto count = [] { return op_counters()["moe_combine_weighted_sum_fp32_no_fma/fp32"]; };
  const auto before = count();
  auto out =
      moe_combine_weighted_sum_fp32_no_fma(mx::ones({2, 8}), mx::ones({2}), Accumulate::fp32);
  EXPECT_EQ(count(), before);  // lazy: nothing ran yet
  out.eval();
  EXPECT_EQ(count(), before + 1);
}

}  // namespace
}  // namespace moefuse
