// The host side of the ops: the calls that would go to Metal run in the emulator, on real arrays.
#include "metal/metal_ops.h"

#include "emulated_backend.h"
#include "harness.h"
#include "metal/launch.h"

namespace {

using namespace harness;
namespace mx = mlx::core;
namespace metal = moefuse::metal;
using moefuse::Accumulate;
using moefuse::QuantizedExperts;

// While it lives, the calls of the host side go to `backend`.
struct Emulated {
  explicit Emulated(emulated::Backend& backend) {
    metal::set_backend([&backend](const metal::Call& call) { return backend(call); });
  }
  ~Emulated() { metal::set_backend(nullptr); }
};

template <typename T>
mx::array array_of(const std::vector<T>& v, const mx::Shape& shape) {
  return mx::array(v.begin(), shape, emulated::dtype_of<T>());
}

template <typename T>
QuantizedExperts experts_of(const Stack<T>& s, int experts) {
  const int rows = s.rows, cols = s.cols;
  return {array_of(s.weight.values(), {experts, rows, cols * s.bits / 32}),
          array_of(s.scales.values(), {experts, rows, cols / s.group}),
          array_of(s.biases.values(), {experts, rows, cols / s.group})};
}

struct QwenRouter {
  using T = bfloat16_t;
  static constexpr int E = 48, K = 8;
  static constexpr bool NORM = true, LOGITS = false;
};

TEST(MetalHost, RouterSoftmax) {
  emulated::Backend backend;
  ADD_KERNEL(backend, moe_router_softmax, QwenRouter, .rows = 6);
  Emulated guard(backend);
  std::vector<bfloat16_t> logits(6 * 48);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = bfloat16_t(float(i * 29 % 48) * 0.125f);
  auto [indices, weights] =
      metal::moe_router(array_of(logits, {2, 3, 48}), 8, {}, std::nullopt, {});
  EXPECT_EQ(indices.shape(), (mx::Shape{2, 3, 8}));
  EXPECT_EQ(weights.dtype(), mx::bfloat16);
  for (size_t r = 0; r < 6; ++r) {
    for (size_t c = 0; c < 8; ++c) {  // 29 is coprime to 48: each row holds every value once
      const uint i = indices.data<uint>()[r * 8 + c];
      EXPECT_EQ((r * 48 + i) * 29 % 48, 40 + c);
    }
  }
}

struct GlmRouter {
  using T = float;
  static constexpr int E = 64, K = 4;
  static constexpr bool NORM = true;
};

TEST(MetalHost, RouterSigmoidWithAndWithoutBias) {
  emulated::Backend backend;
  ADD_KERNEL(backend, moe_router_sigmoid, GlmRouter, .rows = 1);
  Emulated guard(backend);
  std::vector<float> logits(64), bias(64, 0.0f);
  for (int i = 0; i < 64; ++i) logits[i] = 0.05f * i - 1.0f;
  bias[5] = 3.0f;
  moefuse::RouterOptions options;
  options.scoring = moefuse::Scoring::sigmoid;
  options.scaling_factor = 1.8f;
  const mx::array x = array_of(logits, {1, 64});
  auto plain = metal::moe_router(x, 4, options, std::nullopt, {});
  auto biased = metal::moe_router(x, 4, options, array_of(bias, {64}), {});
  EXPECT_EQ(plain.first.data<uint>()[0], 63u);
  EXPECT_EQ(biased.first.data<uint>()[0], 5u);
  EXPECT_EQ(biased.first.data<uint>()[1], 63u);
  EXPECT_EQ(biased.second.dtype(), mx::float32);
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) sum += biased.second.data<float>()[i];
  EXPECT_NEAR(sum, 1.8f, 8 * 1.8 * kUnit);  // 8 roundings
}

template <int MODE>
struct Combine {
  using T = bfloat16_t;
  static constexpr int K = 3, D = 70, COMBINE = MODE;
};

