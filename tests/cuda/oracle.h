// Every stage of the step in fp64, from the step's own inputs to that stage, with a bound computed
// from the same numbers. Fetch copies bytes of device memory (or of the emulator's) to the host.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "../../src/cuda/step.h"

namespace moefuse::cuda::oracle {

using Fetch = std::function<void(void* to, const void* from, size_t bytes)>;
using Vector = std::vector<double>;

inline double bf16(uint16_t u) {
  const uint32_t x = static_cast<uint32_t>(u) << 16;
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline double round_bf16(float f) {
  uint32_t x;
  std::memcpy(&x, &f, 4);
  return bf16(static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1)) >> 16));
}

struct Bounded {
  Vector value, bound;
};
struct Verdict {
  bool ok = true;
  double worst = 0;  // largest error / bound
};

constexpr double kBf16 = 1.0 / 256, kFp32 = 1.0 / (1 << 23);  // unit roundoffs, fp32 doubled

struct Oracle {
  Fetch fetch;
  const StepParams& p;
  Verdict verdict;
  bool verbose = true;

  template <class T>
  std::vector<T> get(const void* from, size_t count) const {
    std::vector<T> v(count);
    fetch(v.data(), from, count * sizeof(T));
    return v;
  }
  Vector halves(const void* from, size_t count) const {
    const auto raw = get<uint16_t>(from, count);
    Vector v(count);
    std::transform(raw.begin(), raw.end(), v.begin(), bf16);
    return v;
  }
  Vector floats(const void* from, size_t count) const {
    const auto raw = get<float>(from, count);
    return Vector(raw.begin(), raw.end());
  }
  // bf16 vector of a ring slot, its first replica
  Vector ring(const uint32_t* base, int clock, size_t words, int replicas) const {
    return halves(base + (clock & (kRing - 1)) * replicas * words, 2 * words);
  }

  // rows [first, first + count) times x; the bound covers the tensor cores' sums around the fp16
  // offset (1040 at most) and every later fp32 rounding
  Bounded product(const Matrix& m, int bits, size_t first, size_t count, int K,
                  const Vector& x) const {
    const size_t words = K * bits / 32, groups = K / kGroupSize;
    const auto w = get<uint32_t>(m.weight + first * words, count * words);
    const Vector s = halves(m.scales + first * groups, count * groups);
    const Vector z = halves(m.biases + first * groups, count * groups);
    Bounded y{Vector(count), Vector(count)};
    for (size_t r = 0; r < count; ++r) {
      for (size_t g = 0; g < groups; ++g) {
        double dot = 0, sum = 0, size = 0;
        for (int i = 0; i < kGroupSize; ++i) {
          const size_t k = g * kGroupSize + i, bit = k * bits;
          const uint32_t q = w[r * words + bit / 32] >> (bit % 32) & ((1u << bits) - 1);
          dot += q * x[k], sum += x[k], size += std::abs(x[k]);
        }
        const double scale = s[r * groups + g], bias = z[r * groups + g];
        y.value[r] += scale * dot + bias * sum;
        const double top = (1 << bits) - 1, offset = bits == 4 ? 1040 : top;
        y.bound[r] += size * (4 * kFp32 * std::abs(scale) * offset +
                              24 * kFp32 * (std::abs(scale) * top + std::abs(bias)));
      }
    }
    return y;
  }
  // bf16(h * gain), and 1 / rms
  Vector normed(const Vector& h, const uint16_t* gain, double& factor) const {
    const Vector g = halves(gain, h.size());
    Vector x(h.size());
    double ssq = 0;
    for (size_t i = 0; i < h.size(); ++i) {
      ssq += h[i] * h[i];
      x[i] = round_bf16(static_cast<float>(h[i]) * static_cast<float>(g[i]));
    }
    factor = 1 / std::sqrt(ssq / h.size() + p.eps);
    return x;
  }
  static void scale(Bounded& y, double f) {
    for (size_t i = 0; i < y.value.size(); ++i) {
      y.value[i] *= f;
      y.bound[i] = y.bound[i] * f + 32 * kFp32 * std::abs(y.value[i]);
    }
  }
  static void round(Bounded& y) {
    for (size_t i = 0; i < y.value.size(); ++i) {
      y.bound[i] += kBf16 * (std::abs(y.value[i]) + y.bound[i]);
    }
  }
  void compare(const char* stage, const Vector& got, const Bounded& want) {
    double worst = 0, error = 0, size = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double e = std::abs(got[i] - want.value[i]);
      const double ratio = e / (want.bound[i] + 1e-30);
      worst = ratio <= worst ? worst : ratio;  // NaN must not pass
      if (!(ratio <= 1)) verdict.ok = false;
      error += e * e, size += want.value[i] * want.value[i];
    }
    verdict.worst = std::max(verdict.worst, worst);
    if (verbose) {
      std::printf("  %-18s relative rms error %.2e, largest error / bound %.3f\n", stage,
                  std::sqrt(error / size), worst);
    }
  }
};

