// The scalar functions of stock MLX's CPU backend, step by step, so that `exact` keeps its bits.
// T is float, mx::float16_t or mx::bfloat16_t; MLX's half types round after every operation.
#pragma once

#include <cmath>
#include <cstring>

#include "mlx/mlx.h"

namespace moefuse::cpu {

// exp as 2^(integer) * 2^(fraction) with a degree 6 polynomial; 0 below -88, infinity above 88.
inline float stock_exp(float x) {
  if (std::isnan(x)) return x;
  if (x > 88.0f) return INFINITY;
  if (x < -88.0f) return 0.0f;
  float y = x * 1.442695f;
  auto whole = static_cast<float>(std::floor(static_cast<double>(y) + 0.5));
  float part = y - whole;
  float p = 1.535336188319500e-4f;
  p = std::fma(p, part, 1.339887440266574e-3f);
  p = std::fma(p, part, 9.618437357674640e-3f);
  p = std::fma(p, part, 5.550332471162809e-2f);
  p = std::fma(p, part, 2.402264791363012e-1f);
  p = std::fma(p, part, 6.931472028550421e-1f);
  p = std::fma(p, part, 1.0f);
  int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale * p;
}

// The exponential is rounded to T, the rest of the sigmoid is not.
template <class T>
T stock_sigmoid(T x) {
  T e = static_cast<T>(stock_exp(std::fabs(static_cast<float>(x))));
  float y = 1.0f / (1.0f + static_cast<float>(e));
  return static_cast<T>(static_cast<float>(x) < 0.0f ? y : 1.0f - y);
}

// Calls f with a value of the C++ type that an MLX floating dtype stands for.
template <class F>
void with_float_type(mlx::core::Dtype dtype, F&& f) {
  if (dtype == mlx::core::float32) {
    f(float{});
  } else if (dtype == mlx::core::float16) {
    f(mlx::core::float16_t{});
  } else {
    f(mlx::core::bfloat16_t{});
  }
}

}  // namespace moefuse::cpu
