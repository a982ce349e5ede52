// The attention's kernels and the norm: inside the bounds that src/cpu/attention.inl derives,
// against an fp64 oracle; the exact forms bit for bit a sequential loop; the same bits from every
// instruction set, and for a head or row whatever its neighbours are.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tables.h"
#include "cpu/tiles.h"
#include "dtypes.h"

namespace moefuse::cpu {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kUntouched = -7.5e30f;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Floats = std::vector<float>;

struct Truth {
  double value, bound;
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

// How many values lie outside their bound; a NaN does.
int outside(const Floats& values, const std::vector<Truth>& truths) {
  if (values.size() != truths.size()) return -1;
  int count = 0;
  for (size_t i = 0; i < values.size(); ++i)
    count += !(std::fabs(values[i] - truths[i].value) <= truths[i].bound);
  return count;
}

struct Case {
  int rows, dim, heads;
  Dtype dtype;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32}) {
    for (int dim : {1, 15, 16, 31, 64, 100, 128})
      for (int rows : {1, 3, 4, 17, 63, 64, 65, 70, 129})
        all.push_back({rows, dim, rows % 4 + 2, dtype});
    for (int heads = 1; heads <= 12; ++heads) all.push_back({21, 80, heads, dtype});
    all.push_back({300, 576, 5, dtype});
  }
  return all;
}

std::string name(const Case& c) {
  return std::to_string(c.rows) + " rows, dim " + std::to_string(c.dim) + ", " +
         std::to_string(c.heads) + " heads, dtype " + std::to_string(int(c.dtype));
}

// Rows with NaN between them: one element read past a row's end would show in every result.
struct Problem {
  static constexpr int kGap = 3;

  Case c;
  std::vector<uint8_t> data;
  Floats q, weights;  // [heads, dim] and [heads, rows], each with kGap elements behind it
  int weights_stride, out_stride;

