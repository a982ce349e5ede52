// CUDA's attention texts in the emulator, clusters and all: each stretch, and the stretches merged,
// against fp64 inside a computed bound; the caches bit for bit. Everything that a row must not see
// is NaN.
#include "tensor_kernels.h"
// The texts come first.
#include "harness.h"

namespace {

using namespace harness;
using Vector = std::vector<float>;
using Vectors = std::vector<Vector>;

constexpr uint kRows = 2, kSequences = 3;
constexpr float kEps = 1e-6f;

// ---- Norm and rotation in fp32, in the order of the texts ----
Vector norm(const Vector& x, const Vector& weight) {
  const size_t n = x.size() / 32;
  Vector sums(32, 0.0f);
  for (size_t i = 0; i < x.size(); ++i) sums[i / n] = std::fma(x[i], x[i], sums[i / n]);
  for (size_t m = 16; m > 0; m /= 2) {
    const Vector before = sums;
    for (size_t lane = 0; lane < 32; ++lane) sums[lane] = before[lane] + before[lane ^ m];
  }
  const float scale = 1.0f / std::sqrt(std::fma(sums[0], 1.0f / x.size(), kEps));
  Vector y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(weight[i] * (x[i] * scale));
  return y;
}
// Element i pairs with i + apart. angles: (cos, sin) pairs.
Vector rotate(const Vector& x, const Vector& angles, bool halves) {
  Vector y = x;
  for (size_t pair = 0; pair < x.size() / 2; ++pair) {
    const size_t a = halves ? pair : 2 * pair, b = halves ? pair + x.size() / 2 : a + 1;
    const float c = angles[2 * pair], s = angles[2 * pair + 1];
    y[a] = std::fma(x[a], c, x[b] * -s);
    y[b] = std::fma(x[b], c, x[a] * s);
  }
  return y;
}

// What goes to the tensor cores.
template <typename T>
Vector rounded_to(Vector x) {
  for (float& v : x) v = float(T(v));
  return x;
}

// ---- fp64 ----
// Attention of one query to some positions: the largest score as an exponent of two, the sum of
// 2^(score - top), the values divided by it; with bounds.
struct Attention {
  Approx top, sum;
  std::vector<Approx> out;
};

// How a kernel goes through the positions: a score's products in so many sums beside each other, so
// many positions at a time.
struct Way {
  size_t chains, batch;
};
constexpr Way kGrouped = {2, kStep}, kLatent = {2, 2 * kStage};

// Every rounding is taken as 2^-23, twice of rounding to nearest: tensor cores cut off. A score is
// the sum of some chains of its products, 16 at a time in turn, each of which is in its own sum of
// 16 and in those of its chain that follow; the blocks share the positions, so a sum of values has
// as many terms as a block has positions, beside its tiles' and the 16 blocks' sums.
// The probabilities are two halves, exact to 2^-16 (bfloat16), or 2^-22 and, of their tile's
// largest, 2^-25 (float16). Each of `steps` changes of the exponent multiplies by an exp2 of 2 ulp.
template <typename T>
Attention attend(const Way& way, const Vector& q, const Vectors& keys, const Vectors& values,
                 float scale) {
  constexpr double kCut = 0x1p-23, kLn2 = 0.6931471805599453;
  constexpr bool kBrain = std::is_same_v<T, bfloat16_t>;
  const double exponent = scale / kLn2;
  const size_t n = keys.size(), sums = blocks(q.size(), 16 * way.chains);
  std::vector<double> scores(n), errors(n), p(n);
  Attention a;
  a.top.value = -INFINITY;
  for (size_t i = 0; i < n; ++i) {
    for (size_t d = 0; d < q.size(); ++d) {
      const double product = double(q[d]) * keys[i][d] * exponent;
      scores[i] += product;
      errors[i] += kCut * (16 * (sums - d / 16 / way.chains) + 4) * std::abs(product);
    }
    errors[i] += 3 * kCut * std::abs(scores[i]);
    a.top.error = std::max(a.top.error, errors[i]);
    a.top.value = std::max(a.top.value, scores[i]);
  }
  const double share = std::ceil(n / 16.0), steps = share / way.batch + 4;
  const double terms = share + 16 + 16 + 2 * steps;
  std::vector<double> value(values[0].size()), error(values[0].size());
  for (size_t i = 0; i < n; ++i) {
    p[i] = std::exp2(scores[i] - a.top.value);
    const double off = kLn2 * (errors[i] + kCut * (a.top.value - scores[i] + steps * a.top.error));
    const double wrong = p[i] * (off + kCut * (3 * steps + terms)) + 0x1p-120;
    const double halves = kBrain ? p[i] * 0x1p-16 : p[i] * 0x1p-22 + 0x1p-24;
    a.sum.value += p[i];
    a.sum.error += wrong;
    for (size_t d = 0; d < value.size(); ++d) {
      value[d] += p[i] * values[i][d];
      error[d] += (wrong + halves) * std::abs(values[i][d]);
    }
  }
  for (size_t d = 0; d < value.size(); ++d) {
    const double v = value[d] / a.sum.value;
    const double e = (error[d] + std::abs(v) * a.sum.error) / (a.sum.value - a.sum.error);
    a.out.push_back({v, 1.01 * e + 3 * kCut * std::abs(v)});
  }
  // The kernel's sum is of its own top.
  a.sum.error += 1.01 * kLn2 * a.top.error * a.sum.value;
  return a;
}

// ---- one run: what a kernel gave, and what its heads attend to ----
struct Row {
  uint sequence, first, cached;
};
struct Output {
  Vector partial, stats;  // [rows][heads][splits][dim], [..][2]
};
// What a fault in the kernel would have made of the positions.
enum class Fault { none, no_newest, no_last, first_twice, sign_of_last };

Vectors part_of(const Vectors& all, size_t from, size_t to) {
  return {all.begin() + from, all.begin() + to};
}
void plant(Fault fault, Vectors& keys, Vectors& values) {
  const size_t n = keys.size();
  if (fault == Fault::sign_of_last) {
    for (float& v : values[n - 2]) v = -v;
    return;
  }
  for (Vectors* all : {&keys, &values}) {
    if (fault == Fault::no_newest) all->pop_back();
    if (fault == Fault::no_last) all->erase(all->end() - 2);
    if (fault == Fault::first_twice) all->push_back(all->front());
  }
}

bool inside(float got, Approx want) {
  return std::abs(got - want.value) <= want.error;  // false for NaN
}

// What the texts say of stretches.
size_t active_of(const Row& row, size_t splits) {
  return std::min(splits, size_t{1} + row.cached / kStretch);
}

// How many of a head's results lie outside their bounds: those of each stretch, and the merged.
template <typename T>
size_t outside(const Way& way, const Output& got, size_t head_at, size_t splits, const Row& row,
               const Vector& q, const Vectors& keys, const Vectors& values, float scale) {
  const size_t active = active_of(row, splits), n = keys.size(), dim = values[0].size();
  size_t count = 0;
  double top = -INFINITY, sum = 0.0;
  std::vector<double> merged(dim, 0.0);
  for (size_t s = 0; s < active; ++s) {
    const float* stats = got.stats.data() + (head_at * splits + s) * 2;
    top = std::max<double>(top, stats[0]);
  }
  for (size_t s = 0; s < active; ++s) {
    const size_t from = n * s / active, to = n * (s + 1) / active;
    const auto want = attend<T>(way, q, part_of(keys, from, to), part_of(values, from, to), scale);
    const float* stats = got.stats.data() + (head_at * splits + s) * 2;
    const float* partial = got.partial.data() + (head_at * splits + s) * dim;
    count += !inside(stats[0], want.top);
    count += !inside(stats[1], want.sum);
    const double weight = std::exp2(stats[0] - top) * stats[1];
    sum += weight;
    for (size_t d = 0; d < dim; ++d) {
      count += !inside(partial[d], want.out[d]);
      merged[d] += weight * partial[d];
    }
  }
  const auto want = attend<T>(way, q, keys, values, scale);
  for (size_t d = 0; d < dim; ++d) count += !inside(float(merged[d] / sum), want.out[d]);
  return count;
}

// The floats of a buffer's [from, from + count).
template <typename T>
Vector floats(const std::vector<T>& values, size_t from, size_t count) {
  Vector f;
  for (size_t i = 0; i < count; ++i) f.push_back(float(values[from + i]));
  return f;
}
Vector angles(size_t n) {
  Vector a;
  for (size_t i = 0; i < n / 2; ++i) {
    const float turn = uniform(-3.0f, 3.0f);
    a.insert(a.end(), {std::cos(turn), std::sin(turn)});
  }
  return a;
}
template <typename T>
void expect_bits(const std::vector<T>& got, const std::vector<T>& want, const char* what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(std::memcmp(&got[i], &want[i], sizeof(T)), 0) << what << "[" << i << "]";
}

// What both kernels have. Row 0 lies in the middle of sequence 1, row 1 at the start of sequence 0.
template <typename T>
struct Rows {
  Row rows[kRows];
  uint capacity;
  Buffer<uint> places;
  Buffer<float> eps{std::vector<float>(16, kEps)};
  size_t period;  // after so many, the positions come again

