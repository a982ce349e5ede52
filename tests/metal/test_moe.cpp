// The three MoE ops and gather_qmm_swiglu in the emulator, against fp64 inside a computed bound.
#include <algorithm>
#include <limits>
#include <numeric>

#include "harness.h"

namespace {

using namespace harness;

// ---- router ----

template <typename T_, int E_, int K_, bool NORM_, bool LOGITS_ = false>
struct RouterParams {
  using T = T_;
  static constexpr int E = E_, K = K_;
  static constexpr bool NORM = NORM_, LOGITS = LOGITS_;
};

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The last k of a stable ascending sort with NaN last (softmax), or the first k of the negated
// values sorted that way.
std::vector<uint> expected_order(std::vector<float> v, size_t k, bool negated) {
  std::vector<uint> order(v.size());
  std::iota(order.begin(), order.end(), 0u);
  if (negated)
    for (float& x : v) x = -x;
  std::stable_sort(order.begin(), order.end(), [&](uint a, uint b) {
    if (std::isnan(v[a]) || std::isnan(v[b])) return !std::isnan(v[a]) && std::isnan(v[b]);
    return v[a] < v[b];
  });
  if (negated) return {order.begin(), order.begin() + k};
  return {order.end() - k, order.end()};
}

// Logits on a grid that every dtype holds and softmax keeps apart, each value twice.
template <typename T>
std::vector<float> tied_logits(size_t rows, size_t experts) {
  std::vector<float> v(rows * experts);
  for (size_t r = 0; r < rows; ++r) {
    std::vector<float> row(experts);
    for (size_t i = 0; i < experts; ++i) row[i] = 0.125f * float(i / 2) - 4.0f;
    std::shuffle(row.begin(), row.end(), random_engine());
    std::copy(row.begin(), row.end(), v.begin() + r * experts);
  }
  return v;
}

template <class P>
auto run_softmax_router(const std::vector<float>& logits) {
  using T = typename P::T;
  Buffer<T> in(std::vector<T>(logits.begin(), logits.end()));
  const size_t rows = logits.size() / P::E;
  return in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<uint>::output(rows * P::K), Buffer<T>::output(rows * P::K));
    kernels::moe_router_softmax<P> kernel{in, std::get<0>(outputs), std::get<1>(outputs)};
    launch(kernel, {.rows = rows}, {uint(rows), 1, 1}, 32, order);
    return outputs;
  });
}

template <class P>
void check_softmax_router() {
  using T = typename P::T;
  const size_t rows = 3;
  const auto logits = tied_logits<T>(rows, P::E);
  auto [indices, weights] = run_softmax_router<P>(logits);
  for (size_t r = 0; r < rows; ++r) {
    const std::vector<float> row(logits.begin() + r * P::E, logits.begin() + (r + 1) * P::E);
    const auto order = expected_order(row, P::K, false);
    double total = 0.0, chosen = 0.0;
    for (float x : row) total += std::exp(double(x));
    for (uint i : order) chosen += std::exp(double(row[i]));
    // The probability: exp, a sum of at most E terms, one product; then the roundings to T.
    Approx sum{0, 0};
    for (int c = 0; c < P::K; ++c) {
      Approx p{std::exp(double(row[order[c]])) / total, 0};
      p.error = p.value * (2 * (8 + 2) + P::E / 32 + 5 + 2) * kUnit;
      sum = round_to<T>(add(sum, round_to<T>(p)));
    }
    for (int c = 0; c < P::K; ++c) {
      const size_t at = r * P::K + c;
      ASSERT_EQ(indices.values()[at], order[c]) << "row " << r << " place " << c;
      Approx w{std::exp(double(row[order[c]])) / (P::LOGITS && P::NORM ? chosen : total), 0};
      w.error = w.value * (2 * (8 + 2) + P::E / 32 + 5 + 2) * kUnit;
      if (!P::LOGITS && P::NORM) w = div(round_to<T>(w), sum);
      expect_near(weights.values()[at], round_to<T>(w), "weights", at);
    }
  }
}