  explicit Problem(const Case& c, unsigned seed = 11)
      : c(c), weights_stride(c.rows + kGap), out_stride(c.rows + kGap) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int j = 0; j < c.rows; ++j) {
      for (int k = 0; k < c.dim; ++k) encode(c.dtype, data, normal(random) * (k % 7 ? 1 : 30));
      if (j + 1 < c.rows)
        for (int k = 0; k < kGap; ++k) put_nan();
    }
    for (int i = 0; i < c.heads * c.dim; ++i) q.push_back(float(normal(random)));
    for (int h = 0; h < c.heads; ++h)
      for (int j = 0; j < weights_stride; ++j)
        weights.push_back(j < c.rows ? float(normal(random)) : kNan);
  }
  void put_nan() {
    const uint32_t bits = c.dtype == Dtype::float16 ? 0x7e00 : 0x7fc0;
    if (c.dtype == Dtype::float32) data.insert(data.end(), {0, 0});
    data.insert(data.end(), {uint8_t(bits), uint8_t(bits >> 8)});
  }
  RowsArgs rows() const { return {data.data(), c.dtype, c.dim + kGap, c.rows, c.dim}; }
  double row(int j, int k) const {
    return decode(c.dtype, data.data(), int64_t(j) * (c.dim + kGap) + k);
  }

  Floats dots(const Kernels& table, bool exact) const {
    Floats padded(size_t(c.heads) * out_stride, kUntouched), out;
    table.dots(exact, rows(), q.data(), c.heads, padded.data(), out_stride);
    for (int h = 0; h < c.heads; ++h)
      for (int j = 0; j < out_stride; ++j) {
        const float value = padded[size_t(h) * out_stride + j];
        if (j < c.rows)
          out.push_back(value);
        else
          EXPECT_EQ(value, kUntouched) << name(c);
      }
    return out;
  }
  Floats weighted_sum(const Kernels& table, bool exact) const {
    Floats out(size_t(c.heads) * c.dim + kGap, kUntouched);
    table.weighted_sum(exact, rows(), weights.data(), c.heads, weights_stride, out.data());
    for (int i = 0; i < kGap; ++i) EXPECT_EQ(out[out.size() - 1 - i], kUntouched) << name(c);
    out.resize(out.size() - kGap);
    return out;
  }

  std::vector<Truth> dots_truth() const {
    std::vector<Truth> all;
    for (int h = 0; h < c.heads; ++h)
      for (int j = 0; j < c.rows; ++j) {
        Truth t{};
        for (int k = 0; k < c.dim; ++k) {
          const double product = double(q[size_t(h) * c.dim + k]) * row(j, k);
          t.value += product, t.bound += std::fabs(product);
        }
        t.bound *= kUnit * (c.dim / 16.0 + 6);
        all.push_back(t);
      }
    return all;
  }
  std::vector<Truth> weighted_sum_truth() const {
    std::vector<Truth> all;
    for (int h = 0; h < c.heads; ++h)
      for (int d = 0; d < c.dim; ++d) {
        Truth t{};
        for (int j = 0; j < c.rows; ++j) {
          const double product = double(weights[size_t(h) * weights_stride + j]) * row(j, d);
          t.value += product, t.bound += std::fabs(product);
        }
        t.bound *= kUnit * (c.rows + 1);
        all.push_back(t);
      }
    return all;
  }
  // One product and one sum after the other, each rounded to fp32.
  Floats dots_sequential() const {
    Floats out;
    for (int h = 0; h < c.heads; ++h)
      for (int j = 0; j < c.rows; ++j) {
        float sum = 0;
        for (int k = 0; k < c.dim; ++k) {
          const float product = q[size_t(h) * c.dim + k] * float(row(j, k));
          sum = sum + product;
        }
        out.push_back(sum);
      }
    return out;
  }
  Floats weighted_sum_sequential() const {
    Floats out;
    for (int h = 0; h < c.heads; ++h)
      for (int d = 0; d < c.dim; ++d) {
        float sum = 0;
        for (int j = 0; j < c.rows; ++j) {
          const float product = weights[size_t(h) * weights_stride + j] * float(row(j, d));
          sum = sum + product;
        }
        out.push_back(sum);
      }
    return out;
  }
};

TEST(Attention, FusedStaysInsideTheBoundOfTheOracle) {
  for (const Case& c : cases()) {
    const Problem p(c);
    EXPECT_EQ(outside(p.dots(kernels(), false), p.dots_truth()), 0) << name(c);
    EXPECT_EQ(outside(p.weighted_sum(kernels(), false), p.weighted_sum_truth()), 0) << name(c);
  }
}

TEST(Attention, ExactIsASequentialLoopBitForBit) {
  for (const Case& c : cases()) {
    const Problem p(c);
    EXPECT_TRUE(same_bits(p.dots(kernels(), true), p.dots_sequential())) << name(c);
    EXPECT_TRUE(same_bits(p.weighted_sum(kernels(), true), p.weighted_sum_sequential())) << name(c);
  }
}

TEST(Attention, EveryInstructionSetGivesTheBitsOfPlain) {
  for (const Case& c : cases())
    for (bool exact : {false, true}) {
      const Problem p(c, 3);
      const Floats dots = p.dots(kKernels_plain, exact);
      const Floats sums = p.weighted_sum(kKernels_plain, exact);
      for (const Kernels* table : available_kernels()) {
        EXPECT_TRUE(same_bits(p.dots(*table, exact), dots)) << table->isa << ", " << name(c);
        EXPECT_TRUE(same_bits(p.weighted_sum(*table, exact), sums))
            << table->isa << ", " << name(c);
      }
    }
}

