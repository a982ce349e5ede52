// MLX's own Metal kernels beside ours in the emulator, on the same inputs: our error against fp64
// is not larger than theirs. Theirs are read from the headers of the installed wheel.
#include <array>
#include <numeric>

#include "oracle.h"
#include "stock/stock_kernels.h"

float emulated_exp(float x) {
  return exp_fp32(x);
}

namespace {

using namespace harness;

struct Stock : testing::Test {
  void SetUp() override {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("fma")) GTEST_SKIP() << "this machine has no fused multiply-add";
#endif
  }
};

// The errors of one set of inputs go together, so each comparison takes this many and pairs them.
constexpr int kSets = 64;

// Squared differences from fp64, summed for each set.
struct Error {
  std::vector<double> squares;
  double values = 0.0;
  void add(size_t set, double got, double want) {
    ASSERT_FALSE(std::isnan(got));
    squares.resize(std::max(squares.size(), set + 1));
    squares[set] += (got - want) * (got - want);
    values += want * want;
  }
  double rms() const {
    return std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0) / values);
  }
};

// Over the sets, the mean of log(our squares / stock's) is not above 0 by more than chance: three
// standard errors of that mean.
void expect_not_larger(const char* what, const Error& ours, const Error& stock) {
  double sum = 0.0, squares = 0.0;
  const double n = ours.squares.size();
  for (size_t i = 0; i < n; ++i) {
    const double d = std::log(ours.squares[i] / stock.squares[i]);
    sum += d;
    squares += d * d;
  }
  const double mean = sum / n, deviation = std::sqrt(std::max(0.0, squares / n - mean * mean));
  EXPECT_LE(mean, 3 * deviation / std::sqrt(n)) << what;
  std::printf("%s: rms error %.4g, stock %.4g\n", what, ours.rms(), stock.rms());
}
void expect_not_larger(const std::string& what, const Error& ours, const Error& apart,
                       const Error& fused) {
  expect_not_larger((what + ", stock apart").c_str(), ours, apart);
  expect_not_larger((what + ", stock fused").c_str(), ours, fused);
}

template <typename T>
struct Gathered {
  std::vector<T> apart, fused;
};

// Both forms of stock's gather_qmv: batch b takes row rows_of_x[b] of x and matrix experts[b].
template <typename T, int GROUP, int BITS>
Gathered<T> stock_gather(const Stack<T>& w, const std::vector<T>& x,
                         const std::vector<uint>& rows_of_x, const std::vector<uint>& experts) {
  const size_t batches = experts.size();
  Gathered<T> out{std::vector<T>(batches * w.rows), std::vector<T>(batches * w.rows)};
  StockGather<T> call{w.weight.values().data(),
                      w.scales.values().data(),
                      w.biases.values().data(),
                      x.data(),
                      rows_of_x.data(),
                      experts.data(),
                      out.apart.data(),
                      int(batches),
                      int(w.rows),
                      int(w.cols),
                      int(x.size() / w.cols),
                      int(w.scales.values().size() / (w.rows * w.cols / w.group))};
  stock_apart::gather_qmv<T, GROUP, BITS>(call);
  call.out = out.fused.data();
  stock_fused::gather_qmv<T, GROUP, BITS>(call);
  return out;
}

// ---- one matrix ----

template <typename T_, int BITS_, int GROUP_, int COLS_, int ROWS_>
struct LinearParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, COLS = COLS_, ROWS = ROWS_;
};

template <class P>
void compare_matrix(const char* what) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(kSets * P::COLS, -1.0f, 1.0f));
  Buffer<T> zero(std::vector<T>(kSets * P::ROWS, T(0.0f)));
  Stack<T> w(1, P::ROWS, P::COLS, P::BITS, P::GROUP);
  auto out = Buffer<T>::output(kSets * P::ROWS);
  launch(kernels::linear_residual<P>{x, w.weight, w.scales, w.biases, zero, out}, {.rows = kSets},
         {blocks(P::ROWS, 8), kSets, 1}, 64, Order::forward);
  std::vector<uint> sets(kSets);
  std::iota(sets.begin(), sets.end(), 0u);
  const auto stock =
      stock_gather<T, P::GROUP, P::BITS>(w, x.values(), sets, std::vector<uint>(kSets, 0u));
  Error ours, apart, fused;
  for (size_t i = 0; i < kSets * P::ROWS; ++i) {
    const size_t row = i / P::ROWS * P::COLS;
    const auto at = [&](size_t k) { return Approx{static_cast<float>(x.values()[row + k]), 0}; };
    const double want = w.dot(i % P::ROWS, at).value;
    ours.add(i / P::ROWS, static_cast<float>(out.values()[i]), want);
    apart.add(i / P::ROWS, static_cast<float>(stock.apart[i]), want);
    fused.add(i / P::ROWS, static_cast<float>(stock.fused[i]), want);
  }
  expect_not_larger(what, ours, apart, fused);
}