TEST(Router, SoftmaxQwen) {
  check_softmax_router<RouterParams<bfloat16_t, 128, 8, true>>();
}
TEST(Router, SoftmaxFp16) {
  check_softmax_router<RouterParams<float16_t, 60, 4, true>>();
}
TEST(Router, SoftmaxFp32NoNorm) {
  check_softmax_router<RouterParams<float, 48, 16, false>>();
}
TEST(Router, SoftmaxOneOfOne) {
  check_softmax_router<RouterParams<float, 1, 1, true>>();
}
TEST(Router, SoftmaxAllExperts) {
  check_softmax_router<RouterParams<bfloat16_t, 16, 16, true>>();
}
TEST(Router, LogitsQwen) {
  check_softmax_router<RouterParams<bfloat16_t, 128, 8, true, true>>();
}
TEST(Router, LogitsNoNorm) {
  check_softmax_router<RouterParams<float, 72, 5, false, true>>();
}

TEST(Router, SoftmaxEqualLogitsTakeTheLastExperts) {
  auto [indices, weights] =
      run_softmax_router<RouterParams<bfloat16_t, 128, 8, true>>(std::vector<float>(128, 0.5f));
  for (uint c = 0; c < 8; ++c) {
    EXPECT_EQ(indices.values()[c], 120 + c);
    EXPECT_EQ(static_cast<float>(weights.values()[c]), 0.125f);
  }
}

TEST(Router, SoftmaxMinusInfinityAndSignedZero) {
  std::vector<float> row(40, -kInf);
  row[7] = 0.0f;
  row[3] = -0.0f;
  row[21] = 1.0f;
  auto [indices, weights] = run_softmax_router<RouterParams<float, 40, 4, true>>(row);
  const std::vector<uint> want = {39, 3, 7, 21};
  EXPECT_EQ(indices.values(), want);
  EXPECT_EQ(weights.values()[0], 0.0f);
  EXPECT_EQ(weights.values()[1], weights.values()[2]);
}

TEST(Router, SoftmaxOfNanIsNanAndTakesTheLastExperts) {
  for (float bad : {kNan, kInf}) {
    std::vector<float> row(40, 1.0f);
    row[5] = bad;
    auto [indices, weights] = run_softmax_router<RouterParams<float, 40, 3, true>>(row);
    EXPECT_EQ(indices.values(), (std::vector<uint>{37, 38, 39}));
    for (float w : weights.values()) EXPECT_TRUE(std::isnan(w));
  }
}

// Places of the last simdgroup row that hold no expert must not take part in the maximum.
TEST(Router, SoftmaxOfLowLogitsBesideAbsentExperts) {
  for (float low : {-200.0f, -1e30f}) {
    auto [indices, weights] =
        run_softmax_router<RouterParams<float, 40, 4, true>>(std::vector<float>(40, low));
    EXPECT_EQ(weights.values(), std::vector<float>(4, 0.25f));
  }
}

// Bit for bit: each chosen score over their sum, which is rounded to T after every step.
template <typename T, int E, int K>
void check_normalized_in_steps() {
  const auto logits = uniform_vector<float>(32 * E, -4.0f, 4.0f);
  auto plain = std::get<1>(run_softmax_router<RouterParams<T, E, K, false>>(logits)).values();
  auto normed = std::get<1>(run_softmax_router<RouterParams<T, E, K, true>>(logits)).values();
  for (size_t at = 0; at < plain.size(); at += K) {
    T sum = T(0.0f);
    for (int c = 0; c < K; ++c)
      sum = T(static_cast<float>(sum) + static_cast<float>(plain[at + c]));
    for (int c = 0; c < K; ++c)
      plain[at + c] = T(static_cast<float>(plain[at + c]) / static_cast<float>(sum));
  }
  EXPECT_EQ(std::memcmp(plain.data(), normed.data(), plain.size() * sizeof(T)), 0);
}
TEST(Router, SoftmaxNormalizesInStepsOfTheDtype) {
  check_normalized_in_steps<bfloat16_t, 128, 8>();
  check_normalized_in_steps<float16_t, 60, 4>();
  check_normalized_in_steps<float, 48, 6>();
}

TEST(Router, LogitsPutNanOnTop) {
  std::vector<float> row(40, -2.0f);
  row[9] = kNan;
  row[4] = kInf;
  row[30] = -kInf;
  row[2] = -1.0f;
  auto [indices, weights] = run_softmax_router<RouterParams<float, 40, 4, true, true>>(row);
  EXPECT_EQ(indices.values(), (std::vector<uint>{39, 2, 4, 9}));
}

TEST(Router, LogitsFarApartDoNotOverflow) {
  std::vector<float> row(40, -100.0f);
  row[5] = 300.0f;
  auto [indices, weights] = run_softmax_router<RouterParams<float, 40, 4, true, true>>(row);
  EXPECT_EQ(indices.values(), (std::vector<uint>{37, 38, 39, 5}));
  EXPECT_EQ(weights.values(), (std::vector<float>{0.0f, 0.0f, 0.0f, 1.0f}));
}