  Rows(uint one, uint other, size_t period)
      : rows{{1, 3, one}, {0, 0, other}},
        capacity(std::max(one + 3, other) + 2),
        places(std::vector<uint>{1, 3, one + 3, capacity, 0, 0, other, capacity}),
        period(period) {}

  // A cache with `heads` of D values: numbers in the rows' own positions, else NaN.
  std::vector<T> cache(size_t heads, size_t dim) const {
    std::vector<T> c(kSequences * heads * capacity * dim, T(NAN));
    for (const Row& r : rows)
      for (size_t h = 0; h < heads; ++h)
        for (size_t i = 0; i < r.cached * dim; ++i) {
          const size_t at = ((r.sequence * heads + h) * capacity + r.first) * dim + i;
          c[at] = i < period * dim ? T(uniform(-2.0f, 2.0f)) : c[at - period * dim];
        }
    return c;
  }
  // The row's positions of a cache, without the newest.
  Vectors cached(const std::vector<T>& c, size_t row, size_t heads, size_t head, size_t dim) const {
    const Row& r = rows[row];
    Vectors all;
    for (size_t i = 0; i < r.cached; ++i)
      all.push_back(floats(c, ((r.sequence * heads + head) * capacity + r.first + i) * dim, dim));
    return all;
  }
  void put(std::vector<T>& c, size_t row, size_t heads, size_t head, const Vector& newest) const {
    const Row& r = rows[row];
    for (size_t d = 0; d < newest.size(); ++d)
      c[((r.sequence * heads + head) * capacity + r.first + r.cached) * newest.size() + d] =
          T(newest[d]);
  }
};

template <typename Type, int Warps, int Heads, int KvHeads, int Dim, int Splits>
struct Grouped {
  using T = Type;
  static constexpr int WARPS = Warps;
  static constexpr int HEADS = Heads, KV_HEADS = KvHeads, D = Dim, SPLITS = Splits;
};

template <typename P>
struct GroupedRun : Rows<typename P::T> {
  using T = typename P::T;
  using Params = P;
  static constexpr Way kWay = kGrouped;
  static constexpr size_t kHeads = P::HEADS, kDim = P::D, kAll = P::HEADS + 2 * P::KV_HEADS;
  static constexpr size_t kSplits = P::SPLITS;
  Vector qkv = uniform_vector<float>(kRows * kAll * P::D, -2.0f, 2.0f);
  std::vector<T> q_norm = uniform_vector<T>(P::D, 0.5f, 1.5f);
  std::vector<T> k_norm = uniform_vector<T>(P::D, 0.5f, 1.5f);
  Vector rope = angles(kRows * P::D), scale = Vector(16, 1.0f / std::sqrt(float(P::D)));
  std::vector<T> k_cache, v_cache, k_after, v_after;

