// What the stages compute, in fp64 with a bound on the error of the kernels' arithmetic.
#pragma once

#include <algorithm>

#include "harness.h"

namespace harness {

// x * w / rms(x), each rounding to T as norm_element takes it.
template <typename T>
std::vector<Approx> rms_norm_oracle(const std::vector<Approx>& x, const std::vector<T>& weight,
                                    double eps) {
  double sum = 0.0, error = 0.0;
  for (const Approx& v : x) {
    sum += v.value * v.value;
    error += 2 * std::abs(v.value) * v.error + v.error * v.error;
  }
  const double mean = sum / x.size();
  Approx scale{1 / std::sqrt(mean + eps), 0};
  const double relative = error / sum + (x.size() / 32.0 + 32) * kUnit;
  scale.error = scale.value * (relative / 2 + 4 * kUnit);
  std::vector<Approx> out;
  for (size_t i = 0; i < x.size(); ++i) {
    const Approx w{static_cast<float>(weight[i]), 0};
    out.push_back(round_to<T>(mul(w, round_to<T>(mul(x[i], scale)))));
  }
  return out;
}

template <typename T>
std::vector<Approx> exact(const std::vector<T>& v, size_t begin, size_t count) {
  std::vector<Approx> out;
  for (size_t i = 0; i < count; ++i) out.push_back({static_cast<float>(v[begin + i]), 0});
  return out;
}

// Pairs (first, second) of x turned by (cos, sin).
template <typename T>
void rotate(Approx& first, Approx& second, float c, float s) {
  const Approx a = first, b = second;
  first = round_to<T>(add(mul(a, {c, 0}), mul(b, {-s, 0})));
  second = round_to<T>(add(mul(b, {c, 0}), mul(a, {s, 0})));
}

inline Approx dot_product(const std::vector<Approx>& a, const std::vector<Approx>& b) {
  Approx sum;
  double magnitude = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum.value += a[i].value * b[i].value;
    sum.error += std::abs(a[i].value) * b[i].error + std::abs(b[i].value) * a[i].error +
                 a[i].error * b[i].error;
    magnitude += std::abs(a[i].value * b[i].value);
  }
  sum.error += 1.01 * (a.size() / 32 + 8) * kUnit * magnitude;
  return sum;
}

// sum of softmax(scores) * values. `steps`: most roundings that one key's share passes.
inline std::vector<Approx> softmax_average(const std::vector<Approx>& scores,
                                           const std::vector<std::vector<Approx>>& values,
                                           double steps) {
  double top = -1e300, low = 1e300, total = 0.0;
  for (const Approx& s : scores) top = std::max(top, s.value), low = std::min(low, s.value);
  std::vector<double> p, relative;
  for (const Approx& s : scores) {
    p.push_back(std::exp(s.value - top));
    relative.push_back(std::expm1(2 * s.error) + steps * (10 + top - low) * kUnit);
    total += p.back();
  }
  std::vector<Approx> out(values[0].size());
  for (size_t d = 0; d < out.size(); ++d) {
    for (size_t i = 0; i < scores.size(); ++i) out[d].value += p[i] / total * values[i][d].value;
    for (size_t i = 0; i < scores.size(); ++i) {
      const Approx v = values[i][d];
      out[d].error +=
          p[i] / total *
          (v.error + (relative[i] + steps * kUnit) * (std::abs(v.value) + std::abs(out[d].value)));
    }
  }
  return out;
}

// What the stretches of one head add up to: partial sums and (top, sum) of each.
inline double merged(const std::vector<float>& partial, const std::vector<float>& stats, size_t at,
                     size_t splits, size_t width, size_t d) {
  double top = -1e300, total = 0.0, sum = 0.0;
  for (size_t s = 0; s < splits; ++s) top = std::max(top, double(stats[(at + s) * 2]));
  for (size_t s = 0; s < splits; ++s) {
    const double share = std::exp(stats[(at + s) * 2] - top);
    total += share * stats[(at + s) * 2 + 1];
    sum += share * partial[(at + s) * width + d];
  }
  return sum / total;
}

}  // namespace harness
