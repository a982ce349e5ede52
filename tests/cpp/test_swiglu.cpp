// The fp32 SwiGLU of every instruction set against fp64, alone: inside the experts' op the bound of
// the products would hide its error.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tables.h"

namespace moefuse::cpu {
namespace {

constexpr double kUnit = 0x1p-24;

// exp within 2 units in the last place, 1 + exp, the quotient and the product half a unit each:
// eight half units. exp(x) is taken for infinite above 88.72, where |swiglu| <= 2.7e-37 |up|.
double bound(double truth, double up) {
  return 8 * kUnit * std::fabs(truth) + 2.7e-37 * std::fabs(up);
}

std::vector<float> swiglu(const Kernels& kernels, const std::vector<float>& gate,
                          const std::vector<float>& up) {
  std::vector<float> out(gate.size());
  kernels.swiglu(gate.data(), up.data(), out.data(), static_cast<int>(gate.size()));
  return out;
}

TEST(Swiglu, LiesInsideTheBoundOnEveryInstructionSet) {
  std::vector<float> gate, up;
  for (int i = 0; i < 40001; ++i) {  // not a multiple of sixteen
    gate.push_back(-100 + 0.005f * i);
    up.push_back(i % 2 ? 0.7f : -1.3f);
  }
  for (const Kernels* kernels : available_kernels()) {
    const auto out = swiglu(*kernels, gate, up);
    int outside = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      const double truth = gate[i] / (1 + std::exp(-double(gate[i]))) * up[i];
      outside += !(std::fabs(out[i] - truth) <= bound(truth, up[i]));
    }
    EXPECT_EQ(outside, 0) << kernels->isa;
  }
}

TEST(Swiglu, KeepsInfinityAndNan) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (const Kernels* kernels : available_kernels()) {
    const auto out = swiglu(*kernels, {inf, nan, 1, 1, 0}, {1, 1, nan, inf, 3});
    EXPECT_EQ(out[0], inf) << kernels->isa;
    EXPECT_TRUE(std::isnan(out[1])) << kernels->isa;
    EXPECT_TRUE(std::isnan(out[2])) << kernels->isa;
    EXPECT_EQ(out[3], inf) << kernels->isa;
    EXPECT_EQ(out[4], 0) << kernels->isa;
  }
}

}  // namespace
}  // namespace moefuse::cpu