TEST(Router, LogitsTieZerosOfEitherSign) {
  std::vector<float> row(40, -5.0f);
  row[9] = 0.0f;
  row[20] = -0.0f;
  auto [indices, weights] = run_softmax_router<RouterParams<float, 40, 2, true, true>>(row);
  EXPECT_EQ(indices.values(), (std::vector<uint>{9, 20}));
}

template <class P>
auto run_sigmoid_router(const std::vector<float>& logits, const std::vector<float>& bias_values,
                        float scale) {
  using T = typename P::T;
  Buffer<T> in(std::vector<T>(logits.begin(), logits.end()));
  Buffer<float> bias(bias_values), scaling({scale});
  const size_t rows = logits.size() / P::E;
  return in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<uint>::output(rows * P::K), Buffer<float>::output(rows * P::K));
    kernels::moe_router_sigmoid<P> kernel{in, bias, scaling, std::get<0>(outputs),
                                          std::get<1>(outputs)};
    launch(kernel, {.rows = rows}, {uint(rows), 1, 1}, 32, order);
    return outputs;
  });
}

template <class P>
void check_sigmoid_router() {
  const size_t rows = 3;
  const auto logits = tied_logits<typename P::T>(rows, P::E);
  std::vector<float> bias(P::E);
  for (int i = 0; i < P::E; ++i) bias[i] = i % 7 == 3 ? 2.0f : 0.0f;  // some experts always win
  auto [indices, weights] = run_sigmoid_router<P>(logits, bias, 1.8f);
  for (size_t r = 0; r < rows; ++r) {
    std::vector<float> biased(P::E);
    auto sigmoid_of = [&](size_t i) { return 1 / (1 + std::exp(-double(logits[r * P::E + i]))); };
    for (int i = 0; i < P::E; ++i) biased[i] = float(sigmoid_of(i) + bias[i]);
    const auto order = expected_order(biased, P::K, true);
    Approx sum{0, 0};
    for (uint i : order) sum = add(sum, sigmoid<float>({double(logits[r * P::E + i]), 0}));
    for (int c = 0; c < P::K; ++c) {
      const size_t at = r * P::K + c;
      ASSERT_EQ(indices.values()[at], order[c]) << "row " << r << " place " << c;
      Approx w = sigmoid<float>({double(logits[r * P::E + order[c]]), 0});
      if (P::NORM && P::K > 1) w = div(w, add(sum, {1e-20, 0}));
      expect_near(weights.values()[at], mul(w, {double(1.8f), 0}), "weights", at);
    }
  }
}

TEST(Router, SigmoidGlm) {
  check_sigmoid_router<RouterParams<bfloat16_t, 64, 4, true>>();
}
TEST(Router, SigmoidNoNorm) {
  check_sigmoid_router<RouterParams<float, 40, 6, false>>();
}
TEST(Router, SigmoidTwoExperts) {
  check_sigmoid_router<RouterParams<float, 64, 2, true>>();
}
TEST(Router, SigmoidScoresOfZeroGiveZeroWeights) {
  auto [indices, weights] = run_sigmoid_router<RouterParams<float, 64, 2, true>>(
      std::vector<float>(64, -200.0f), std::vector<float>(64, 0.0f), 1.8f);
  EXPECT_EQ(weights.values(), std::vector<float>(2, 0.0f));
}
TEST(Router, SigmoidOneExpert) {
  check_sigmoid_router<RouterParams<float16_t, 33, 1, true>>();
}

TEST(Router, SigmoidTiesTakeTheFirstExpertsAndNanComesLast) {
  std::vector<float> row(64, 0.25f), bias(64, 0.0f);
  row[0] = kNan;
  auto [indices, weights] = run_sigmoid_router<RouterParams<float, 64, 4, true>>(row, bias, 1.0f);
  EXPECT_EQ(indices.values(), (std::vector<uint>{1, 2, 3, 4}));
  for (float w : weights.values()) EXPECT_EQ(w, 0.25f);
}

TEST(Router, SigmoidOfOnlyNanTakesTheFirst) {
  auto [indices, weights] = run_sigmoid_router<RouterParams<float, 64, 4, true>>(
      std::vector<float>(64, kNan), std::vector<float>(64, 0.0f), 1.0f);
  EXPECT_EQ(indices.values(), (std::vector<uint>{0, 1, 2, 3}));
}

