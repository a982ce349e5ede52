// Cosines and sines of the rotary embedding, made by MLX's own operations so that they have stock's
// bits.
#pragma once

#include "decode/plan.h"

namespace moefuse {

template <class A>
class RopeTable {
 public:
  explicit RopeTable(const Rope& rope) : rope_(rope), cos_(0.0f), sin_(0.0f) {}

  // Makes the rows [0, positions) available. Not to be called while a step runs.
  void reserve(int positions, mx::Dtype dtype);

  // x [dims] <- x rotated for `position`; every product and sum is rounded to A.
  void rotate(A* x, int position) const {
    const int half = rope_.dims / 2, stride = rope_.traditional ? 2 : 1;
    const int second = rope_.traditional ? 1 : half;
    const A* c = cos_.data<A>() + int64_t(position) * half;
    const A* s = sin_.data<A>() + int64_t(position) * half;
    for (int i = 0; i < half; ++i) {
      const A x1 = x[i * stride], x2 = x[i * stride + second];
      x[i * stride] = static_cast<A>(x1 * c[i]) - static_cast<A>(x2 * s[i]);
      x[i * stride + second] = static_cast<A>(x1 * s[i]) + static_cast<A>(x2 * c[i]);
    }
  }

 private:
  Rope rope_;
  int rows_ = 0;
  mx::array cos_, sin_;  // [rows, dims / 2], of A
};

template <class A>
void RopeTable<A>::reserve(int positions, mx::Dtype dtype) {
  if (positions <= rows_) return;
  rows_ = std::max({positions, 2 * rows_, 256});
  const mx::Device cpu = mx::Device::cpu;
  const int half = rope_.dims / 2;
  const auto rates = mx::exp(mx::multiply(mx::arange(0.0, -half, -1.0, mx::float32, cpu),
                                          mx::array(std::log(rope_.base) / half, mx::float32), cpu),
                             cpu);
  const auto place = mx::expand_dims(mx::arange(0.0, rows_, 1.0, mx::float32, cpu), -1, cpu);
  const auto theta = mx::multiply(place, rates, cpu);
  cos_ = mx::astype(mx::cos(theta, cpu), dtype, cpu);
  sin_ = mx::astype(mx::sin(theta, cpu), dtype, cpu);
  mx::eval(cos_, sin_);
}

}  // namespace moefuse