  GroupedRun(uint one, uint other, size_t period = 1 << 20) : Rows<T>(one, other, period) {
    k_after = k_cache = this->cache(P::KV_HEADS, P::D);
    v_after = v_cache = this->cache(P::KV_HEADS, P::D);
    for (size_t row = 0; row < kRows; ++row)
      for (size_t h = 0; h < P::KV_HEADS; ++h) {
        this->put(k_after, row, P::KV_HEADS, h, turned(row, P::HEADS + h, floats(k_norm, 0, P::D)));
        this->put(v_after, row, P::KV_HEADS, h,
                  floats(qkv, (row * kAll + P::HEADS + P::KV_HEADS + h) * P::D, P::D));
      }
  }
  Vector turned(size_t row, size_t head, const Vector& weight) const {
    return rotate(norm(floats(qkv, (row * kAll + head) * P::D, P::D), weight),
                  floats(rope, row * P::D, P::D), true);
  }
  Vector query(size_t row, size_t head) const {
    return rounded_to<T>(turned(row, head, floats(q_norm, 0, P::D)));
  }
  std::pair<Vectors, Vectors> positions(size_t row, size_t head) const {
    Rows<T> longer = *this;
    ++longer.rows[row].cached;
    const size_t kv = head / (P::HEADS / P::KV_HEADS);
    return {longer.cached(k_after, row, P::KV_HEADS, kv, P::D),
            longer.cached(v_after, row, P::KV_HEADS, kv, P::D)};
  }