TEST(Router, SigmoidKeepsPrecisionAtBothEnds) {
  std::vector<float> row(64, -30.0f), bias(64, 0.0f);
  row[10] = 40.0f;
  row[11] = -80.0f;
  bias[11] = 1.0f;
  auto [indices, weights] = run_sigmoid_router<RouterParams<float, 64, 2, false>>(row, bias, 1.0f);
  EXPECT_EQ(indices.values(), (std::vector<uint>{10, 11}));
  EXPECT_EQ(weights.values()[0], 1.0f);
  expect_near(weights.values()[1], sigmoid<float>({-80.0, 0}), "weights", 1);
}

// ---- the shared exponential ----

TEST(Lanes, ExpIsWithinTwoUlp) {
  double worst = 0.0;
  for (int i = 0; i < 400000; ++i) {
    const float x = uniform(-87.2f, 88.7f);
    const double want = std::exp(double(x)), got = exp_fp32(x);
    const double ulp = std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23);
    worst = std::max(worst, std::abs(got - want) / ulp);
  }
  EXPECT_LT(worst, 2.0);
  EXPECT_EQ(exp_fp32(0.0f), 1.0f);
  EXPECT_EQ(exp_fp32(-kInf), 0.0f);
  EXPECT_EQ(exp_fp32(-100.0f), 0.0f);
  EXPECT_EQ(exp_fp32(kInf), kInf);
  EXPECT_EQ(exp_fp32(89.0f), kInf);
  EXPECT_FALSE(std::isinf(exp_fp32(88.7228f)));  // the largest argument with a finite result
  EXPECT_TRUE(std::isnan(exp_fp32(kNan)));
}

// ---- combine ----

template <typename T_, int K_, int D_, int COMBINE_>
struct CombineParams {
  using T = T_;
  static constexpr int K = K_, D = D_, COMBINE = COMBINE_;
};

// The combine in plain C++, every rounding written out: the kernel must give these bits.
template <typename T>
float combine_reference(const std::vector<float>& y, const std::vector<float>& w, int mode) {
  float sum = 0.0f;
  for (size_t i = 0; i < y.size(); ++i) {
    if (mode == 0) {
      const float p = static_cast<float>(T(y[i] * w[i]));
      sum = static_cast<float>(T(sum + p));
    } else if (mode == 1) {
      const volatile float p = y[i] * w[i];
      sum = sum + p;
    } else {
      sum = std::fma(y[i], w[i], sum);
    }
  }
  return static_cast<float>(T(sum));
}

template <class P>
void check_combine() {
  using T = typename P::T;
  const size_t rows = 3;
  Buffer<T> y(uniform_vector<T>(rows * P::K * P::D, -2.0f, 2.0f));
  Buffer<float> weights(uniform_vector<float>(rows * P::K, 0.0f, 1.0f));
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * P::D));
    launch(kernels::moe_combine<P>{y, weights, std::get<0>(outputs)}, {.rows = rows},
           {blocks(P::D, 256), uint(rows), 1}, 256, order);
    return outputs;
  });
  for (size_t i = 0; i < rows * P::D; ++i) {
    std::vector<float> part(P::K), w(P::K);
    Approx sum;
    for (int k = 0; k < P::K; ++k) {
      const size_t slot = i / P::D * P::K + k;
      part[k] = static_cast<float>(y.values()[slot * P::D + i % P::D]);
      w[k] = weights.values()[slot];
      const Approx p = mul({part[k], 0}, {w[k], 0});
      sum = P::COMBINE == 0 ? round_to<T>(add(sum, round_to<T>(p))) : add(sum, p);
    }
    ASSERT_EQ(static_cast<float>(out.values()[i]), combine_reference<T>(part, w, P::COMBINE)) << i;
    expect_near(out.values()[i], round_to<T>(sum), "out", i);
  }
}

TEST(Combine, ExactBf16) {
  check_combine<CombineParams<bfloat16_t, 8, 300, 0>>();
}
TEST(Combine, ExactFp16) {
  check_combine<CombineParams<float16_t, 4, 256, 0>>();
}
TEST(Combine, Fp32NoFmaBf16) {
  check_combine<CombineParams<bfloat16_t, 4, 513, 1>>();
}
TEST(Combine, Fp32NoFmaFp32) {
  check_combine<CombineParams<float, 16, 64, 1>>();
}
TEST(Combine, Fp32FusedBf16) {
  check_combine<CombineParams<bfloat16_t, 8, 256, 2>>();
}
TEST(Combine, Fp32FusedFp32) {
  check_combine<CombineParams<float, 1, 1, 2>>();
}

