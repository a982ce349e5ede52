// Long caches are attended to in stretches by blocks side by side. How many depends on the row's
// own cache alone, so that its bits do not depend on its neighbours.
#pragma once

constexpr int kGroupedStretch = 2048, kLatentStretch = 32;

// At most MOST, a power of two: one for every TOKENS tokens, the newest among them.
template <int MOST, int TOKENS>
FUNC uint stretches(uint cached) {
  uint active = 1u;
  while (active < uint(MOST) && cached >= active * TOKENS) active *= 2u;
  return active;
}

// Values [at, at + 8) of a head from its `active` stretches. partial: [MOST][D], each divided by
// its own sum; stats: [MOST] of (largest score as an exponent of two, sum). All are asked for at
// once.
template <int MOST, int D, typename P>
FUNC Floats<8> merged_stretches(P partial, P stats, uint at, uint active) {
  Floats<8> v = load_fresh(partial, at);
  if (active == 1u) return v;
  Floats<8> part[MOST];
  float tops[MOST], weights[MOST], top = stats[0], total = 0.0f;
  UNROLL for (int s = 0; s < MOST; ++s) {
    bool in = uint(s) < active;
    part[s] = zeros<8>();
    if (in) part[s] = load_fresh(partial + s * D, at);
    tops[s] = in ? stats[2 * s] : -as_float(0x7f800000u);
    weights[s] = in ? stats[2 * s + 1] : 0.0f;
  }
  UNROLL for (int s = 1; s < MOST; ++s) top = tops[s] > top ? tops[s] : top;
  v = zeros<8>();
  UNROLL for (int s = 0; s < MOST; ++s) {
    float weight = mul_rn(weights[s], exp2_fast(add_rn(tops[s], -top)));
    total = add_rn(total, weight);
    UNROLL for (int i = 0; i < 8; ++i) v.v[i] = fma_rn(part[s].v[i], weight, v.v[i]);
  }
  UNROLL for (int i = 0; i < 8; ++i) v.v[i] = div_fast(v.v[i], total);
  return v;
}

// Lane l: the shares of stretches l and l + 32 of 64 or fewer.
template <typename P>
FUNC Floats<2> stretch_weights(P stats, uint active, uint lane) {
  float tops[2], sums[2];
  UNROLL for (int h = 0; h < 2; ++h) {
    bool in = lane + 32u * uint(h) < active;
    tops[h] = in ? stats[2u * lane + 64u * uint(h)] : -as_float(0x7f800000u);
    sums[h] = in ? stats[2u * lane + 64u * uint(h) + 1u] : 0.0f;
  }
  float highest = lane_max(tops[0] > tops[1] ? tops[0] : tops[1]);
  Floats<2> weights;
  UNROLL for (int h = 0; h < 2; ++h) {
    weights.v[h] = sums[h] > 0.0f ? mul_rn(sums[h], exp2_fast(add_rn(tops[h], -highest))) : sums[h];
  }
  float total = lane_sum(add_rn(weights.v[0], weights.v[1]));
  UNROLL for (int h = 0; h < 2; ++h) weights.v[h] = div_fast(weights.v[h], total);
  return weights;
}