TEST_F(Stock, QmvFast) {
  compare_matrix<LinearParams<float, 4, 64, 2048, 24>>("qmv_fast, fp32");
  compare_matrix<LinearParams<bfloat16_t, 4, 64, 2048, 24>>("qmv_fast, bf16");
  compare_matrix<LinearParams<float, 8, 64, 2048, 24>>("qmv_fast, fp32, 8 bits");
}
TEST_F(Stock, QmvWhereTheFastOneDoesNotApply) {
  compare_matrix<LinearParams<float, 4, 64, 768, 40>>("qmv, K 768, fp32");
  compare_matrix<LinearParams<bfloat16_t, 4, 64, 768, 40>>("qmv, K 768, bf16");
  compare_matrix<LinearParams<float16_t, 4, 32, 96, 33>>("qmv, K 96, 33 rows, fp16");
}

// ---- the experts of a row ----

template <typename T_, int COMBINE_>
struct BlockParams {
  using T = T_;
  static constexpr bool STEPS = COMBINE_ == 0;
  using U = std::conditional_t<STEPS, T, float>;
  static constexpr int BITS = 4, GROUP = 64, E = 6, K = 4, H = 256, I = 64, D = 32;
  static constexpr int COMBINE = COMBINE_;
};

// silu(gate) * up and the product with the weight as separate ops in T.
template <typename T>
T stock_swiglu(T gate, T up) {
  const float x = gate, e = T(exp_fp32(std::abs(x)));
  const float y = T(1.0f / static_cast<float>(T(1.0f + e)));
  const T sigmoid = x < 0 ? T(y) : T(1.0f - y);
  return T(static_cast<float>(T(x * static_cast<float>(sigmoid))) * static_cast<float>(up));
}

template <typename T>
struct Block {
  Stack<T> gate{6, 64, 256, 4, 64}, up{6, 64, 256, 4, 64}, down{6, 32, 64, 4, 64};
  std::vector<T> x, weights;
  std::vector<uint> experts = {5, 0, 3, 2};

  template <bool FUSED>
  std::vector<T> stock() const {
    auto pick = [](const Gathered<T>& g) { return FUSED ? g.fused : g.apart; };
    const auto g = pick(stock_gather<T, 64, 4>(gate, x, {0, 0, 0, 0}, experts));
    const auto u = pick(stock_gather<T, 64, 4>(up, x, {0, 0, 0, 0}, experts));
    std::vector<T> hidden(g.size()), out(32);
    for (size_t i = 0; i < g.size(); ++i) hidden[i] = stock_swiglu(g[i], u[i]);
    auto y = pick(stock_gather<T, 64, 4>(down, hidden, {0, 1, 2, 3}, experts));
    for (size_t i = 0; i < y.size(); ++i)
      y[i] = T(static_cast<float>(y[i]) * static_cast<float>(weights[i / 32]));
    stock_apart::sum_rows<T>(y.data(), out.data(), 4, 32);
    return out;
  }

  template <class P>
  std::vector<T> ours() const {
    Stack<T> g = gate, u = up, d = down;
    Buffer<T> in(x);
    Buffer<uint> chosen(experts);
    Buffer<float> w(std::vector<float>(weights.begin(), weights.end()));
    auto hidden = Buffer<typename P::U>::output(4 * 64);
    auto out = Buffer<T>::output(32);
    launch(kernels::moe_experts_gate_up<P>{in, chosen, g.weight, g.scales, g.biases, u.weight,
                                           u.scales, u.biases, hidden},
           {}, {8, 4, 1}, 64, Order::forward);
    launch(kernels::moe_experts_down<P>{hidden, chosen, w, d.weight, d.scales, d.biases, out}, {},
           {8, 1, 1}, 128, Order::forward);
    return out.values();
  }

  std::vector<double> fp64() const {
    auto in = [&](size_t k) { return Approx{static_cast<float>(x[k]), 0}; };
    std::vector<double> out(32, 0.0);
    for (size_t e = 0; e < 4; ++e) {
      std::vector<double> hidden;
      for (size_t i = 0; i < 64; ++i) {
        const double g = gate.dot(experts[e] * 64 + i, in).value;
        hidden.push_back(g / (1 + std::exp(-g)) * up.dot(experts[e] * 64 + i, in).value);
      }
      for (size_t d = 0; d < 32; ++d) {
        const double y = down.dot(experts[e] * 32 + d,
                                  [&](size_t i) {
                                    return Approx{hidden[i], 0};
                                  })
                             .value;
        out[d] += static_cast<float>(weights[e]) * y;
      }
    }
    return out;
  }
};