// norm and rotation of one head with the step's own fp32 steps; rsqrt may differ in its last bit,
// so a rounding may flip: `flip` collects what that could change
inline Vector rotate(const Vector& v, const Vector& gain, const Vector& rope, double eps) {
  double ssq = 0;
  for (double x : v) ssq += x * x;
  const float n = static_cast<float>(1 / std::sqrt(ssq / v.size() + eps));
  Vector y(v.size()), out(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    y[i] = round_bf16(static_cast<float>(v[i]) * n * static_cast<float>(gain[i]));
  }
  const size_t half = v.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double c = rope[2 * i], s = rope[2 * i + 1];
    out[i] = round_bf16(static_cast<float>(y[i] * c - y[i + half] * s));
    out[i + half] = round_bf16(static_cast<float>(y[i + half] * c + y[i] * s));
  }
  return out;
}

// attention over `position` cached tokens and the new one
template <class G>
Bounded attention(const Oracle& o, const Layer& layer, const Vector& qkv, int position) {
  const int D = G::kHeadDim;
  const Vector qn = o.halves(layer.q_norm, D), kn = o.halves(layer.k_norm, D);
  const Vector rope = o.floats(o.p.rope + static_cast<size_t>(position) * D, D);
  auto head = [&](int h) { return Vector(qkv.begin() + h * D, qkv.begin() + (h + 1) * D); };
  Bounded y{Vector(G::kContext), Vector(G::kContext)};
  for (int kv = 0; kv < G::kKvHeads; ++kv) {
    const size_t base = static_cast<size_t>(kv) * o.p.cache_stride * D;
    Vector K = o.halves(layer.k_cache + base, static_cast<size_t>(position) * D);
    Vector V = o.halves(layer.v_cache + base, static_cast<size_t>(position) * D);
    const Vector k = rotate(head(G::kQHeads + kv), kn, rope, o.p.eps);
    const Vector v = head(G::kQHeads + G::kKvHeads + kv);
    K.insert(K.end(), k.begin(), k.end()), V.insert(V.end(), v.begin(), v.end());
    for (int h = kv * 8; h < kv * 8 + 8; ++h) {
      const Vector q = rotate(head(h), qn, rope, o.p.eps);
      Vector s(position + 1);
      double top = -1e300, sum = 0, slack = 0;
      for (int t = 0; t <= position; ++t) {
        double size = 0;
        for (int i = 0; i < D; ++i) {
          s[t] += q[i] * K[t * D + i], size += std::abs(q[i] * K[t * D + i]);
        }
        s[t] /= std::sqrt(double(D)), top = std::max(top, s[t]);
        // one flipped rounding of q or k a dozen dimensions, and fp32 sums
        slack = std::max(slack, size / std::sqrt(double(D)) * (kBf16 / 12 + 16 * kFp32));
      }
      for (double& x : s) x = std::exp(x - top), sum += x;
      for (int i = 0; i < D; ++i) {
        double size = 0;
        for (int t = 0; t <= position; ++t) {
          y.value[h * D + i] += s[t] / sum * V[t * D + i];
          size += s[t] / sum * std::abs(V[t * D + i]);
        }
        y.bound[h * D + i] = size * (2 * slack + 64 * kFp32);
      }
    }
  }
  return y;
}