// ---- experts ----

template <typename T_, int BITS_, int GROUP_, int E_, int K_, int H_, int I_, int D_, int MODE>
struct ExpertsParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, E = E_, K = K_, H = H_, I = I_, D = D_;
  static constexpr int COMBINE = MODE;
  static constexpr bool STEPS = MODE == 0;
  using U = std::conditional_t<STEPS, T, float>;
};

template <class P>
void check_experts(size_t rows) {
  using T = typename P::T;
  using U = typename P::U;
  Buffer<T> x(uniform_vector<T>(rows * P::H, -1.0f, 1.0f));
  Stack<T> gate(P::E, P::I, P::H, P::BITS, P::GROUP), up(P::E, P::I, P::H, P::BITS, P::GROUP);
  Stack<T> down(P::E, P::D, P::I, P::BITS, P::GROUP);
  std::vector<uint> chosen(rows * P::K);
  for (uint& i : chosen) i = random_engine()() % P::E;
  chosen.back() = P::E - 1;
  Buffer<uint> indices(chosen);
  Buffer<float> weights(uniform_vector<float>(rows * P::K, 0.05f, 0.6f));
  auto [hidden, out] = in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<U>::output(rows * P::K * P::I), Buffer<T>::output(rows * P::D));
    auto& [h, o] = outputs;
    launch(kernels::moe_experts_gate_up<P>{x, indices, gate.weight, gate.scales, gate.biases,
                                           up.weight, up.scales, up.biases, h},
           {.rows = rows}, {blocks(P::I, 8), P::K, uint(rows)}, 64, order);
    launch(
        kernels::moe_experts_down<P>{h, indices, weights, down.weight, down.scales, down.biases, o},
        {.rows = rows}, {blocks(P::D, 4), uint(rows), 1}, 32 * P::K, order);
    return outputs;
  });
  const auto& stored = hidden.values();
  for (size_t slot = 0; slot < rows * P::K; ++slot) {
    auto x_at = [&](size_t k) {
      return Approx{static_cast<float>(x.values()[slot / P::K * P::H + k]), 0};
    };
    for (size_t i = 0; i < P::I; ++i) {
      const size_t row = chosen[slot] * P::I + i;
      const Approx h = swiglu<T, P::STEPS>(gate.dot(row, x_at), up.dot(row, x_at));
      expect_near(hidden.values()[slot * P::I + i], h, "hidden", slot * P::I + i);
    }
  }
  for (size_t at = 0; at < rows * P::D; ++at) {
    Approx sum;
    for (size_t k = 0; k < P::K; ++k) {
      const size_t slot = at / P::D * P::K + k;
      Approx y = down.dot(chosen[slot] * P::D + at % P::D, [&](size_t i) {
        return Approx{static_cast<float>(stored[slot * P::I + i]), 0};
      });
      if (P::STEPS) y = round_to<T>(y);
      y = mul(y, {weights.values()[slot], 0});
      if (P::STEPS) y = round_to<T>(y);
      sum = add(sum, y);
      if (P::STEPS) sum = round_to<T>(sum);
    }
    expect_near(out.values()[at], round_to<T>(sum), "out", at);
  }
}

TEST(Experts, QwenSlice) {  // 8 of 128 experts in miniature, the true K of both products
  check_experts<ExpertsParams<bfloat16_t, 4, 64, 10, 8, 2048, 64, 20, 0>>(1);
}
TEST(Experts, QwenDownWidth768) {
  check_experts<ExpertsParams<bfloat16_t, 4, 64, 3, 8, 64, 768, 16, 1>>(1);
}
TEST(Experts, GlmSliceFourRows) {
  check_experts<ExpertsParams<bfloat16_t, 4, 64, 6, 4, 256, 192, 24, 1>>(4);
}
TEST(Experts, Fp16EightBits) {
  check_experts<ExpertsParams<float16_t, 8, 32, 4, 2, 96, 32, 12, 0>>(2);
}
TEST(Experts, Fp32Group128) {
  check_experts<ExpertsParams<float, 4, 128, 3, 3, 384, 128, 9, 2>>(3);
}
TEST(Experts, EightBitsGroup64Fused) {
  check_experts<ExpertsParams<bfloat16_t, 8, 64, 2, 16, 320, 64, 5, 2>>(1);
}
TEST(Experts, RowsThatDoNotFillABlock) {
  check_experts<ExpertsParams<bfloat16_t, 4, 32, 2, 1, 32, 32, 3, 0>>(1);
}

