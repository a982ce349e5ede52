// A router's logits out of the kernel that makes its row, in the emulator: each cluster's sums, and
// the logits they add up to, against fp64 inside a computed bound. Two clusters, the second one
// with four blocks' rows only.
#include "tensor_kernels.h"
// The texts come first.
#include "harness.h"

namespace {

using namespace harness;
using T = bfloat16_t;

constexpr size_t kRows = 2;
constexpr float kEps = 1e-6f;

// Rows: to a block. Group: of a gate of 8 bits, or 0: of T.
template <int Rows, int Group, int Experts>
struct Residual {
  using T = bfloat16_t;
  using G = std::conditional_t<Group == 0, T, uint>;
  static constexpr int ROWS = Rows, GROUP = Group, E = Experts, N = 320, COLS = 128;
};

template <int Group, int Experts>
struct Run {
  static constexpr size_t E = Experts, N = 320, kSlices = 2;
  using G = typename Residual<1, Group, Experts>::G;

  Stack<T> m{1, N, 128, 4, 64}, gate{1, E, N, 8, Group ? Group : 64};
  Buffer<T> x{uniform_vector<T>(kRows * 128, -2.0f, 2.0f)};
  Buffer<T> residual{uniform_vector<T>(kRows * N, -1.0f, 1.0f)};
  std::vector<T> norm = uniform_vector<T>(N, 0.5f, 1.5f);
  std::vector<T> dense = uniform_vector<T>(E * N, -1.0f, 1.0f);
  std::vector<T> out;       // [rows][N]
  std::vector<float> sums;  // [rows][slices][E + 1]

  template <int Rows>
  auto run(Order order) {
    using P = Residual<Rows, Group, Experts>;
    auto to = Buffer<T>::output(kRows * N);
    auto to_sums = Buffer<float>::output(kRows * kSlices * (E + 1));
    Buffer<T> gains(norm), none(std::vector<T>(16, T(0.0f)));
    Buffer<T> scales = Group ? gate.scales : none, biases = Group ? gate.biases : none;
    Buffer<G> weight = [&] {
      if constexpr (Group == 0) return Buffer<T>(dense);
      if constexpr (Group != 0) return gate.weight;
    }();
    kernels::grid_linear_residual<P> kernel{x,      m.weight, m.scales, m.biases, residual, gains,
                                            weight, scales,   biases,   to,       to_sums};
    check_sizes(kernel, {.rows = kRows, .capacity = 0, .batches = 0, .sequences = 1});
    emulator::dispatch(
        {32, kRows / Rows, 1}, 256, order, [&] { kernel(); }, 16);
    return std::tuple(to, to_sums);
  }
  Run() {
    const auto [to, to_sums] = in_every_order([&](Order order) { return run<2>(order); });
    out = to.values();
    sums = to_sums.values();
  }

  double weight(size_t e, size_t k) const {
    if (Group == 0) return static_cast<float>(dense[e * N + k]);
    return gate.scale(e, k) * gate.quant(e, k) + gate.bias(e, k);
  }
  double size(size_t e, size_t k) const {
    if (Group == 0) return std::abs(weight(e, k));
    return std::abs(gate.scale(e, k)) * gate.quant(e, k) + std::abs(gate.bias(e, k));
  }
  // Sum `at` of columns [from, to). A term passes its own rounding, nine within its eight, two by
  // scale and bias, one between the halves and 15 between the blocks.
  Approx sum(size_t row, size_t at, size_t from, size_t to) const {
    Approx y;
    for (size_t k = from; k < to; ++k) {
      const double v = static_cast<float>(out[row * N + k]);
      const double x = at == E ? v : v * static_cast<float>(norm[k]);
      y.value += x * (at == E ? v : weight(at, k));
      y.error += 1.01 * 28 * kUnit * std::abs(x) * (at == E ? std::abs(v) : size(at, k));
    }
    return y;
  }
  size_t outside() const {
    size_t count = 0;
    for (size_t row = 0; row < kRows; ++row)
      for (size_t s = 0; s < kSlices; ++s)
        for (size_t at = 0; at <= E; ++at) {
          const Approx want = sum(row, at, 256 * s, std::min(256 * (s + 1), N));
          const float got = sums[(row * kSlices + s) * (E + 1) + at];
          count += !(std::abs(got - want.value) <= want.error);
        }
    return count;
  }
  // As the experts' kernels see them.
  std::vector<T> logits(size_t row) const {
    Buffer<float> in(sums);
    const emulator::Pointer<const float> from(in);
    auto to = Buffer<float>::output(E);
    const emulator::Pointer<float> all(to);
    emulator::dispatch({1, 1, 1}, 64, Order::shuffled, [&] {
      const auto part = load_sums<Experts, 320, 64>(from + row * kSlices * (E + 1), thread_id);
      store_logits<T>(part, all, kEps, thread_id);
    });
    std::vector<T> rounded;
    for (float v : to.values()) {
      EXPECT_EQ(v, static_cast<float>(T(v)));
      rounded.push_back(T(v));
    }
    return rounded;
  }
  size_t logits_outside() const {
    size_t count = 0;
    for (size_t row = 0; row < kRows; ++row) {
      const auto got = logits(row);
      const Approx squares = sum(row, E, 0, N);
      const double scale = 1.0 / std::sqrt(squares.value / N + kEps);
      const double relative = squares.error / squares.value + 8 * kUnit;
      for (size_t e = 0; e < E; ++e) {
        const Approx y = sum(row, e, 0, N);
        const double value = y.value * scale;
        const Approx want =
            round_to<T>({value, 1.01 * (y.error * scale + std::abs(value) * relative) +
                                    kUnit * std::abs(value)});
        count += !(std::abs(static_cast<float>(got[e]) - want.value) <= want.error);
      }
    }
    return count;
  }
};

template <typename R>
class Logits : public testing::Test {};
using Runs = testing::Types<Run<64, 40>, Run<32, 15>, Run<0, 48>, Run<0, 300>>;
TYPED_TEST_SUITE(Logits, Runs);

TYPED_TEST(Logits, LieInTheirBounds) {
  TypeParam run;
  EXPECT_EQ(run.outside(), 0u);
  EXPECT_EQ(run.logits_outside(), 0u);
}

// Two rows beside each other have the bits that each has alone.
TYPED_TEST(Logits, DoNotDependOnAnotherRow) {
  TypeParam run;
  const auto [out, sums] = run.template run<1>(Order::shuffled);
  expect_same_bytes(out.values(), run.out);
  expect_same_bytes(sums.values(), run.sums);
}

// The bounds see one step of one weight, a hundredth of one value, a gain's sign.
TYPED_TEST(Logits, TheBoundsSeeFaults) {
  TypeParam run;
  auto faulty = run;
  auto words = run.gate.weight.values();
  words.back() ^= 0x01000000u;
  faulty.gate.weight = Buffer<uint>(words);
  faulty.dense.back() = T(static_cast<float>(run.dense.back()) + 0.01f);
  EXPECT_EQ(faulty.outside(), kRows);
  faulty = run;
  auto& value = faulty.out.back();
  value = T(static_cast<float>(value) * 1.01f);
  EXPECT_GT(faulty.outside(), TypeParam::E * 9 / 10);
  faulty = run;
  auto& gain = faulty.norm[0];
  gain = T(-static_cast<float>(gain));
  EXPECT_EQ(faulty.outside(), kRows * TypeParam::E);
  EXPECT_GT(faulty.logits_outside(), 0u);
}

}  // namespace