template <class G>
void check_experts(Oracle& o, const Layer& layer, const Vector& middle, const Vector& scores,
                   const Vector& act, const Vector& out) {
  double n;
  const Vector x = o.normed(middle, layer.post_norm, n);
  std::vector<int> order(G::kExperts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  Bounded want{{}, {}}, sum{middle, Vector(G::kHidden)};
  Vector weight(G::kTopK);
  double total = 0;
  for (int k = 0; k < G::kTopK; ++k) {
    total += weight[k] = std::exp(scores[order[k]] - scores[order[0]]);
  }
  for (int k = 0; k < G::kTopK; ++k) {
    const size_t row = static_cast<size_t>(order[k]) * G::kWidth;
    Bounded gate = o.product(layer.gate, 4, row, G::kWidth, G::kHidden, x);
    Bounded up = o.product(layer.up, 4, row, G::kWidth, G::kHidden, x);
    Oracle::scale(gate, n), Oracle::scale(up, n);
    for (int i = 0; i < G::kWidth; ++i) {
      const double g = gate.value[i], u = up.value[i], silu = g / (1 + std::exp(-g));
      want.value.push_back(silu * u);  // |silu'| < 1.1
      want.bound.push_back(1.1 * gate.bound[i] * (std::abs(u) + up.bound[i]) +
                           std::abs(silu) * up.bound[i] + 32 * kFp32 * std::abs(silu * u));
    }
    const Vector a(act.begin() + k * G::kWidth, act.begin() + (k + 1) * G::kWidth);
    const size_t down = static_cast<size_t>(order[k]) * G::kHidden;
    const Bounded y = o.product(layer.down, 4, down, G::kHidden, G::kWidth, a);
    for (int i = 0; i < G::kHidden; ++i) {
      sum.value[i] += weight[k] / total * y.value[i];
      sum.bound[i] += weight[k] / total * (y.bound[i] + 32 * kFp32 * std::abs(y.value[i]));
    }
  }
  Oracle::round(want), Oracle::round(sum);
  o.compare("gate_up", act, want);
  o.compare("down", out, sum);
}

// The layer that ran at `clock` (hidden at `hidden`); its ring slots must still be in place, which
// holds for the last layer of a token.
template <class G>
void check_layer(Oracle& o, const Layer& layer, int clock, int hidden, int position) {
  const Exchange& x = o.p.x;
  const Vector in = o.ring(x.hidden, hidden, G::kHidden / 2, kReplicas);
  const Vector out = o.ring(x.hidden, hidden + 1, G::kHidden / 2, kReplicas);
  const Vector qkv = o.ring(x.qkv, clock, G::kQkvRows / 2, 1);
  const Vector context = o.ring(x.context, clock, G::kContext / 2, kReplicas);
  const Vector middle = o.ring(x.middle, clock, G::kHidden / 2, kReplicas);
  const Vector act = o.ring(x.act, clock, G::kTopK * G::kWidth / 2, kReplicas);
  const Vector scores =
      o.floats(x.scores + (clock & (kRing - 1)) * kReplicas * G::kExperts, G::kExperts);
  double n;
  const Vector a = o.normed(in, layer.input_norm, n);
  Bounded want{{}, {}};
  const size_t kv = G::kKvHeads * G::kHeadDim;
  for (const auto& [m, rows] :
       {std::pair{layer.q, size_t{G::kContext}}, {layer.k, kv}, {layer.v, kv}}) {
    const Bounded y = o.product(m, 4, 0, rows, G::kHidden, a);
    want.value.insert(want.value.end(), y.value.begin(), y.value.end());
    want.bound.insert(want.bound.end(), y.bound.begin(), y.bound.end());
  }
  Oracle::scale(want, n), Oracle::round(want);
  o.compare("qkv", qkv, want);
  Bounded att = attention<G>(o, layer, qkv, position);
  Oracle::round(att);
  o.compare("attention", context, att);
  Bounded proj = o.product(layer.o, 4, 0, G::kHidden, G::kContext, context);
  for (int i = 0; i < G::kHidden; ++i) proj.value[i] += in[i];
  Oracle::round(proj);
  o.compare("o_proj", middle, proj);
  const Vector b = o.normed(middle, layer.post_norm, n);
  Bounded router = o.product(layer.router, 8, 0, G::kExperts, G::kHidden, b);
  Oracle::scale(router, n);
  o.compare("moe_router", scores, router);
  check_experts<G>(o, layer, middle, scores, act, out);
}

// Rows [first, first + count) of the logits from the hidden vector at ring position `hidden`.
template <class G>
void check_logits(Oracle& o, int hidden, size_t first, size_t count) {
  double n;
  const Vector h = o.ring(o.p.x.hidden, hidden, G::kHidden / 2, kReplicas);
  const Vector x = o.normed(h, o.p.final_norm, n);
  Bounded want = o.product(o.p.lm_head, 4, first, count, G::kHidden, x);
  Oracle::scale(want, n);
  o.compare("lm_head", o.floats(o.p.logits + first, count), want);
}

}  // namespace moefuse::cuda::oracle