  auto run(Order order) {
    Buffer<T> qn(q_norm), kn(k_norm), keys(k_cache), values(v_cache);
    Buffer<float> in(qkv), scales(scale), turns(rope);
    auto partial = Buffer<float>::output(kRows * P::HEADS * P::SPLITS * P::D);
    auto stats = Buffer<float>::output(kRows * P::HEADS * P::SPLITS * 2);
    kernels::cluster_attention_gqa<P> kernel{in,           qn,   kn,     this->eps, scales, turns,
                                             this->places, keys, values, partial,   stats};
    check_sizes(kernel,
                {.rows = kRows, .capacity = this->capacity, .batches = 0, .sequences = kSequences});
    emulator::dispatch(
        {16 * P::SPLITS, P::KV_HEADS, kRows}, 32 * P::WARPS, order, [&] { kernel(); }, 16);
    expect_bits(keys.values(), k_after, "k_cache");
    expect_bits(values.values(), v_after, "v_cache");
    return std::tuple(partial, stats);
  }
};

template <typename Type, int Together, int Heads, int Rope, int Splits, int Lora = 128>
struct Latent {
  using T = Type;
  static constexpr int N = Together;
  static constexpr int HEADS = Heads, NOPE = 32, ROPE = Rope, LORA = Lora, SPLITS = Splits;
  static constexpr int KV_OFFSET = 64, KV_STRIDE = KV_OFFSET + LORA + ROPE;
};

template <typename P>
struct LatentRun : Rows<typename P::T> {
  using T = typename P::T;
  using Params = P;
  static constexpr Way kWay = kLatent;
  static constexpr size_t kHeads = P::HEADS, kDim = P::LORA, kSplits = P::SPLITS;
  static constexpr size_t kQuery = P::NOPE + P::ROPE;
  std::vector<T> q_latent = uniform_vector<T>(kRows * P::HEADS * P::LORA, -1.0f, 1.0f);
  Vector q = uniform_vector<float>(kRows * P::HEADS * kQuery, -1.0f, 1.0f);
  Vector kv = uniform_vector<float>(kRows * P::KV_STRIDE, -2.0f, 2.0f);
  std::vector<T> kv_norm = uniform_vector<T>(P::LORA, 0.5f, 1.5f);
  // Scores spread alike in any number of dimensions.
  Vector rope = angles(kRows * P::ROPE);
  Vector scale = Vector(16, std::sqrt(2.0f / (P::LORA + P::ROPE)));
  std::vector<T> latents, ropes, latents_after, ropes_after;