template <typename T, int COMBINE>
void compare_block(const char* what) {
  Error mine, theirs, theirs_fused;
  Block<T> block;
  for (int set = 0; set < kSets / 2; ++set) {
    block.x = uniform_vector<T>(256, -1.0f, 1.0f);
    block.weights = uniform_vector<T>(4, 0.1f, 0.4f);
    const auto want = block.fp64();
    const auto ours = block.template ours<BlockParams<T, COMBINE>>();
    const auto apart = block.template stock<false>(), fused = block.template stock<true>();
    for (size_t d = 0; d < want.size(); ++d) {
      mine.add(set, static_cast<float>(ours[d]), want[d]);
      theirs.add(set, static_cast<float>(apart[d]), want[d]);
      theirs_fused.add(set, static_cast<float>(fused[d]), want[d]);
    }
  }
  expect_not_larger(what, mine, theirs, theirs_fused);
}

TEST_F(Stock, ExpertsExact) {
  compare_block<float, 0>("experts, exact, fp32");
  compare_block<bfloat16_t, 0>("experts, exact, bf16");
  compare_block<float16_t, 0>("experts, exact, fp16");
}
TEST_F(Stock, ExpertsFp32NoFma) {
  compare_block<float, 1>("experts, fp32_no_fma, fp32");
  compare_block<bfloat16_t, 1>("experts, fp32_no_fma, bf16");
}

// ---- the order and the dtype of sums ----

template <typename T_, int K_>
struct CombineParams {
  using T = T_;
  static constexpr int K = K_, D = 256, COMBINE = 0;
};

// exact, given equal inputs, is bit for bit what stock's multiply and column reduction give: a sum
// of halves in halves, the experts in order.
template <typename T, int K>
void compare_combine() {
  Buffer<T> y(uniform_vector<T>(K * 256, -2.0f, 2.0f));
  const auto weights = uniform_vector<T>(K, 0.0f, 1.0f);
  Buffer<float> w(std::vector<float>(weights.begin(), weights.end()));
  auto out = Buffer<T>::output(256);
  launch(kernels::moe_combine<CombineParams<T, K>>{y, w, out}, {}, {1, 1, 1}, 256, Order::forward);
  std::vector<T> products, stock(256);
  for (size_t i = 0; i < K * 256; ++i)
    products.push_back(T(static_cast<float>(y.values()[i]) * static_cast<float>(weights[i / 256])));
  stock_apart::sum_rows<T>(products.data(), stock.data(), K, 256);
  EXPECT_EQ(std::memcmp(stock.data(), out.values().data(), 256 * sizeof(T)), 0) << "K " << K;
}

TEST_F(Stock, CombineExactHasTheBitsOfStock) {
  compare_combine<bfloat16_t, 8>();
  compare_combine<bfloat16_t, 2>();
  compare_combine<float16_t, 4>();
  compare_combine<float, 8>();
}

// ---- softmax ----

template <typename T_>
struct RouterParams {
  using T = T_;
  static constexpr int E = 128, K = 8;
  static constexpr bool NORM = false, LOGITS = false;
};

template <typename T>
void compare_softmax(const char* what) {
  Error ours, apart, fused;
  for (int set = 0; set < kSets; ++set) {
    Buffer<T> logits(uniform_vector<T>(128, -4.0f, 4.0f));
    auto indices = Buffer<uint>::output(8);
    auto weights = Buffer<T>::output(8);
    launch(kernels::moe_router_softmax<RouterParams<T>>{logits, indices, weights}, {}, {1, 1, 1},
           32, Order::forward);
    std::array<T, 128> a, f;
    stock_apart::softmax<T>(logits.values().data(), a.data(), 128);
    stock_fused::softmax<T>(logits.values().data(), f.data(), 128);
    double sum = 0.0;
    for (const T& v : logits.values()) sum += std::exp(static_cast<double>(static_cast<float>(v)));
    for (size_t c = 0; c < 8; ++c) {
      const uint i = indices.values()[c];
      const double want =
          std::exp(static_cast<double>(static_cast<float>(logits.values()[i]))) / sum;
      ours.add(set, static_cast<float>(weights.values()[c]) / want, 1.0);
      apart.add(set, static_cast<float>(a[i]) / want, 1.0);
      fused.add(set, static_cast<float>(f[i]) / want, 1.0);
    }
  }
  expect_not_larger(what, ours, apart, fused);
}

TEST_F(Stock, Softmax) {
  compare_softmax<bfloat16_t>("softmax, bf16");
  compare_softmax<float>("softmax, fp32");
}

// ---- attention ----

template <typename T_, int SPLITS_>
struct GqaParams {
  using T = T_;
  static constexpr int HEADS = 16, KV_HEADS = 8, D = 128, SPLITS = SPLITS_;
};

