// What the 32 lanes of a simdgroup do together, and the arithmetic that every kernel text shares.
#pragma once

template <int N>
struct Floats {
  float v[N];
};

template <int N>
FUNC Floats<N> zeros() {
  Floats<N> f;
  UNROLL for (int i = 0; i < N; ++i) f.v[i] = 0.0f;
  return f;
}

// The value rounded to T, as a float. T(v) rounds to nearest even on every device.
template <typename T>
FUNC float rounded(float v) {
  return float(T(v));
}

// Butterfly sum: addition commutes, so every lane holds the same bits.
FUNC float lane_sum(float v) {
  for (uint m = 16; m > 0; m >>= 1) v = add_rn(v, shuffle_xor(v, m));
  return v;
}

FUNC float lane_max(float v) {
  for (uint m = 16; m > 0; m >>= 1) {
    float other = shuffle_xor(v, m);
    v = other > v ? other : v;
  }
  return v;
}

// e^x, within 2 ulp where the result is a normal number, 0 below. 2^n is applied in two halves so
// that neither leaves the exponent's range.
FUNC float exp_fp32(float x) {
  float clamped = x < -88.0f ? -88.0f : (x > 89.0f ? 89.0f : x);
  clamped = x == x ? clamped : 0.0f;
  float n = round_even(mul_rn(clamped, 1.44269504f));
  float r = fma_rn(n, -0.693145752f, clamped);  // ln 2 in two parts; the first has 16 bits
  r = fma_rn(n, -1.42860677e-6f, r);
  float p = fma_rn(1.9875691e-4f, r, 1.3981999e-3f);
  p = fma_rn(p, r, 8.3334519e-3f);
  p = fma_rn(p, r, 4.1665796e-2f);
  p = fma_rn(p, r, 1.6666665e-1f);
  p = fma_rn(p, r, 0.5f);
  p = add_rn(fma_rn(mul_rn(r, r), p, r), 1.0f);
  int whole = int(n), half_way = whole / 2;
  float e = mul_rn(mul_rn(p, as_float(uint(half_way + 127) << 23)),
                   as_float(uint(whole - half_way + 127) << 23));
  e = x < -87.3f ? 0.0f : e;
  e = x > 88.7228f ? as_float(0x7f800000u) : e;
  return x == x ? e : x;
}

// 1 / (1 + e^-x) by e^|x| and its mirror image, rounded to T after each step.
template <typename T>
FUNC float sigmoid(float x) {
  float magnitude = x < 0.0f ? -x : x;
  float e = rounded<T>(exp_fp32(magnitude));
  float y = rounded<T>(div_rn(1.0f, rounded<T>(add_rn(1.0f, e))));
  return x < 0.0f ? y : rounded<T>(add_rn(1.0f, -y));
}

// silu(gate) * up. STEPS rounds to T after each step, as a graph of separate ops does.
template <typename T, bool STEPS>
FUNC float swiglu(float gate, float up) {
  if (STEPS) {
    gate = rounded<T>(gate);
    return rounded<T>(mul_rn(rounded<T>(mul_rn(gate, sigmoid<T>(gate))), rounded<T>(up)));
  }
  // By e^-|x|: no cancellation for either sign.
  float e = exp_fp32(gate < 0.0f ? gate : -gate);
  float s = div_rn(gate < 0.0f ? e : 1.0f, add_rn(1.0f, e));
  return mul_rn(mul_rn(gate, s), up);
}