  LatentRun(uint one, uint other, size_t period = 1 << 20) : Rows<T>(one, other, period) {
    latents_after = latents = this->cache(1, P::LORA);
    ropes_after = ropes = this->cache(1, P::ROPE);
    for (size_t row = 0; row < kRows; ++row) {
      const size_t at = row * P::KV_STRIDE + P::KV_OFFSET;
      this->put(latents_after, row, 1, 0,
                norm(floats(kv, at, P::LORA), floats(kv_norm, 0, P::LORA)));
      this->put(ropes_after, row, 1, 0, turned(row, floats(kv, at + P::LORA, P::ROPE)));
    }
  }
  Vector turned(size_t row, const Vector& x) const {
    return rotate(x, floats(rope, row * P::ROPE, P::ROPE), false);
  }
  Vector query(size_t row, size_t head) const {
    Vector all = floats(q_latent, (row * P::HEADS + head) * P::LORA, P::LORA);
    const auto r = turned(row, floats(q, (row * P::HEADS + head) * kQuery + P::NOPE, P::ROPE));
    all.insert(all.end(), r.begin(), r.end());
    return rounded_to<T>(all);
  }
  std::pair<Vectors, Vectors> positions(size_t row, size_t) const {
    Rows<T> longer = *this;
    ++longer.rows[row].cached;
    const Vectors values = longer.cached(latents_after, row, 1, 0, P::LORA);
    const Vectors turned = longer.cached(ropes_after, row, 1, 0, P::ROPE);
    Vectors keys = values;
    for (size_t i = 0; i < keys.size(); ++i)
      keys[i].insert(keys[i].end(), turned[i].begin(), turned[i].end());
    return {keys, values};
  }

