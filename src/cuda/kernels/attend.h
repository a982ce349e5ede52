// What attention by a cluster of 16 blocks has in common, grouped and latent.
#pragma once

constexpr float kLog2e = 1.44269504f;
constexpr int kCluster = 16;

// RMS norm of a vector spread over the lanes, the weight at hand.
template <int N>
FUNC Floats<N> gained_norm(Floats<N> x, const Floats<N>& gain, float eps) {
  float scale = rsqrt_fast(fma_rn(lane_sum(lane_dot<N>(x, x)), 1.0f / (32 * N), eps));
  UNROLL for (int j = 0; j < N; ++j) x.v[j] = norm_element<float>(x.v[j], scale, gain.v[j]);
  return x;
}

// Rotary embedding of such a vector, element i with i + half; turns: the lane's (cos, sin) pairs.
template <int N>
FUNC Floats<N> turned(Floats<N> x, const Floats<2 * N>& turns, uint lane) {
  UNROLL for (int j = 0; j < N; ++j) {
    float s = turns.v[2 * j + 1], other = shuffle_xor(x.v[j], 16u);
    x.v[j] = fma_rn(x.v[j], turns.v[2 * j], mul_rn(other, lane < 16u ? -s : s));
  }
  return x;
}

// Of the lanes that differ in the bits from FROM on below TO: the largest, the sum.
template <uint FROM, uint TO>
FUNC float largest_across(float v) {
  for (uint m = FROM; m < TO; m <<= 1) {
    float other = shuffle_xor(v, m);
    v = other > v ? other : v;
  }
  return v;
}
template <uint FROM, uint TO>
FUNC float sum_across(float v) {
  for (uint m = FROM; m < TO; m <<= 1) v += shuffle_xor(v, m);
  return v;
}

// Of a stretch the positions that a block has: [begin, end); the newest of all is the owner's last.
struct Positions {
  uint begin, end;
  bool owner;
};
FUNC Positions positions_of(uint cached, uint block, uint blocks) {
  uint all = cached + 1u;
  return {all * block / blocks, all * (block + 1u) / blocks, block == blocks - 1u};
}