// Queries and the newest key are +-1: their norm is exactly the norm's weight with that sign, and
// an angle of 0 leaves it, so that stock's attention, which has no norm, sees the same numbers.
template <typename T, int SPLITS>
struct Attention {
  using P = GqaParams<T, SPLITS>;
  static constexpr size_t D = P::D, HEADS = P::HEADS, KV = P::KV_HEADS;
  static constexpr uint cached = 70, capacity = 80;
  const float scale = 0.088388346f;
  std::vector<T> qkv = uniform_vector<T>((HEADS + 2 * KV) * D, -1.0f, 1.0f);
  Buffer<T> q_norm{uniform_vector<T>(D, 0.5f, 2.0f)}, k_norm{uniform_vector<T>(D, 0.5f, 2.0f)};
  Buffer<T> keys{uniform_vector<T>(KV * capacity * D, -2.0f, 2.0f)};
  Buffer<T> values{uniform_vector<T>(KV * capacity * D, -2.0f, 2.0f)};

  Attention() {
    for (size_t i = 0; i < (HEADS + KV) * D; ++i) qkv[i] = T(float(qkv[i]) < 0 ? -1.0f : 1.0f);
  }

  // Puts the newest position into the cache, too, where stock expects it.
  std::vector<T> ours() {
    std::vector<float> turn(D, 0.0f);
    for (size_t i = 0; i < D; i += 2) turn[i] = 1.0f;
    Buffer<T> in(qkv);
    Buffer<float> eps({0.0f}), scales({scale}), rope(turn);
    Buffer<uint> places({0u, 0u, cached, capacity});
    auto partial = Buffer<float>::output(HEADS * SPLITS * D);
    auto stats = Buffer<float>::output(HEADS * SPLITS * 2);
    launch(kernels::attention_gqa<P>{in, q_norm, k_norm, eps, scales, rope, places, keys, values,
                                     partial, stats},
           {.capacity = capacity}, {uint(HEADS), SPLITS, 1}, 256, Order::forward);
    std::vector<T> out;
    for (size_t i = 0; i < HEADS * D; ++i) {
      out.push_back(T(static_cast<float>(
          merged(partial.values(), stats.values(), i / D * SPLITS, SPLITS, D, i % D))));
    }
    return out;
  }

  std::vector<T> queries() const {
    std::vector<T> q;
    for (size_t i = 0; i < HEADS * D; ++i)
      q.push_back(T(static_cast<float>(qkv[i]) * static_cast<float>(q_norm.values()[i % D])));
    return q;
  }

  std::vector<T> stock(void (*kernel)(const StockAttention<T>&)) const {
    std::vector<T> q = queries(), out(HEADS * D);
    kernel({q.data(), keys.values().data(), values.values().data(), out.data(), int(HEADS),
            int(HEADS / KV), int(cached + 1), capacity, scale});
    return out;
  }

  std::vector<double> fp64() const {
    const auto q = queries();
    std::vector<double> out(HEADS * D, 0.0);
    for (size_t h = 0; h < HEADS; ++h) {
      const size_t at = h / (HEADS / KV) * capacity * D;
      std::vector<double> p;
      double total = 0.0;
      for (size_t i = 0; i <= cached; ++i) {
        double score = 0.0;
        for (size_t d = 0; d < D; ++d)
          score += double(float(q[h * D + d])) * float(keys.values()[at + i * D + d]);
        total += p.emplace_back(std::exp(score * scale));
      }
      for (size_t i = 0; i <= cached; ++i)
        for (size_t d = 0; d < D; ++d)
          out[h * D + d] += p[i] / total * float(values.values()[at + i * D + d]);
    }
    return out;
  }
};

template <typename T, int SPLITS>
void compare_attention(const char* what) {
  Error mine, theirs, theirs_fused;
  for (size_t set = 0; set < 2 * kSets; set += 16) {  // a head is a set
    Attention<T, SPLITS> a;
    const auto ours = a.ours(), apart = a.stock(stock_apart::attention<T, 128>),
               fused = a.stock(stock_fused::attention<T, 128>);
    const auto want = a.fp64();
    for (size_t i = 0; i < want.size(); ++i) {
      mine.add(set + i / a.D, static_cast<float>(ours[i]), want[i]);
      theirs.add(set + i / a.D, static_cast<float>(apart[i]), want[i]);
      theirs_fused.add(set + i / a.D, static_cast<float>(fused[i]), want[i]);
    }
  }
  expect_not_larger(what, mine, theirs, theirs_fused);
}

TEST_F(Stock, Attention) {
  compare_attention<float, 4>("attention, fp32, 4 stretches");
  compare_attention<bfloat16_t, 4>("attention, bf16, 4 stretches");
}

}  // namespace