// In one part, or in two: the first 32 dimensions and the rest.
void tile_dots(const RowsArgs& a, const float* q, int heads, float* out, int64_t stride,
               bool split = false) {
  std::vector<TilePart> parts;
  std::vector<std::vector<char>> room;
  for (int from = 0, to; from < a.dim; from = to) {
    to = split && from == 0 ? 32 : a.dim;
    const int dim = to - from;
    Floats part;
    for (int h = 0; h < heads; ++h)
      part.insert(part.end(), q + int64_t(h) * a.dim + from, q + int64_t(h) * a.dim + to);
    room.emplace_back(Tiles::query_bytes(heads, dim) + 64);
    char* queries = room.back().data();
    queries += -reinterpret_cast<uintptr_t>(queries) & 63;
    tiles()->queries(part.data(), heads, dim, queries);
    parts.push_back({{(const char*)a.data + 2 * from, a.dtype, a.stride, a.rows, dim}, queries});
  }
  tiles()->dots(parts.data(), int(parts.size()), heads, out, stride);
}

// Edges of 16, 32, 64 and 192 rows; one to four groups of heads, full or not.
TEST(Tiles, StayInsideTheBoundOfTheOracle) {
  if (!tiles()) GTEST_SKIP() << "no tiles of bfloat16 here";
  constexpr double kParts = 0x1p-16;
  const auto bound = [](std::vector<Truth> all, double from, double to) {
    for (Truth& t : all) t.bound *= (kParts / kUnit + to) / from;
    return all;
  };
  for (int rows : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 161, 191, 192, 193, 400})
    for (const auto& [dim, heads] :
         {std::pair{32, 1}, {64, 20}, {128, 8}, {128, 7}, {160, 16}, {576, 9}, {1024, 32}}) {
      const Problem p({rows, dim, heads, Dtype::bfloat16});
      ASSERT_TRUE(fit_tiles(p.rows(), heads));
      Kernels table{};
      table.dots = [](bool, const RowsArgs& a, const float* q, int n, float* out, int64_t stride) {
        tile_dots(a, q, n, out, stride);
      };
      table.weighted_sum = [](bool, const RowsArgs& a, const float* w, int n, int64_t stride,
                              float* out) {
        tiles()->weighted_sum(a, w, n, stride, out, a.dim, true);
      };
      const auto steps = [](int n) { return (1 + 0x1p-7) * ((n + 31) / 32 + 18); };
      EXPECT_EQ(outside(p.dots(table, false), bound(p.dots_truth(), dim / 16.0 + 6, steps(dim))), 0)
          << name(p.c);
      EXPECT_EQ(outside(p.weighted_sum(table, false),
                        bound(p.weighted_sum_truth(), rows + 1, steps(rows))),
                0)
          << name(p.c);
    }
}

TEST(Tiles, AHeadAndARowDoNotSeeTheirNeighbours) {
  if (!tiles()) GTEST_SKIP() << "no tiles of bfloat16 here";
  const Problem p({161, 96, 20, Dtype::bfloat16});
  const int rows = p.c.rows, dim = p.c.dim;
  Floats together(20 * rows), sums(20 * dim), alone(rows), sum(dim);
  tile_dots(p.rows(), p.q.data(), 20, together.data(), rows);
  tiles()->weighted_sum(p.rows(), p.weights.data(), 20, p.weights_stride, sums.data(), dim, true);
  for (int h : {0, 7, 8, 15, 16, 19}) {
    tile_dots(p.rows(), p.q.data() + h * dim, 1, alone.data(), rows);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + h * rows)) << h;
    tiles()->weighted_sum(p.rows(), p.weights.data() + h * p.weights_stride, 1, 0, sum.data(), dim,
                          false);
    EXPECT_TRUE(std::equal(sum.begin(), sum.end(), sums.begin() + h * dim)) << h;
  }
  Floats in_two(20 * rows);
  tile_dots(p.rows(), p.q.data(), 20, in_two.data(), rows, true);
  EXPECT_TRUE(same_bits(in_two, together));
  RowsArgs last = p.rows();
  last.data = p.data.data() + 2 * (rows - 1) * last.stride;
  last.rows = 1;
  tile_dots(last, p.q.data(), 1, alone.data(), 1);
  EXPECT_EQ(alone[0], together[rows - 1]);
}

