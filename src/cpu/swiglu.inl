// SwiGLU in fp32, and the exponential that it and the attention share.
#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

// exp(x) within 2 units in the last place for results in the normal range; below exp(-87.3) it
// stays at that value's size (1.2e-38), above exp(88.7) it is infinite. NaN stays NaN.
// x = n ln 2 + r, |r| <= 0.347; a polynomial of degree 6 in r (its error 2^-28 relative), times
// 2^n.
MOEFUSE_INLINE f32x16 exp_lanes(f32x16 x) {
  const f32x16 low = splat(-87.3f), high = splat(88.72f);
  f32x16 v = select(x < low, low, x);
  v = select(v > high, high, v);
  const f32x16 magic = splat(12582912.0f);
  const f32x16 n = fused(v, splat(1.44269504f), magic) - magic;
  f32x16 r = fused(n, splat(-0.693145752f), v);  // ln 2 in two parts
  r = fused(n, splat(-1.42860677e-6f), r);
  f32x16 p = splat(1.38888889e-3f);
  p = fused(p, r, splat(8.33333333e-3f));
  p = fused(p, r, splat(4.16666667e-2f));
  p = fused(p, r, splat(1.66666667e-1f));
  p = fused(p, r, splat(0.5f));
  p = fused(p, r, splat(1.0f));
  p = fused(p, r, splat(1.0f));
  // 2^n in two factors: n reaches 128, one past the largest exponent.
  const i32x16 whole = convert<i32x16>(n), half = whole >> 1;
  p = p * cast<f32x16>((half + 127) << 23) * cast<f32x16>((whole - half + 127) << 23);
  const f32x16 infinite = splat(__builtin_inff());
  p = select(x > high, infinite, p);
  return select(x != x, x, p);
}

void swiglu(const float* gate, const float* up, float* out, int n) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    const f32x16 g = load_floats(gate, Dtype::float32, i, count);
    const f32x16 u = load_floats(up, Dtype::float32, i, count);
    const f32x16 y = g / (splat(1.0f) + exp_lanes(-g)) * u;
    store_floats(out, Dtype::float32, i, count, y);
  }
}

}  // namespace
}  // namespace moefuse::cpu
