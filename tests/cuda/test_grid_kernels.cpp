// CUDA's GEMV texts in the emulator against fp64 inside a computed bound, and its routers against
// the shared ones bit for bit. The bound is shown to catch what it should.
#include "tensor_kernels.h"
// The texts come first.
#include "harness.h"

namespace {

using namespace harness;
using T = bfloat16_t;

// Row `row` of a stack times x as the grid has it: x is off by at most half a step of its group,
// the step by a few roundings, and every sum in fp32 by as many roundings as it has terms.
Approx grid_dot(const Stack<T>& m, size_t row, const std::vector<double>& x) {
  Approx y;
  double magnitude = 0.0;
  for (size_t group = 0; group < m.cols / 64; ++group) {
    double top = 0.0;
    for (size_t k = group * 64; k < group * 64 + 64; ++k) top = std::max(top, std::abs(x[k]));
    const double off = 0.51 * top / 32512.0;
    for (size_t k = group * 64; k < group * 64 + 64; ++k) {
      const double w = m.scale(row, k) * m.quant(row, k) + m.bias(row, k);
      const double size = std::abs(m.scale(row, k)) * m.quant(row, k) + std::abs(m.bias(row, k));
      y.value += w * x[k];
      y.error += std::abs(w) * off;
      magnitude += size * (std::abs(x[k]) + off);
    }
  }
  y.error += kUnit * (16.0 + m.cols / 256.0) * magnitude;
  return y;
}

template <typename V>
std::vector<double> doubles(const V& values, size_t from, size_t count) {
  std::vector<double> d;
  for (size_t i = 0; i < count; ++i) d.push_back(static_cast<float>(values[from + i]));
  return d;
}

bool inside(float got, Approx want) {
  return std::abs(got - want.value) <= want.error;  // false for NaN
}

struct Linear {
  using T = bfloat16_t;
  static constexpr int ROWS = 2, WARPS = 8, COLS = 320, N = 40, E = 0;
};
struct RoutedLinear {
  using T = bfloat16_t;
  static constexpr int ROWS = 2, WARPS = 8, COLS = 320, N = 64, E = 7;
};
// One piece to each of more warps than eight, the last one short of a slice.
struct WideLinear {
  using T = bfloat16_t;
  static constexpr int ROWS = 2, WARPS = 10, COLS = 2368, N = 40, E = 0;
};
constexpr size_t kRows = 2;

template <typename Linear>
struct LinearRun {
  Stack<T> m{1, Linear::N, Linear::COLS, 4, 64};
  Buffer<float> x{uniform_vector<float>(kRows * Linear::COLS, -2.0f, 2.0f)};
  static constexpr size_t IN = Linear::COLS + Linear::N, E = Linear::E;
  Buffer<float> residual{uniform_vector<float>(kRows * Linear::N, -1.0f, 1.0f)};
  Buffer<float> router{uniform_vector<float>(E ? E * IN : 16, -1.0f, 1.0f)};
  Buffer<float> logits = Buffer<float>::output(0), squares = Buffer<float>::output(0);