TEST(MetalHost, CombineTakesItsModeFromTheDtypes) {
  emulated::Backend backend;
  ADD_KERNEL(backend, moe_combine, Combine<0>, .rows = 2);
  ADD_KERNEL(backend, moe_combine, Combine<1>, .rows = 2);
  ADD_KERNEL(backend, moe_combine, Combine<2>, .rows = 2);
  Emulated guard(backend);
  const auto y = uniform_vector<bfloat16_t>(2 * 3 * 70, -1.0f, 1.0f);
  const auto w = uniform_vector<bfloat16_t>(2 * 3, 0.0f, 1.0f);
  auto run = [&](Accumulate accumulate, bool promoted) {
    const mx::array weights = array_of(w, {2, 3});
    return metal::moe_combine(array_of(y, {2, 3, 70}),
                              promoted ? mx::astype(weights, mx::float32) : weights, accumulate,
                              {});
  };
  const mx::array exact = run(Accumulate::exact, false), promoted = run(Accumulate::exact, true);
  const mx::array no_fma = run(Accumulate::fp32_no_fma, false);
  EXPECT_EQ(exact.shape(), (mx::Shape{2, 70}));
  EXPECT_TRUE(mx::array_equal(promoted, no_fma).item<bool>());
  EXPECT_FALSE(mx::array_equal(exact, no_fma).item<bool>());
  run(Accumulate::fp32, false);
  for (size_t i = 0; i < 140; ++i) {
    float sum = 0.0f;
    for (size_t k = 0; k < 3; ++k) {
      const size_t slot = i / 70 * 3 + k;
      const volatile float p = float(y[slot * 70 + i % 70]) * float(w[slot]);
      sum = sum + p;
    }
    EXPECT_EQ(float(no_fma.data<bfloat16_t>()[i]), float(bfloat16_t(sum)));
  }
}

template <int MODE>
struct Experts {
  using T = float;
  using U = float;
  static constexpr int BITS = 4, GROUP = 32, E = 5, K = 2, H = 96, I = 64, D = 20;
  static constexpr int COMBINE = MODE;
  static constexpr bool STEPS = MODE == 0;
};

TEST(MetalHost, Experts) {
  using P = Experts<1>;
  emulated::Backend backend;
  ADD_KERNEL(backend, moe_experts_gate_up, P, .rows = 3);
  ADD_KERNEL(backend, moe_experts_down, P, .rows = 3);
  Emulated guard(backend);
  Stack<float> gate(5, 64, 96, 4, 32), up(5, 64, 96, 4, 32), down(5, 20, 64, 4, 32);
  const auto x = uniform_vector<float>(3 * 96, -1.0f, 1.0f);
  const auto weights = uniform_vector<float>(6, 0.1f, 0.9f);
  const std::vector<uint> indices = {4, 0, 2, 3, 1, 4};
  const mx::array out =
      metal::moe_experts(array_of(x, {3, 96}), experts_of(gate, 5), experts_of(up, 5),
                         experts_of(down, 5), mx::astype(array_of(indices, {3, 2}), mx::int64),
                         array_of(weights, {3, 2}), Accumulate::fp32_no_fma, 32, 4, {});
  ASSERT_EQ(out.shape(), (mx::Shape{3, 20}));
  EXPECT_EQ(backend.dispatched,
            (std::vector<std::string>{"moe_experts_gate_up", "moe_experts_down"}));
  for (size_t r = 0; r < 3; ++r) {
    std::vector<Approx> hidden;
    for (size_t slot = 2 * r; slot < 2 * r + 2; ++slot) {
      auto at = [&](size_t k) { return Approx{x[r * 96 + k], 0}; };
      for (size_t i = 0; i < 64; ++i) {
        const size_t row = indices[slot] * 64 + i;
        hidden.push_back(swiglu<float, false>(gate.dot(row, at), up.dot(row, at)));
      }
    }
    for (size_t d = 0; d < 20; ++d) {
      Approx sum;
      for (size_t k = 0; k < 2; ++k) {
        const Approx y =
            down.dot(indices[2 * r + k] * 20 + d, [&](size_t i) { return hidden[k * 64 + i]; });
        sum = add(sum, mul(y, {weights[2 * r + k], 0}));
      }
      expect_near(out.data<float>()[r * 20 + d], sum, "out", r * 20 + d);
    }
  }
}

struct Gather {
  using T = float;
  static constexpr int BITS = 8, GROUP = 32, E = 3, MATRICES = 2, M = 2, H = 32, I = 12;
  static constexpr bool STEPS = true;
};