TEST(Experts, AnIndexOutsideTheStackGivesNanAndReadsNothing) {
  using P = ExpertsParams<bfloat16_t, 4, 32, 2, 2, 32, 32, 8, 1>;
  Stack<bfloat16_t> gate(2, 32, 32, 4, 32), up(2, 32, 32, 4, 32), down(2, 8, 32, 4, 32);
  Buffer<bfloat16_t> x(uniform_vector<bfloat16_t>(32, -1.0f, 1.0f));
  Buffer<uint> indices({1u, 2u});
  Buffer<float> weights({0.5f, 0.5f});
  auto hidden = Buffer<float>::output(64);
  auto out = Buffer<bfloat16_t>::output(8);
  launch(kernels::moe_experts_gate_up<P>{x, indices, gate.weight, gate.scales, gate.biases,
                                         up.weight, up.scales, up.biases, hidden},
         {.rows = 1}, {4, 2, 1}, 64, Order::forward);
  launch(kernels::moe_experts_down<P>{hidden, indices, weights, down.weight, down.scales,
                                      down.biases, out},
         {.rows = 1}, {2, 1, 1}, 64, Order::forward);
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(std::isnan(hidden.values()[i]), i >= 32) << i;
  for (auto v : out.values()) EXPECT_TRUE(std::isnan(static_cast<float>(v)));
}

// ---- gather_qmm_swiglu ----

template <typename T_, int BITS_, int GROUP_, int E_, int MATRICES_, int M_, int H_, int I_,
          bool STEPS_>
struct GatherParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, E = E_, MATRICES = MATRICES_, M = M_, H = H_,
                       I = I_;
  static constexpr bool STEPS = STEPS_;
};

template <class P>
void check_gather(const std::vector<uint>& matrix, const std::vector<uint>& expert) {
  using T = typename P::T;
  const size_t batches = matrix.size();
  Buffer<T> x(uniform_vector<T>(size_t(P::MATRICES) * P::M * P::H, -1.0f, 1.0f));
  Stack<T> gate(P::E, P::I, P::H, P::BITS, P::GROUP), up(P::E, P::I, P::H, P::BITS, P::GROUP);
  Buffer<uint> matrices(matrix), experts(expert);
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(batches * P::M * P::I));
    launch(
        kernels::gather_qmm_swiglu<P>{x, matrices, experts, gate.weight, gate.scales, gate.biases,
                                      up.weight, up.scales, up.biases, std::get<0>(outputs)},
        {.batches = batches}, {blocks(P::I, 8), P::M, uint(batches)}, 64, order);
    return outputs;
  });
  for (size_t at = 0; at < out.values().size(); ++at) {
    const size_t batch = at / P::I / P::M, m = at / P::I % P::M;
    if (matrix[batch] >= P::MATRICES || expert[batch] >= P::E) {
      ASSERT_TRUE(std::isnan(static_cast<float>(out.values()[at])));
      continue;
    }
    auto x_at = [&](size_t k) {
      return Approx{static_cast<float>(x.values()[(matrix[batch] * P::M + m) * P::H + k]), 0};
    };
    const size_t row = expert[batch] * P::I + at % P::I;
    const Approx h = swiglu<T, P::STEPS>(gate.dot(row, x_at), up.dot(row, x_at));
    expect_near(out.values()[at], round_to<T>(h), "out", at);
  }
}

TEST(GatherQmmSwiglu, OneRowManyExperts) {
  check_gather<GatherParams<bfloat16_t, 4, 64, 5, 1, 1, 512, 40, true>>({0, 0, 0, 0}, {4, 0, 2, 2});
}
TEST(GatherQmmSwiglu, SeveralRowsAndMatrices) {
  check_gather<GatherParams<float16_t, 8, 32, 2, 3, 3, 64, 12, true>>({2, 0, 1}, {0, 1, 1});
}
TEST(GatherQmmSwiglu, Fp32InOneStep) {
  check_gather<GatherParams<float, 4, 32, 2, 2, 2, 288, 7, false>>({1, 0}, {1, 0});
}
TEST(GatherQmmSwiglu, AnIndexOutsideGivesNan) {
  check_gather<GatherParams<float, 4, 32, 2, 2, 1, 32, 8, true>>({0, 2, 1}, {2, 1, 1});
}

}  // namespace