  Buffer<float> run() {
    auto [out, l, s] = in_every_order([&](Order order) {
      auto to = Buffer<float>::output(kRows * Linear::N);
      auto gate = Buffer<float>::output(E ? kRows * E : 1);
      auto parts = Buffer<float>::output(E ? kRows * square_parts(Linear::N) : 1);
      kernels::grid_linear_residual<Linear> kernel{x,        m.weight, m.scales, m.biases, router,
                                                   residual, to,       gate,     parts};
      check_sizes(kernel, {.rows = kRows, .capacity = 0, .batches = 0, .sequences = 1});
      emulator::dispatch({(Linear::N + 15) / 16, 1, 1}, 32 * Linear::WARPS, order,
                         [&] { kernel(); });
      return std::tuple(to, gate, parts);
    });
    logits = l;
    squares = s;
    return out;
  }
  // Expert e's logit of row r, but for the norm's scale: a sum of IN products in fp32.
  Approx logit(size_t r, size_t e) const {
    Approx y;
    double size = 0.0;
    for (size_t k = 0; k < IN; ++k) {
      const double v = k < Linear::COLS ? x.values()[r * Linear::COLS + k]
                                        : residual.values()[r * Linear::N + k - Linear::COLS];
      y.value += v * router.values()[e * IN + k];
      size += std::abs(v * router.values()[e * IN + k]);
    }
    return {y.value, size * kUnit * (IN / (32.0 * Linear::WARPS) + 16.0 + Linear::WARPS)};
  }
  size_t logits_outside() const {
    size_t count = 0;
    for (size_t r = 0; r < kRows; ++r)
      for (size_t e = 0; e < E; ++e) count += !inside(logits.values()[r * E + e], logit(r, e));
    return count;
  }
  // How many of the results lie outside their bound.
  size_t outside(const Buffer<float>& out) const {
    size_t count = 0;
    for (size_t r = 0; r < kRows; ++r) {
      const auto row = doubles(x.values(), r * Linear::COLS, Linear::COLS);
      for (size_t n = 0; n < Linear::N; ++n) {
        const Approx want = add({residual.values()[r * Linear::N + n], 0}, grid_dot(m, n, row));
        count += !inside(out.values()[r * Linear::N + n], want);
      }
    }
    return count;
  }
};

TEST(GridKernels, LinearResidualLiesInItsBound) {
  LinearRun<Linear> run;
  EXPECT_EQ(run.outside(run.run()), 0u);
  LinearRun<WideLinear> wide;
  EXPECT_EQ(wide.outside(wide.run()), 0u);
}

TEST(GridKernels, RouterLogitsComeWithTheOutputProjection) {
  LinearRun<RoutedLinear> run;
  const auto out = run.run();
  EXPECT_EQ(run.logits_outside(), 0u);
  for (size_t r = 0; r < kRows; ++r) {
    double squares = 0.0, parts = 0.0;
    for (size_t n = 0; n < RoutedLinear::N; ++n)
      squares += std::pow(double(out.values()[r * RoutedLinear::N + n]), 2);
    for (int i = 0; i < square_parts(RoutedLinear::N); ++i)
      parts += run.squares.values()[r * square_parts(RoutedLinear::N) + i];
    EXPECT_NEAR(parts, squares, squares * 8 * kUnit);
  }
  // Expert 6 is the last block's only one; its last weight belongs to the row's last value.
  auto weights = run.router.values();
  weights.back() += 0x1p-5f;
  run.router = Buffer<float>(weights);
  EXPECT_EQ(run.logits_outside(), kRows);
}

struct Fold {
  using T = bfloat16_t;
  static constexpr int E = 6, H = 40, K = 192;
};

// Rounded once, where fp64 leaves no doubt.
TEST(GridKernels, FoldedRouterIsTheProductOfItsMatrices) {
  constexpr size_t E = Fold::E, H = Fold::H, K = Fold::K;
  Stack<T> o(1, H, K, 4, 64);
  Buffer<float> gate(uniform_vector<float>(E * H, -1.0f, 1.0f));
  Buffer<T> norm(uniform_vector<T>(H, 0.5f, 1.5f));
  auto [out] = in_every_order([&](Order order) {
    auto to = Buffer<float>::output(E * (K + H));
    kernels::fold_router<Fold> kernel{gate, norm, o.weight, o.scales, o.biases, to};
    check_sizes(kernel, {.rows = 1, .capacity = 0, .batches = 0, .sequences = 1});
    emulator::dispatch({1, 2, 1}, 256, order, [&] { kernel(); });
    return std::tuple(to);
  });
  for (size_t e = 0; e < E; ++e) {
    for (size_t k = 0; k < K + H; ++k) {
      double y = 0.0;
      for (size_t n = 0; n < H; ++n) {
        const double w = k < K ? o.scale(n, k) * o.quant(n, k) + o.bias(n, k) : double(n == k - K);
        y += double(gate.values()[e * H + n]) * double(float(norm.values()[n])) * w;
      }
      EXPECT_NEAR(out.values()[e * (K + H) + k], y, 0x1.01p-24 * std::abs(y) + 1e-12) << e << k;
    }
  }
}

// The bound is no wider than it must be: one step of one weight is seen, at the last place too.
TEST(GridKernels, TheBoundSeesAChangedWeight) {
  LinearRun<Linear> run;
  const auto out = run.run();
  auto words = run.m.weight.values();
  words.back() ^= 0x40000000u;
  run.m.weight = Buffer<uint>(words);
  EXPECT_EQ(run.outside(out), kRows);
}

TEST(GridKernels, TheBoundSeesASign) {
  LinearRun<Linear> run;
  const auto out = run.run();
  auto values = run.x.values();
  values.back() = -values.back() - 1.0f;
  run.x = Buffer<float>(values);
  EXPECT_GT(run.outside(out), Linear::N / 2);
}

TEST(GridKernels, NanReachesEveryResultOfItsRow) {
  LinearRun<Linear> run;
  auto values = run.x.values();
  values[Linear::COLS + 7] = NAN;
  run.x = Buffer<float>(values);
  const auto out = run.run();
  for (size_t n = 0; n < Linear::N; ++n) {
    EXPECT_FALSE(std::isnan(out.values()[n])) << n;
    EXPECT_TRUE(std::isnan(out.values()[Linear::N + n])) << n;
  }
}

struct Project {
  using T = bfloat16_t;
  static constexpr int ROWS = 1, WARPS = 8, TILES = 2, H = 576, STRIDE = 640, NQ = 48, NK = 16,
                       NV = 21;
};

TEST(GridKernels, ProjectLiesInItsBound) {
  using P = Project;
  Stack<T> q(1, P::NQ, P::H, 4, 64), k(1, P::NK, P::H, 4, 64), v(1, P::NV, P::H, 4, 64);
  Buffer<float> x(uniform_vector<float>(P::STRIDE, -3.0f, 3.0f));
  Buffer<T> norm(uniform_vector<T>(P::H, 0.5f, 1.5f));
  Buffer<float> eps(std::vector<float>(16, 1e-6f));
  constexpr int N = P::NQ + P::NK + P::NV;
  auto [out] = in_every_order([&](Order order) {
    auto to = Buffer<float>::output(N);
    kernels::grid_project<P> kernel{x,        norm,     eps,      q.weight, q.scales,
                                    q.biases, k.weight, k.scales, k.biases, v.weight,
                                    v.scales, v.biases, to};
    check_sizes(kernel, {.rows = 1, .capacity = 0, .batches = 0, .sequences = 1});
    emulator::dispatch({3, 1, 1}, 256, order, [&] { kernel(); });
    return std::tuple(to);
  });
  const auto row = doubles(x.values(), 0, P::H), gains = doubles(norm.values(), 0, P::H);
  double squares = 0.0;
  std::vector<double> gained;
  for (int i = 0; i < P::H; ++i) {
    squares += row[i] * row[i];
    gained.push_back(static_cast<float>(row[i] * gains[i]));
  }
  const double scale = 1.0 / std::sqrt(squares / P::H + 1e-6);
  for (int n = 0; n < N; ++n) {
    const Stack<T>& m = n < P::NQ ? q : n < P::NQ + P::NK ? k : v;
    Approx y = grid_dot(m,
                        n < P::NQ           ? n
                        : n < P::NQ + P::NK ? n - P::NQ
                                            : n - P::NQ - P::NK,
                        gained);
    const double size = std::abs(y.value) + y.error;
    y = {y.value * scale, y.error * scale + size * scale * 64 * kUnit};
    EXPECT_TRUE(inside(out.values()[n], y)) << n;
  }
}

// ---- a matrix for each head ----

// The last block has half of its rows, and more rows than a thread to each quarter.
template <int Tiles>
struct OfHeads {
  using T = bfloat16_t;
  static constexpr int TILES = Tiles, HEADS = 2, X_HEAD = 256, PART = 192, LORA = PART, SPLITS = 1;
  static constexpr int N = Tiles * 24, V = N;
};

template <int TILES>
void expect_products_of_heads() {
  using P = OfHeads<TILES>;
  constexpr size_t ROWS = 2, BLOCKS = (P::N + TILES * 16 - 1) / (TILES * 16);
  Stack<T> m(P::HEADS, P::N, P::PART, 4, 64);
  Buffer<float> x(uniform_vector<float>(ROWS * P::HEADS * P::X_HEAD, -2.0f, 2.0f));
  Buffer<float> partial(uniform_vector<float>(ROWS * P::HEADS * P::LORA, -2.0f, 2.0f));
  Buffer<float> stats(std::vector<float>(ROWS * P::HEADS * 2, 1.0f));
  Buffer<uint> places(std::vector<uint>(ROWS * 4, 0u));
  const auto run = [&](auto type, auto make) {
    return std::get<0>(in_every_order([&](Order order) {
      auto out = Buffer<decltype(type)>::output(ROWS * P::HEADS * P::N);
      auto kernel = make(out);
      check_sizes(kernel, {.rows = ROWS, .capacity = 0, .batches = 0, .sequences = 1});
      emulator::dispatch({BLOCKS, P::HEADS, ROWS}, 256, order, [&] { kernel(); });
      return std::tuple(out);
    }));
  };
  // rounding: of what is stored, relative.
  const auto expect = [&](const auto& got, double rounding, const Buffer<float>& of,
                          size_t stride) {
    for (size_t head = 0; head < ROWS * P::HEADS; ++head) {
      const auto part = doubles(of.values(), head * stride, P::PART);
      for (size_t n = 0; n < P::N; ++n) {
        Approx y = grid_dot(m, head % P::HEADS * P::N + n, part);
        y.error += rounding * (std::abs(y.value) + y.error);
        EXPECT_TRUE(inside(float(got.values()[head * P::N + n]), y))
            << "head " << head << ", row " << n << " of " << TILES << " tiles";
      }
    }
  };
  using T = typename P::T;
  expect(run(T{},
             [&](Buffer<T>& out) {
               return kernels::grid_heads<P>{x, m.weight, m.scales, m.biases, out};
             }),
         0x1p-8, x, P::X_HEAD);
  expect(run(0.0f,
             [&](Buffer<float>& out) {
               return kernels::grid_unembed<P>{partial,  stats,    places, m.weight,
                                               m.scales, m.biases, out};
             }),
         0.0, partial, P::LORA);
}

TEST(GridKernels, MatrixOfAHeadInTiles) {
  expect_products_of_heads<3>();
  expect_products_of_heads<8>();
}

// ---- several rows, several tiles ----

template <int Rows, int Cols>
struct Together {
  using T = bfloat16_t;
  static constexpr int ROWS = Rows, WARPS = 8, COLS = Cols, N = 64, E = 3;
};

// What a row's products and logits are does not depend on how many rows share the weights.
template <int ROWS, int COLS>
void expect_rows_as_alone() {
  using P = Together<ROWS, COLS>;
  using Alone = Together<1, COLS>;
  constexpr size_t N = P::N, E = P::E;
  Stack<T> m(1, N, COLS, 4, 64);
  const auto x = uniform_vector<float>(ROWS * COLS, -2.0f, 2.0f);
  const auto residual = uniform_vector<float>(ROWS * N, -1.0f, 1.0f);
  Buffer<float> router(uniform_vector<float>(E * (COLS + N), -1.0f, 1.0f));
  const auto run = [&]<class Params>(Params, size_t first, size_t rows) {
    const auto part = [&](const std::vector<float>& v, size_t width) {
      return Buffer<float>(
          std::vector<float>(v.begin() + first * width, v.begin() + (first + rows) * width));
    };
    Buffer<float> in = part(x, COLS), before = part(residual, N);
    return in_every_order([&](Order order) {
      auto out = Buffer<float>::output(rows * N), logits = Buffer<float>::output(rows * E);
      auto squares = Buffer<float>::output(rows * square_parts(N));
      kernels::grid_linear_residual<Params> kernel{in,     m.weight, m.scales, m.biases, router,
                                                   before, out,      logits,   squares};
      check_sizes(kernel, {.rows = rows, .capacity = 0, .batches = 0, .sequences = 1});
      emulator::dispatch({N / 16, 1, 1}, 256, order, [&] { kernel(); });
      return std::tuple(out, logits, squares);
    });
  };
  const auto together = run(P{}, 0, ROWS);
  for (size_t r = 0; r < ROWS; ++r) {
    const auto alone = run(Alone{}, r, 1);
    const auto same = [&](const auto& all, const auto& own, const char* what) {
      const size_t width = own.values().size();
      for (size_t i = 0; i < width; ++i)
        EXPECT_EQ(as_uint(all.values()[r * width + i]), as_uint(own.values()[i]))
            << what << ", row " << r << " of " << ROWS << ", " << i;
    };
    same(std::get<0>(together), std::get<0>(alone), "out");
    same(std::get<1>(together), std::get<1>(alone), "logits");
    same(std::get<2>(together), std::get<2>(alone), "squares");
  }
}

TEST(GridKernels, ARowAmongOthersHasTheBitsThatItHasAlone) {
  expect_rows_as_alone<2, 832>();
  expect_rows_as_alone<3, 832>();
  expect_rows_as_alone<4, 832>();
  expect_rows_as_alone<4, 2368>();  // ten slices for eight warps
}

template <int Rows>
struct Logits {
  using T = bfloat16_t;
  static constexpr int ROWS = Rows, DEPTH = 1, H = 832, N = 150;
};

template <int ROWS>
std::vector<float> head_of(Stack<T>& m, const std::vector<float>& x, Buffer<T>& norm) {
  using P = Logits<ROWS>;
  Buffer<float> in(x), eps(std::vector<float>(16, 1e-6f));
  auto [out] = in_every_order([&](Order order) {
    auto to = Buffer<float>::output(ROWS * P::N);
    kernels::grid_head<P> kernel{in, norm, eps, m.weight, m.scales, m.biases, to};
    check_sizes(kernel, {.rows = ROWS, .capacity = 0, .batches = 0, .sequences = 1});
    emulator::dispatch({1, 1, 1}, 256, order, [&] { kernel(); });
    return std::tuple(to);
  });
  return out.values();
}

TEST(GridKernels, HeadOfARowAmongOthersHasTheBitsThatItHasAlone) {
  using P = Logits<1>;
  Stack<T> m(1, P::N, P::H, 4, 64);
  Buffer<T> norm(uniform_vector<T>(P::H, 0.5f, 1.5f));
  const auto x = uniform_vector<float>(4 * P::H, -3.0f, 3.0f);
  const auto three = head_of<3>(m, {x.begin(), x.begin() + 3 * P::H}, norm);
  const auto four = head_of<4>(m, x, norm);
  for (size_t r = 0; r < 4; ++r) {
    const auto alone = head_of<1>(m, {x.begin() + r * P::H, x.begin() + (r + 1) * P::H}, norm);
    for (size_t n = 0; n < P::N; ++n) {
      EXPECT_EQ(as_uint(four[r * P::N + n]), as_uint(alone[n])) << r << ", " << n;
      if (r == 3) continue;
      EXPECT_EQ(as_uint(three[r * P::N + n]), as_uint(alone[n])) << r << ", " << n;
    }
  }
}

// The tokens of grid_head_greedy and sample_greedy.
template <int Rows, int Blocks>
struct Greedy : Logits<Rows> {
  static constexpr int BLOCKS = Blocks, PARTS = Blocks;
};
template <int ROWS, int BLOCKS>
std::vector<uint> tokens_of(Stack<T>& m, const std::vector<float>& x, Buffer<T>& norm) {
  using P = Greedy<ROWS, BLOCKS>;
  Buffer<float> in(x), eps(std::vector<float>(16, 1e-6f));
  const kernels::Sizes sizes = {.rows = ROWS, .capacity = 0, .batches = 0, .sequences = 1};
  auto [out] = in_every_order([&](Order order) {
    auto tops = Buffer<uint>::output(ROWS * P::BLOCKS), places = tops;
    auto token = Buffer<uint>::output(ROWS);
    kernels::grid_head_greedy<P> head{in, norm, eps, m.weight, m.scales, m.biases, tops, places};
    kernels::sample_greedy<P> sample{tops, places, token};
    check_sizes(head, sizes);
    check_sizes(sample, sizes);
    emulator::dispatch({P::BLOCKS, 1, 1}, 256, order, [&] { head(); });
    emulator::dispatch({ROWS, 1, 1}, 32, order, [&] { sample(); });
    return std::tuple(token);
  });
  return out.values();
}

template <int ROWS, int BLOCKS>
void expect_tokens_of_the_logits(Stack<T>& m, const std::vector<float>& all, Buffer<T>& norm) {
  using P = Logits<ROWS>;
  const std::vector<float> x(all.begin(), all.begin() + ROWS * P::H);
  const auto logits = head_of<ROWS>(m, x, norm);
  const auto tokens = tokens_of<ROWS, BLOCKS>(m, x, norm);
  for (int r = 0; r < ROWS; ++r) {
    const auto row = logits.begin() + r * P::N;
    const auto number = [](float v) { return std::isnan(v) ? INFINITY : v; };
    const auto want =
        std::max_element(row, row + P::N, [&](float a, float b) { return number(a) < number(b); });
    EXPECT_EQ(tokens[r], want - row) << "row " << r << " of " << ROWS;
  }
}

template <typename V>
Buffer<V> twice(const Buffer<V>& half) {
  std::vector<V> all = half.values();
  all.insert(all.end(), half.values().begin(), half.values().end());
  return Buffer<V>(all);
}

// Each row of the matrix stands there twice, so that every largest logit has an equal one in
// another tile; at last a row of what is no number, of which the first is the token.
TEST(GridKernels, GreedyHeadHasTheFirstOfTheLargestLogits) {
  using P = Logits<1>;
  Stack<T> m(1, P::N / 2, P::H, 4, 64);
  m.weight = twice(m.weight);
  m.scales = twice(m.scales);
  m.biases = twice(m.biases);
  Buffer<T> norm(uniform_vector<T>(P::H, 0.5f, 1.5f));
  for (int draw = 0; draw < 6; ++draw) {
    auto x = uniform_vector<float>(4 * P::H, -3.0f, 3.0f);
    if (draw == 5) x[P::H + 70] = NAN;
    expect_tokens_of_the_logits<1, 1>(m, x, norm);
    expect_tokens_of_the_logits<1, 2>(m, x, norm);
    expect_tokens_of_the_logits<3, 1>(m, x, norm);
    expect_tokens_of_the_logits<4, 2>(m, x, norm);
  }
}

template <int Tiles, int Warps, int Depth>
struct Moe {
  using T = bfloat16_t;
  static constexpr int TILES = Tiles, WARPS = Warps, DEPTH = Depth, E = 5, K = 4, D = 128, I = 576;
  static constexpr int H = 320, COMBINE = 1;
  static constexpr bool NORM = true, SOFTMAX = true, SHARED = true;
};

// A layer's experts for two rows, the results of gate and up beside those of down.
struct Experts5 {
  using P = Moe<1, 1, 0>;
  static constexpr size_t kSlots = P::K + 1;
  Stack<T> down{P::E, P::D, P::I, 4, 64}, shared_down{1, P::D, P::I, 4, 64};
  Stack<T> gate{P::E, P::I, P::H, 4, 64}, up{P::E, P::I, P::H, 4, 64};
  Stack<T> shared_gate{1, P::I, P::H, 4, 64}, shared_up{1, P::I, P::H, 4, 64};
  Buffer<float> hidden{uniform_vector<float>(kRows * kSlots * P::I, -2.0f, 2.0f)};
  Buffer<float> logits{uniform_vector<float>(kRows * P::E, -2.0f, 2.0f)};
  Buffer<float> x{uniform_vector<float>(kRows * P::H, -2.0f, 2.0f)};
  Buffer<float> squares_d{uniform_vector<float>(kRows * P::D / 8, 4.0f, 8.0f)};
  Buffer<float> squares_h{uniform_vector<float>(kRows * P::H / 8, 4.0f, 8.0f)};
  Buffer<float> eps{std::vector<float>(16, 1e-6f)}, bias{std::vector<float>(16, 0.0f)};
  Buffer<float> scaling{std::vector<float>(16, 1.0f)};
  Buffer<float> residual{uniform_vector<float>(kRows * P::D, -1.0f, 1.0f)};
  Buffer<T> norm{uniform_vector<T>(P::H, 0.5f, 1.5f)};