TEST(MetalHost, GatherQmmSwigluBroadcastsItsIndices) {
  emulated::Backend backend;
  ADD_KERNEL(backend, gather_qmm_swiglu, Gather, .batches = 6);
  Emulated guard(backend);
  Stack<float> gate(3, 12, 32, 8, 32), up(3, 12, 32, 8, 32);
  const auto x = uniform_vector<float>(2 * 2 * 32, -1.0f, 1.0f);
  const std::vector<uint> left = {1, 0}, right = {2, 0, 1};
  const mx::array out = metal::gather_qmm_swiglu(
      array_of(x, {2, 2, 32}), experts_of(gate, 3), experts_of(up, 3), array_of(left, {2, 1}),
      array_of(right, {1, 3}), 32, 8, Accumulate::exact, {});
  ASSERT_EQ(out.shape(), (mx::Shape{2, 3, 2, 12}));
  for (size_t at = 0; at < out.size(); ++at) {
    const size_t m = at / 12 % 2, r = at / 24 % 3, l = at / 72;
    auto x_at = [&](size_t k) { return Approx{x[(left[l] * 2 + m) * 32 + k], 0}; };
    const size_t row = right[r] * 12 + at % 12;
    expect_near(out.data<float>()[at], swiglu<float, true>(gate.dot(row, x_at), up.dot(row, x_at)),
                "out", at);
  }
}

TEST(MetalHost, WithoutMetalThereIsAnErrorThatSaysSo) {
  if (mx::metal::is_available()) GTEST_SKIP() << "this machine has a Metal device";
  EXPECT_FALSE(metal::available());
  try {
    metal::moe_combine(mx::ones({1, 2, 8}), mx::ones({1, 2}), Accumulate::exact, {});
    FAIL() << "no error";
  } catch (const std::runtime_error& e) {
    EXPECT_STREQ(e.what(), "[metal_kernel] No Metal back-end.");
  }
}

TEST(MetalHost, RefusalsNameTheirReason) {
  moefuse::RouterOptions groups;
  groups.n_group = 2;
  EXPECT_EQ(metal::router_refusal(mx::zeros({1, 64}), {}), "");
  EXPECT_EQ(metal::router_refusal(mx::zeros({1, 64}), groups), "n_group > 1");
  EXPECT_EQ(metal::router_refusal(mx::zeros({1, 2048}), {}), "more than 1024 experts");
  Stack<float> small(1, 1, 32, 4, 32), good(2, 8, 32, 4, 32);
  const mx::array x = mx::zeros({1, 32});
  EXPECT_EQ(metal::experts_refusal(x, {experts_of(good, 2), experts_of(small, 1)}, 2),
            "fewer than 8 weights");
  EXPECT_EQ(metal::experts_refusal(x, {experts_of(good, 2)}, 17), "more than 16 experts a row");
  EXPECT_EQ(metal::experts_refusal(x, {experts_of(good, 2)}, 16), "");
  QuantizedExperts fp4 = experts_of(good, 2);
  fp4.biases.reset();
  EXPECT_EQ(metal::experts_refusal(x, {fp4}, 2), "fp4 weights");
  EXPECT_EQ(metal::experts_refusal(mx::zeros({0, 32}), {experts_of(good, 2)}, 16), "no rows");
  EXPECT_EQ(metal::combine_refusal(mx::zeros({0, 2, 8})), "no rows");
  EXPECT_EQ(metal::combine_refusal(mx::zeros({1, 2, 8})), "");
}