TEST(Attention, HeadsAndRowsDoNotSeeTheirNeighbours) {
  for (int heads = 1; heads <= 12; ++heads) {
    const Problem p({23, 80, heads, Dtype::bfloat16});
    const Floats dots = p.dots(kernels(), false), sums = p.weighted_sum(kernels(), false);
    RowsArgs last = p.rows();
    last.data = p.data.data() + 2 * (p.c.rows - 1) * last.stride;
    last.rows = 1;
    for (int h = 0; h < heads; ++h) {
      float alone = kNan;
      kernels().dots(false, last, p.q.data() + h * p.c.dim, 1, &alone, 1);
      EXPECT_EQ(alone, dots[(h + 1) * p.c.rows - 1]);
      Floats sum(p.c.dim);
      kernels().weighted_sum(false, p.rows(), p.weights.data() + h * p.weights_stride, 1, 0,
                             sum.data());
      EXPECT_TRUE(std::equal(sum.begin(), sum.end(), sums.begin() + h * p.c.dim));
    }
  }
}

struct Softmax {
  Floats values;
  float top, sum;
};

Softmax exponentials(const Kernels& table, Floats scores) {
  Softmax s{std::move(scores), kNan, kNan};
  s.sum = table.exponentials(s.values.data(), int(s.values.size()), &s.top);
  return s;
}

Floats scores(int n, double spread) {
  std::mt19937 random(n);
  std::normal_distribution<double> normal;
  Floats all(n);
  for (float& v : all) v = float(spread * normal(random));
  return all;
}

// The difference to the top is rounded once, exp_lanes is within two units in the last place of it.
std::vector<Truth> exponentials_truth(const Floats& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  std::vector<Truth> all;
  for (float score : scores) {
    const double x = score - top, value = std::exp(x);
    all.push_back({value, x < -87 ? 1.3e-38 : kUnit * (4 + 1.01 * -x) * value});
  }
  return all;
}

TEST(Attention, ExponentialsFollowTheOracle) {
  for (int n : {1, 2, 15, 16, 17, 33, 100, 1000})
    for (double spread : {0.01, 1.0, 10.0, 200.0}) {
      const Floats from = scores(n, spread);
      const Softmax s = exponentials(kernels(), from);
      EXPECT_EQ(s.top, *std::max_element(from.begin(), from.end()));
      EXPECT_EQ(outside(s.values, exponentials_truth(from)), 0) << n << " of spread " << spread;
      double sum = 0;
      for (float v : s.values) sum += v;
      EXPECT_EQ(outside({s.sum}, {{sum, kUnit * (n / 16.0 + 5) * sum}}), 0) << n;
      const Softmax plain = exponentials(kKernels_plain, from);
      for (const Kernels* table : available_kernels()) {
        const Softmax other = exponentials(*table, from);
        EXPECT_TRUE(same_bits(other.values, plain.values)) << table->isa << " " << n;
        EXPECT_TRUE(same_bits({other.top, other.sum}, {plain.top, plain.sum})) << table->isa;
      }
    }
}

TEST(Attention, ExponentialsTakeTheTopFromEveryPlace) {
  for (int at = 0; at < 37; ++at) {
    Floats from(37, -3.0f);
    from[at] = 2.0f;
    const Softmax s = exponentials(kernels(), from);
    EXPECT_EQ(s.top, 2.0f) << at;
    EXPECT_EQ(s.values[at], 1.0f) << at;
  }
}

struct NormProblem {
  Floats x, weight;
  float eps;
};

NormProblem norm_problem(int n, double spread) {
  NormProblem p{scores(n, spread), scores(n + 1, 1), 1e-6f};
  p.weight.resize(n);
  return p;
}