  template <int TILES, int WARPS, int DEPTH>
  std::vector<float> run_down() {
    using Params = Moe<TILES, WARPS, DEPTH>;
    auto [out] = in_every_order([&](Order order) {
      auto to = Buffer<float>::output(kRows * P::D);
      kernels::grid_down<Params> kernel{hidden,
                                        logits,
                                        squares_d,
                                        eps,
                                        bias,
                                        scaling,
                                        down.weight,
                                        down.scales,
                                        down.biases,
                                        shared_down.weight,
                                        shared_down.scales,
                                        shared_down.biases,
                                        residual,
                                        to};
      check_sizes(kernel, {.rows = kRows, .capacity = 0, .batches = 0, .sequences = 1});
      emulator::dispatch({blocks(P::D, 16 * TILES), kRows, 1}, 32 * WARPS * kSlots, order,
                         [&] { kernel(); });
      return std::tuple(to);
    });
    return out.values();
  }
  template <int TILES, int DEPTH>
  std::vector<float> run_gate_up() {
    using Params = Moe<TILES, 8, DEPTH>;
    auto [out] = in_every_order([&](Order order) {
      auto to = Buffer<float>::output(kRows * kSlots * P::I);
      kernels::grid_gate_up<Params> kernel{x,
                                           norm,
                                           eps,
                                           logits,
                                           squares_h,
                                           bias,
                                           gate.weight,
                                           gate.scales,
                                           gate.biases,
                                           up.weight,
                                           up.scales,
                                           up.biases,
                                           shared_gate.weight,
                                           shared_gate.scales,
                                           shared_gate.biases,
                                           shared_up.weight,
                                           shared_up.scales,
                                           shared_up.biases,
                                           to};
      check_sizes(kernel, {.rows = kRows, .capacity = 0, .batches = 0, .sequences = 1});
      emulator::dispatch({blocks(P::I, 16 * TILES), kSlots, kRows}, 256, order, [&] { kernel(); });
      return std::tuple(to);
    });
    return out.values();
  }
};

void expect_same_bits(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(as_uint(a[i]), as_uint(b[i])) << what << i;
}

// A batch's rows take more tiles to a block, and fewer of a warp's pieces at a time, than one row.
// Warps that do not share a tile's slices evenly would add them up in another order: the walk does
// not let them have several.
TEST(GridKernels, TilesAndDepthDoNotChangeABit) {
  Experts5 run;
  const auto down = run.run_down<1, 1, 0>();
  expect_same_bits(down, (run.run_down<2, 1, 2>()), "down, two tiles ");
  expect_same_bits(down, (run.run_down<2, 1, 0>()), "down, two tiles at once ");
  expect_same_bits(down, (run.run_down<1, 1, 2>()), "down, two pieces ");
  const auto gate_up = run.run_gate_up<1, 4>();
  expect_same_bits(gate_up, (run.run_gate_up<4, 2>()), "gate and up, four tiles ");
  expect_same_bits(gate_up, (run.run_gate_up<8, 2>()), "gate and up, eight tiles ");
  expect_same_bits(gate_up, (run.run_gate_up<8, 3>()), "gate and up, an odd number of pieces ");
}

// ---- the routers ----

// Runs `choose` in one warp; lane 0's choice.
template <int K, typename Choose>
Choice<K> by_a_warp(const Choose& choose) {
  Choice<K> chosen{};
  emulator::dispatch({1, 1, 1}, 32, Order::shuffled, [&] {
    const Choice<K> mine = choose(emulator::lane());
    if (emulator::lane() == 0) chosen = mine;
  });
  return chosen;
}

template <int E>
Spread<E> spread_of(const std::vector<float>& values, uint lane) {
  Spread<E> s;
  for (int p = 0; p < (E + 31) / 32; ++p) {
    const size_t i = lane + 32u * p;
    s.v[p] = i < values.size() ? values[i] : 0.0f;
  }
  return s;
}

std::vector<std::vector<float>> rows_of(size_t experts) {
  std::vector<std::vector<float>> rows;
  for (int i = 0; i < 40; ++i) {
    std::vector<float> row = uniform_vector<float>(experts, -4.0f, 4.0f);
    for (float& v : row) v = static_cast<float>(T(i % 4 == 0 ? std::round(v) : v));  // with ties
    if (i == 1) row.assign(experts, 0.5f);
    if (i == 2) row[experts - 1] = INFINITY;
    if (i == 3) row[3] = -INFINITY;
    if (i == 5) row[experts / 2] = NAN;
    if (i % 4 == 2) {  // neighbours by one bit, the lower index above and below
      const size_t at = i % experts, next = (at + experts / 2) % experts;
      row[at] = 5.0f;
      row[next] = std::nextafter(5.0f, i % 8 == 2 ? 6.0f : 4.0f);
    }
    if (i % 4 == 3) {  // neighbours by five bits of a sigmoid, which packed keys do not tell apart
      const size_t at = i % experts, next = (at + experts / 2) % experts;
      row[at] = 4.5f;
      row[next] = 4.5f + (i % 8 == 3 ? 3e-5f : -3e-5f);
    }
    rows.push_back(row);
  }
  return rows;
}

template <int K>
void expect_same(const Choice<K>& a, const Choice<K>& b, size_t row) {
  for (int i = 0; i < K; ++i) {
    EXPECT_EQ(a.index[i], b.index[i]) << "row " << row << ", place " << i;
    EXPECT_EQ(as_uint(a.value[i]), as_uint(b.value[i])) << "row " << row << ", place " << i;
  }
}

template <int K>
Choice<K> weighed(uint chosen, float weight) {
  Choice<K> both{};
  for (uint i = 0; i < K; ++i) {
    both.index[i] = shuffle(chosen, i);
    both.value[i] = shuffle(weight, i);
  }
  return both;
}

std::vector<float> times(std::vector<float> row, float norm) {
  for (float& v : row) v *= norm;
  return row;
}

template <int E, int K, bool NORM>
void compare_softmax(float norm) {
  const auto rows = rows_of(E);
  for (size_t r = 0; r < rows.size(); ++r) {
    if (std::any_of(rows[r].begin(), rows[r].end(), [](float v) { return !std::isfinite(v); }) &&
        r != 3)
      continue;  // every score is NaN: whichever are chosen
    const auto want = by_a_warp<K>([&](uint lane) {
      return route_softmax<float, E, K, NORM>(spread_of<E>(times(rows[r], norm), lane), lane);
    });
    expect_same<K>(by_a_warp<K>([&](uint lane) {
                     const auto logits = spread_of<E>(rows[r], lane);
                     const auto chosen =
                         choose_experts<E, K, true>(logits, norm, {}, lane, [](uint) {});
                     return weighed<K>(
                         chosen, weigh_experts<E, K, NORM, true>(logits, norm, chosen, 1.0f, lane));
                   }),
                   want, r);
  }
}

TEST(GridKernels, SoftmaxRouterChoosesAsTheSharedOne) {
  for (float norm : {1.0f, 0.37f, 41.3f}) {
    compare_softmax<128, 8, true>(norm);
    compare_softmax<40, 8, false>(norm);
    compare_softmax<10, 3, true>(norm);
  }
}

template <int E, int K>
void compare_sigmoid(float norm, float spread) {
  const auto rows = rows_of(E);
  const std::vector<float> bias = uniform_vector<float>(E, -spread, spread);
  for (size_t r = 0; r < rows.size(); ++r) {
    const auto want = by_a_warp<K>([&](uint lane) {
      return route_sigmoid<E, K, true>(spread_of<E>(times(rows[r], norm), lane), bias, 1.8f, lane);
    });
    expect_same<K>(by_a_warp<K>([&](uint lane) {
                     const auto logits = spread_of<E>(rows[r], lane);
                     const auto chosen = choose_experts<E, K, false>(
                         logits, norm, spread_of<E>(bias, lane), lane, [](uint) {});
                     return weighed<K>(chosen, weigh_experts<E, K, true, false>(
                                                   logits, norm, chosen, 1.8f, lane));
                   }),
                   want, r);
  }
}

TEST(GridKernels, SigmoidRouterChoosesAsTheSharedOne) {
  for (float norm : {1.0f, 0.37f}) {
    compare_sigmoid<64, 4>(norm, 0.2f);
    compare_sigmoid<48, 4>(norm, 0.2f);
    compare_sigmoid<48, 4>(norm, 0.0f);
  }
}

}  // namespace