// What the public ops do on a Metal device: the kernel, or the stock graph with its reason counted.
TEST(MetalHost, PublicOpsTakeTheKernelsAndCountThem) {
  emulated::Backend backend;
  ADD_KERNEL(backend, moe_router_softmax, QwenRouter, .rows = 6);
  ADD_KERNEL(backend, moe_combine, Combine<1>, .rows = 2);
  ADD_KERNEL(backend, moe_experts_gate_up, Experts<1>, .rows = 3);
  ADD_KERNEL(backend, moe_experts_down, Experts<1>, .rows = 3);
  ADD_KERNEL(backend, gather_qmm_swiglu, Gather, .batches = 2);
  Emulated guard(backend);
  auto before = moefuse::op_counters();
  auto counted = [&](const std::string& key) { return moefuse::op_counters()[key] - before[key]; };
  const mx::array logits = mx::random::normal({6, 48}, mx::bfloat16);
  moefuse::moe_router_argpartition_logits_topk(logits, 8);
  moefuse::moe_combine_weighted_sum_fp32_no_fma(mx::ones({2, 3, 70}, mx::bfloat16),
                                                mx::ones({2, 3}, mx::bfloat16));
  Stack<float> gate(5, 64, 96, 4, 32), up(5, 64, 96, 4, 32), down(5, 20, 64, 4, 32);
  const mx::array chosen = mx::zeros({3, 2}, mx::uint32);
  moefuse::moe_gather_qmm_swiglu_downproj_combine(mx::ones({3, 96}), experts_of(gate, 5),
                                                  experts_of(up, 5), experts_of(down, 5), chosen,
                                                  mx::ones({3, 2}), Accumulate::fp32_no_fma, 32, 4);
  Stack<float> small_gate(3, 12, 32, 8, 32), small_up(3, 12, 32, 8, 32);
  const mx::array one = mx::array({1, 0}), two = mx::array({2, 1});
  moefuse::gather_qmm_swiglu(mx::ones({2, 2, 32}), experts_of(small_gate, 3),
                             experts_of(small_up, 3), one, two, true, 32, 8);
  EXPECT_EQ(backend.dispatched,
            (std::vector<std::string>{"moe_router_softmax", "moe_combine", "moe_experts_gate_up",
                                      "moe_experts_down", "gather_qmm_swiglu"}));
  EXPECT_EQ(counted("moe_router_argpartition_logits_topk/exact"), 1);
  EXPECT_EQ(counted("moe_combine_weighted_sum_fp32_no_fma/fp32_no_fma"), 1);
  EXPECT_EQ(counted("moe_gather_qmm_swiglu_downproj_combine/fp32_no_fma"), 1);
  EXPECT_EQ(counted("gather_qmm_swiglu/exact"), 1);
}

TEST(MetalHost, PublicOpsFallBackToTheStockGraphWithAReason) {
  emulated::Backend backend;
  Emulated guard(backend);
  moefuse::RouterOptions groups;
  groups.scoring = moefuse::Scoring::sigmoid;
  groups.n_group = 4;
  groups.topk_group = 2;
  const mx::array logits = mx::random::normal({2, 16});
  auto before = moefuse::op_counters();
  auto [indices, weights] = moefuse::moe_router_argpartition_logits_topk(logits, 4, groups);
  mx::eval(indices, weights);
  const std::string key = "moe_router_argpartition_logits_topk/stock: n_group > 1";
  EXPECT_EQ(moefuse::op_counters()[key] - before[key], 1);
  EXPECT_TRUE(backend.dispatched.empty());
}

TEST(MetalHost, WithoutMetalACpuStreamIsTheCpus) {
  if (mx::metal::is_available()) GTEST_SKIP() << "this machine has a Metal device";
  EXPECT_FALSE(metal::serves(mx::Device::cpu));
}

// fast::metal_kernel finds attributes, and a wish for shapes and strides, by name in the body.
TEST(MetalHost, TextsAskForTheAttributesThatTheyUseAndNoOthers) {
  const std::vector<std::string> used = {
      "threadgroup_position_in_grid", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup",
      "thread_index_in_threadgroup"};
  for (const auto& name : metal::kernel_names()) {
    const auto& k = metal::kernel_text(name);
    for (const auto& attribute : used) EXPECT_NE(k.metal_body.find(attribute), std::string::npos);
    for (const char* other :
         {"_shape", "_strides", "_ndim", "threads_per", "grid_size", "#if", "//", "atomic"}) {
      EXPECT_EQ(k.metal_body.find(other), std::string::npos) << name << ": " << other;
      EXPECT_EQ(k.metal_header.find(other), std::string::npos) << name << ": " << other;
    }
    EXPECT_LT(k.metal_header.size() + k.metal_body.size(), 16384u)
        << name << " is hashed at every call";
  }
  EXPECT_THROW(metal::kernel_text("no_such_kernel"), std::invalid_argument);
}

}  // namespace