Floats rms_norm(const Kernels& table, const NormProblem& p) {
  const int n = int(p.x.size());
  Floats out(n + 1, kUntouched), in_place = p.x;
  table.rms_norm(p.x.data(), p.weight.data(), p.eps, n, out.data());
  EXPECT_EQ(out.back(), kUntouched);
  out.pop_back();
  table.rms_norm(in_place.data(), p.weight.data(), p.eps, n, in_place.data());
  EXPECT_TRUE(same_bits(in_place, out));
  return out;
}

std::vector<Truth> rms_norm_truth(const NormProblem& p) {
  const double n = double(p.x.size());
  double squares = 0;
  for (float x : p.x) squares += double(x) * x;
  std::vector<Truth> all;
  for (size_t i = 0; i < p.x.size(); ++i) {
    const double value = p.x[i] / std::sqrt(squares / n + p.eps) * p.weight[i];
    all.push_back({value, kUnit * (n / 32 + 10) * std::fabs(value)});
  }
  return all;
}

TEST(RmsNorm, StaysInsideTheBoundOfTheOracleOnEveryInstructionSet) {
  for (int n : {1, 15, 16, 17, 32, 33, 64, 100, 128, 192, 2048, 5120})
    for (double spread : {1e-3, 1.0, 1e4}) {
      const NormProblem p = norm_problem(n, spread);
      const Floats plain = rms_norm(kKernels_plain, p);
      EXPECT_EQ(outside(plain, rms_norm_truth(p)), 0) << n << " of spread " << spread;
      for (const Kernels* table : available_kernels())
        EXPECT_TRUE(same_bits(rms_norm(*table, p), plain)) << table->isa << " " << n;
    }
}

TEST(Attention, NotFiniteValuesShow) {
  for (const Kernels* table : available_kernels()) {
    Problem p({5, 33, 4, Dtype::float32});
    std::memcpy(p.data.data() + 4 * (4 * 36 + 32), &kNan, 4);  // the very last element
    for (bool exact : {false, true}) {
      const Floats dots = p.dots(*table, exact), sums = p.weighted_sum(*table, exact);
      for (size_t i = 0; i < dots.size(); ++i) EXPECT_EQ(std::isnan(dots[i]), i % 5 == 4);
      for (size_t i = 0; i < sums.size(); ++i) EXPECT_EQ(std::isnan(sums[i]), i % 33 == 32);
    }
    NormProblem norm = norm_problem(33, 1);
    norm.x.back() = kNan;
    for (float y : rms_norm(*table, norm)) EXPECT_TRUE(std::isnan(y));
    Floats from = scores(33, 1);
    from.back() = kNan;
    EXPECT_TRUE(std::isnan(exponentials(*table, from).sum)) << table->isa;
  }
}

TEST(Attention, TheComparersSeePlantedFaults) {
  const Problem p({17, 64, 4, Dtype::bfloat16});
  const auto truth = p.dots_truth();
  const Floats good = p.dots(kernels(), false);
  ASSERT_EQ(outside(good, truth), 0);
  const auto planted = [&](size_t at, float value) {
    Floats bad = good;
    bad[at] = value;
    EXPECT_FALSE(same_bits(bad, good));
    return outside(bad, truth);
  };
  const size_t last = good.size() - 1;
  for (size_t at : {size_t(0), size_t(30), last}) {
    EXPECT_EQ(planted(at, kNan), 1);
    EXPECT_EQ(planted(at, INFINITY), 1);
    EXPECT_EQ(planted(at, -good[at]), 1);
    EXPECT_EQ(planted(at, float(truth[at].value + 2 * truth[at].bound + 1e-4)), 1);
  }
  EXPECT_EQ(outside(Floats(good.begin(), good.end() - 1), truth), -1);
  Floats zero{0.0f}, minus{-0.0f};
  EXPECT_FALSE(same_bits(zero, minus));
}

}  // namespace
}  // namespace moefuse::cpu
