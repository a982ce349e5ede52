// The fp32 matrix-vector kernels: inside their computed error bound of an fp64 oracle, and the same
// bits from every instruction set, row split and number of vectors.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tables.h"
#include "dtypes.h"

namespace moefuse::cpu {
namespace {

constexpr double kUnit = 0x1p-24;

struct Case {
  int rows, cols, group_size, bits;
  Dtype dtype;
  int vectors;
  double spread = 1;  // x has magnitudes from 1/spread to spread
  Format format = Format::affine;
};

struct Problem {
  Case c;
  std::vector<uint32_t> weight;
  std::vector<uint8_t> scales, biases, x;

  Problem(const Case& c, unsigned seed) : c(c) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> power(-1, 1);
    weight.resize(size_t(c.rows) * c.cols * c.bits / 32);
    for (auto& word : weight) word = random();
    for (int i = 0; i < c.rows * c.cols / c.group_size; ++i) {
      if (c.format != Format::affine) {  // e8m0 from 2^-12 to 2^3; any e4m3 but NaN
        const unsigned byte = random() % 254;
        scales.push_back(c.format == Format::mxfp4 ? 115 + byte % 16 : byte + (byte > 126));
        continue;
      }
      const double scale = 0.01 * normal(random);
      encode(c.dtype, scales, scale);
      encode(c.dtype, biases, -scale * (1 << (c.bits - 1)) + 0.001 * normal(random));
    }
    for (int i = 0; i < c.vectors * c.cols; ++i)
      encode(c.dtype, x, normal(random) * std::pow(c.spread, power(random)));
  }
  QuantizedMatrix matrix() const {
    return {weight.data(), scales.data(), biases.data(), c.dtype, c.rows,
            c.cols,        c.group_size,  c.bits,        c.format};
  }
  int64_t x_bytes() const { return int64_t(c.cols) * (c.dtype == Dtype::float32 ? 4 : 2); }
  unsigned q(int row, int k) const {
    const int per_word = 32 / c.bits;
    const uint32_t word = weight[(size_t(row) * c.cols + k) / per_word];
    return word >> k % per_word * c.bits & ((1u << c.bits) - 1);
  }
  // The weight's true value, and |scale q| + |bias| of the affine form that the kernels take.
  struct Weight {
    double value, size;
  };
  Weight at(int row, int k) const {
    const int64_t group = int64_t(row) * (c.cols / c.group_size) + k / c.group_size;
    if (c.format != Format::affine) {
      const unsigned byte = scales[group];
      const double scale = c.format == Format::mxfp4 ? e8m0(byte) : e4m3(byte), v = e2m1(q(row, k));
      return {scale * v, std::fabs(scale) * (v + 6 + 6)};
    }
    const double scale = decode(c.dtype, scales.data(), group) * q(row, k);
    const double bias = decode(c.dtype, biases.data(), group);
    return {scale + bias, std::fabs(scale) + std::fabs(bias)};
  }
};

std::vector<float> run(const Kernels& table, Dot dot, const Problem& p, int first_row,
                       int last_row) {
  const Case& c = p.c;
  const int64_t bytes = table.prepared_bytes(dot, c.cols, c.group_size, c.bits);
  std::vector<uint8_t> prepared(bytes * c.vectors);
  for (int v = 0; v < c.vectors; ++v)
    table.prepare(dot, p.x.data() + v * p.x_bytes(), c.dtype, c.cols, c.group_size, c.bits,
                  prepared.data() + v * bytes);
  std::vector<float> y(size_t(c.vectors) * c.rows, -1e30f);
  table.qmv(dot, p.matrix(), prepared.data(), c.vectors, y.data(), c.rows, first_row, last_row, {});
  return y;
}

// The least power of two that brings the group's largest |x| to 32639 steps or fewer.
double grid_step(const Problem& p, int v, int group) {
  double largest = 0;
  for (int k = 0; k < p.c.group_size; ++k) {
    const double x = decode(p.c.dtype, p.x.data() + v * p.x_bytes(), group * p.c.group_size + k);
    largest = std::max(largest, std::fabs(x));
  }
  double step = 0x1p-120;
  while (largest > 32639 * step) step *= 2;
  return step;
}

struct Truth {
  double value, bound;
};

// The fp64 product and the bound derived in src/cpu/grid.inl.
Truth oracle(const Problem& p, Dot dot, int v, int row) {
  const Case& c = p.c;
  const int groups = c.cols / c.group_size;
  const int chunks = (c.cols * c.bits / 8 + 63) / 64;
  Truth t{};
  double grid = 0, sizes = 0;
  for (int g = 0; g < groups; ++g) {
    const double step = dot == Dot::grid ? grid_step(p, v, g) : 0;
    for (int k = g * c.group_size; k < (g + 1) * c.group_size; ++k) {
      const double x = decode(c.dtype, p.x.data() + v * p.x_bytes(), k);
      const Problem::Weight w = p.at(row, k);
      t.value += w.value * x;
      grid += std::fabs(w.value) * step / 2;
      sizes += w.size * (std::fabs(x) + step / 2);
    }
  }
  const int roundings = chunks + (groups + 15) / 16 + 8 + (dot == Dot::grid ? 0 : 32 / c.bits);
  t.bound = grid + kUnit * roundings * sizes;
  return t;
}

// How many results lie outside their bound.
int outside(const Problem& p, Dot dot, const std::vector<float>& y) {
  int count = 0;
  for (int v = 0; v < p.c.vectors; ++v)
    for (int row = 0; row < p.c.rows; ++row) {
      const Truth t = oracle(p, dot, v, row);
      count += !(std::fabs(y[size_t(v) * p.c.rows + row] - t.value) <= t.bound);
    }
  return count;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int bits : {4, 8})
    for (int group : {32, 64, 128})
      for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
        for (int groups : {1, 3, 16, 19}) all.push_back({5, group * groups, group, bits, dtype, 3});
  for (Format format : {Format::mxfp4, Format::nvfp4}) {
    const int group = format == Format::mxfp4 ? 32 : 16;
    for (Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
      for (int groups : {1, 3, 16, 19, 48})
        all.push_back({5, group * groups, group, 4, dtype, 3, 1, format});
    all.push_back({33, 768, group, 4, Dtype::bfloat16, 7, 1e6, format});
  }
  all.push_back({64, 2048, 64, 4, Dtype::bfloat16, 1});
  all.push_back({64, 2048, 64, 4, Dtype::bfloat16, 8, 1e6});
  all.push_back({33, 768, 64, 8, Dtype::float32, 7, 1e12});
  all.push_back({1, 64, 64, 4, Dtype::bfloat16, 1, 1e-30});
  return all;
}

const Dot kDots[] = {Dot::grid, Dot::fma, Dot::separate};

TEST(Qmv, StaysInsideTheBoundOfTheOracle) {
  for (const Case& c : cases())
    for (Dot dot : kDots) {
      const Problem p(c, 17 + c.cols);
      EXPECT_EQ(outside(p, dot, run(kernels(), dot, p, 0, c.rows)), 0)
          << "bits " << c.bits << " group " << c.group_size << " cols " << c.cols << " dtype "
          << int(c.dtype) << " dot " << int(dot) << " format " << int(c.format);
    }
}

TEST(Qmv, EveryInstructionSetGivesTheBitsOfPlain) {
  for (const Case& c : cases())
    for (Dot dot : kDots) {
      const Problem p(c, 5);
      const auto plain = run(kKernels_plain, dot, p, 0, c.rows);
      for (const Kernels* table : available_kernels())
        EXPECT_TRUE(same_bits(run(*table, dot, p, 0, c.rows), plain))
            << table->isa << " bits " << c.bits << " group " << c.group_size << " cols " << c.cols
            << " format " << int(c.format);
    }
}

TEST(Qmv, RowsAndVectorsDoNotSeeTheirNeighbours) {
  for (int vectors = 1; vectors <= 8; ++vectors) {
    const Problem p({9, 320, 64, 4, Dtype::bfloat16, vectors}, 3);
    for (Dot dot : kDots) {
      const auto whole = run(kernels(), dot, p, 0, 9);
      const auto part = run(kernels(), dot, p, 4, 7);
      Problem last = p;
      last.c.vectors = 1;
      last.x.erase(last.x.begin(), last.x.end() - last.x_bytes());
      const auto alone = run(kernels(), dot, last, 0, 9);
      for (int row = 0; row < 9; ++row) {
        EXPECT_EQ(whole[(vectors - 1) * 9 + row], alone[row]);
        EXPECT_EQ(part[row], row >= 4 && row < 7 ? whole[row] : -1e30f);
      }
    }
  }
}

TEST(Qmv, NotFiniteActivationsShow) {
  for (uint16_t bad : {0x7f80, 0xff80, 0x7fc0}) {
    Problem p({4, 256, 64, 4, Dtype::bfloat16, 1}, 9);
    std::memcpy(p.x.data() + 2 * 70, &bad, 2);
    for (const Kernels* table : available_kernels())
      for (float y : run(*table, Dot::grid, p, 0, 4)) EXPECT_TRUE(std::isnan(y));
  }
}

TEST(Qmv, ExtremesStayExact) {
  // Largest weights and activations of one sign: the integer sums at their headroom.
  for (int bits : {4, 8}) {
    Problem p({3, 1024, 128, bits, Dtype::bfloat16, 1}, 1);
    for (auto& word : p.weight) word = ~0u;
    for (size_t i = 0; i < p.x.size(); i += 2) p.x[i] = 0x7f, p.x[i + 1] = 0xc2;
    EXPECT_EQ(outside(p, Dot::grid, run(kernels(), Dot::grid, p, 0, 3)), 0);
    std::fill(p.x.begin(), p.x.end(), 0);
    for (float y : run(kernels(), Dot::grid, p, 0, 3)) EXPECT_EQ(y, 0);
  }
}

// One code after another under one scale after another: each byte that is no NaN and whose products
// with the integers of formats.h do not overflow.
TEST(Qmv, EveryFp4CodeAndScaleIsRead) {
  for (Format format : {Format::mxfp4, Format::nvfp4}) {
    const int group = format == Format::mxfp4 ? 32 : 16;
    Problem p({256, group, group, 4, Dtype::bfloat16, 1, 1, format}, 1);
    for (size_t i = 0; i < p.weight.size(); ++i) p.weight[i] = i % 2 ? 0xfedcba98 : 0x76543210;
    for (int row = 0; row < 256; ++row) p.scales[row] = row;
    for (int k = 0; k < group; ++k) {  // x picks one column
      p.x.clear();
      for (int i = 0; i < group; ++i) encode(Dtype::bfloat16, p.x, i == k);
      for (Dot dot : kDots) {
        const auto y = run(kernels(), dot, p, 0, 256);
        for (int row = 0; row < 256; ++row) {
          const bool edge = format == Format::mxfp4 ? row > 251 : row % 128 == 127;
          if (!edge) {
            EXPECT_EQ(y[row], p.at(row, k).value) << row << " " << k;
          }
        }
      }
    }
  }
}

TEST(Qmv, TheComparersSeePlantedFaults) {
  const Problem p({32, 2048, 64, 4, Dtype::bfloat16, 1}, 2);
  const auto y = run(kernels(), Dot::grid, p, 0, 32);
  Problem wrong = p;
  wrong.weight[7 * 256 + 100] ^= 1u << 10;  // one nibble of row 7, off by 4 steps
  EXPECT_EQ(outside(p, Dot::grid, run(kernels(), Dot::grid, wrong, 0, 32)), 1);
  auto flipped = y;
  flipped[9] = std::nextafter(flipped[9], 1e9f);
  EXPECT_FALSE(same_bits(y, flipped));
  std::vector<float> coarse = y;  // a relative error of 2^-8
  for (float& v : coarse) v *= 1 + 0x1p-8f;
  EXPECT_GT(outside(p, Dot::grid, coarse), 0);
}

TEST(Swiglu, FollowsTheOracle) {
  std::vector<float> gate, up;
  for (int i = -2000; i <= 2000; ++i) {
    gate.push_back(0.06f * i);
    up.push_back(1.5f - 0.001f * i);
  }
  gate.push_back(INFINITY), up.push_back(2);
  gate.push_back(NAN), up.push_back(1);
  const int n = gate.size();
  std::vector<float> plain(n);
  kKernels_plain.swiglu(gate.data(), up.data(), plain.data(), n);
  for (int i = 0; i < n - 2; ++i) {
    const double exact = double(gate[i]) / (1 + std::exp(-double(gate[i]))) * up[i];
    EXPECT_NEAR(plain[i], exact, 4 * 2 * kUnit * std::fabs(exact) + 5e-36) << gate[i];
  }
  EXPECT_EQ(plain[n - 2], INFINITY);
  EXPECT_TRUE(std::isnan(plain[n - 1]));
  for (const Kernels* table : available_kernels()) {
    std::vector<float> y(n);
    table->swiglu(gate.data(), up.data(), y.data(), n);
    EXPECT_TRUE(!std::memcmp(y.data(), plain.data(), 4 * (n - 1))) << table->isa;
  }
}

}  // namespace
}  // namespace moefuse::cpu