  auto run(Order order) {
    Buffer<T> ql(q_latent), weight(kv_norm), latent(latents), turned(ropes);
    Buffer<float> qs(q), in(kv), scales(scale), turns(rope);
    auto partial = Buffer<float>::output(kRows * P::HEADS * P::SPLITS * P::LORA);
    auto stats = Buffer<float>::output(kRows * P::HEADS * P::SPLITS * 2);
    kernels::cluster_attention_mla<P> kernel{ql,    qs,           in,     weight, this->eps, scales,
                                             turns, this->places, latent, turned, partial,   stats};
    check_sizes(kernel,
                {.rows = kRows, .capacity = this->capacity, .batches = 0, .sequences = kSequences});
    emulator::dispatch(
        {16 * P::SPLITS, blocks(P::HEADS, P::N), kRows}, 256, order, [&] { kernel(); }, 16);
    expect_bits(latent.values(), latents_after, "latent_cache");
    expect_bits(turned.values(), ropes_after, "rope_cache");
    return std::tuple(partial, stats);
  }
};

// ---- the tests ----
template <typename Run>
size_t outside(const Run& run, const Output& got, Fault fault) {
  size_t count = 0;
  for (size_t row = 0; row < kRows; ++row)
    for (size_t head = 0; head < Run::kHeads; ++head) {
      auto [keys, values] = run.positions(row, head);
      if (fault != Fault::none && keys.size() < 2) continue;
      plant(fault, keys, values);
      count +=
          outside<typename Run::T>(Run::kWay, got, row * Run::kHeads + head, Run::kSplits,
                                   run.rows[row], run.query(row, head), keys, values, run.scale[0]);
    }
  return count;
}

// Whatever the order in which blocks, warps and lanes run: the same bits. Only the stretches that
// there are get written.
template <typename Run>
Output output_of(Run& run, std::vector<Order> orders = {Order::shuffled}) {
  const auto [partial, stats] = run.run(Order::forward);
  for (Order order : orders) {
    const auto [again, stats_again] = run.run(order);
    expect_same_bytes(partial.values(), again.values());
    expect_same_bytes(stats.values(), stats_again.values());
  }
  size_t idle = 0;
  for (const Row& row : run.rows)
    idle += (Run::kSplits - active_of(row, Run::kSplits)) * Run::kHeads;
  EXPECT_EQ(partial.unwritten(), idle * Run::kDim);
  EXPECT_EQ(stats.unwritten(), idle * 2);
  return {partial.values(), stats.values()};
}

template <typename Run>
void expect_inside(uint one, uint other) {
  SCOPED_TRACE(std::to_string(one) + " and " + std::to_string(other) + " positions");
  Run run(one, other);
  EXPECT_EQ(outside(run, output_of(run), Fault::none), 0u);
}

// Positions before the newest such that each of 16 blocks has this many, the newest among them.
constexpr uint each(uint positions) {
  return 16 * positions - 1;
}

template <typename Run>
class Attending : public testing::Test {};
using Runs = testing::Types<
    GroupedRun<Grouped<bfloat16_t, 8, 4, 2, 64, 2>>,
    GroupedRun<Grouped<float16_t, 8, 8, 1, 128, 1>>,
    GroupedRun<Grouped<bfloat16_t, 4, 6, 2, 96, 1>>, GroupedRun<Grouped<float16_t, 4, 7, 1, 32, 3>>,
    LatentRun<Latent<bfloat16_t, 8, 4, 32, 1>>, LatentRun<Latent<float16_t, 24, 20, 64, 3>>,
    LatentRun<Latent<bfloat16_t, 8, 12, 32, 1>>, LatentRun<Latent<bfloat16_t, 8, 4, 32, 1, 512>>>;
TYPED_TEST_SUITE(Attending, Runs);

TYPED_TEST(Attending, FewPositions) {
  expect_inside<TypeParam>(0, 5);
  expect_inside<TypeParam>(each(1), 16);
}
// A block's positions fill one tile, or one more.
TYPED_TEST(Attending, TilesOf16) {
  expect_inside<TypeParam>(each(15), each(16));
  expect_inside<TypeParam>(each(16) + 1, each(17));
}
// They fill one batch, or one more.
TYPED_TEST(Attending, Batches) {
  constexpr uint kFull = TypeParam::kWay.batch;
  expect_inside<TypeParam>(each(kFull - 1), each(kFull));
  expect_inside<TypeParam>(each(kFull + 1), each(kFull) + 1);
}
// Two stretches, or three batches where there is one.
TYPED_TEST(Attending, Long) {
  expect_inside<TypeParam>(each(2 * TypeParam::kWay.batch + 3), 2048);
}

// Rows beside a row may choose how many warps its blocks have.
TEST(GroupedAttention, FewerWarpsHaveTheBitsOfMore) {
  using Eight = GroupedRun<Grouped<bfloat16_t, 8, 16, 2, 128, 2>>;
  using Four = GroupedRun<Grouped<bfloat16_t, 4, 16, 2, 128, 2>>;
  for (const uint other : {each(16), each(64), each(65), each(203)}) {
    Eight eight(each(80), other);
    Four four(each(80), other);
    static_cast<Rows<bfloat16_t>&>(four) = eight;
    four.qkv = eight.qkv, four.q_norm = eight.q_norm, four.k_norm = eight.k_norm;
    four.rope = eight.rope, four.k_cache = eight.k_cache, four.v_cache = eight.v_cache;
    four.k_after = eight.k_after, four.v_after = eight.v_after;
    const Output a = output_of(four), b = output_of(eight);
    expect_same_bytes(a.partial, b.partial);
    expect_same_bytes(a.stats, b.stats);
  }
}

// Rows beside a row may choose how many of its heads a block takes.
TEST(LatentAttention, MoreHeadsHaveTheBitsOfFewer) {
  using Few = LatentRun<Latent<bfloat16_t, 8, 12, 32, 2>>;
  using Many = LatentRun<Latent<bfloat16_t, 24, 12, 32, 2>>;
  for (const uint other : {each(64), each(163)}) {
    Few few(each(17), other);
    Many many(each(17), other);
    static_cast<Rows<bfloat16_t>&>(many) = few;
    many.q_latent = few.q_latent, many.q = few.q, many.kv = few.kv, many.kv_norm = few.kv_norm;
    many.rope = few.rope, many.latents = few.latents, many.ropes = few.ropes;
    many.latents_after = few.latents_after, many.ropes_after = few.ropes_after;
    const Output a = output_of(many), b = output_of(few);
    expect_same_bytes(a.partial, b.partial);
    expect_same_bytes(a.stats, b.stats);
  }
}

// Each block has the same two: what rounding one probability to a half would lose adds up.
TYPED_TEST(Attending, ProbabilitiesAreTwoHalves) {
  TypeParam run(each(2), each(2), 2);
  EXPECT_EQ(outside(run, output_of(run), Fault::none), 0u);
}

TYPED_TEST(Attending, TheBoundsSeeFaults) {
  TypeParam run(each(40) + 3, each(16));
  const Output out = output_of(run, {Order::forward, Order::reverse});
  for (Fault fault : {Fault::no_newest, Fault::no_last, Fault::first_twice, Fault::sign_of_last})
    EXPECT_GT(outside(run, out, fault), kRows * TypeParam::kHeads * TypeParam::kDim) << int(fault);
}

}  // namespace
