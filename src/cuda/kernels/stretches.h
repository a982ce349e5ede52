// Long caches are attended to in stretches by blocks side by side. How many depends on the row's
// own cache alone, so that its bits do not depend on its neighbours.
#pragma once

constexpr int kGroupedStretch = 2048, kLatentStretch = 32;

// At most MOST, a power of two: one for every TOKENS tokens.
template <int MOST, int TOKENS>
FUNC uint stretches(uint cached) {
  uint active = 1u;
  while (active < uint(MOST) && cached > active * TOKENS) active *= 2u;
  return active;
}

// Values [at, at + 8) of a head from its `active` stretches. partial: [MOST][D], each divided by
// its own sum; stats: [MOST] of (largest score as an exponent of two, sum).
template <int MOST, int D, typename P>
FUNC Floats<8> merged_stretches(P partial, P stats, uint at, uint active) {
  Floats<8> v = load_fresh(partial, at);
  if (active == 1u) return v;
  float top = stats[0], total = 0.0f;
  for (uint s = 1; s < active; ++s) top = stats[2 * s] > top ? stats[2 * s] : top;
  v = zeros<8>();
  for (uint s = 0; s < active; ++s) {
    float weight = mul_rn(stats[2 * s + 1], exp2_fast(add_rn(stats[2 * s], -top)));
    Floats<8> part = load_fresh(partial + s * D, at);
    total = add_rn(total, weight);
    UNROLL for (int i = 0; i < 8; ++i) v.v[i] = fma_rn(part.v[i], weight, v.v[i]);
  }
  UNROLL for (int i = 0; i < 8; ++i) v.v[i] = div_fast(v.v[i], total);
  return v;
}
