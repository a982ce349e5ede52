// Attention of one query against a stretch of the KV cache, and the merge of such stretches.
#pragma once

// What a simdgroup knows of its keys so far: the largest score, the sum of e^(score - top), and the
// sum of e^(score - top) * value, N values a lane.
template <int N>
struct Attended {
  float top;
  float sum;
  Floats<N> out;
};

template <int N>
FUNC Attended<N> nothing_attended() {
  Attended<N> a;
  a.top = -as_float(0x7f800000u);
  a.sum = 0.0f;
  a.out = zeros<N>();
  return a;
}

// e^(top - highest), 0 for a stretch that held no key.
FUNC float share_of(float top, float highest) {
  return top == -as_float(0x7f800000u) ? 0.0f : exp_fp32(add_rn(top, -highest));
}

template <int N>
FUNC Attended<N> attend(Attended<N> a, float score, Floats<N> value) {
  float top = score > a.top ? score : a.top;
  float keep = share_of(a.top, top), p = exp_fp32(add_rn(score, -top));
  a.top = top;
  a.sum = fma_rn(a.sum, keep, p);
  UNROLL for (int j = 0; j < N; ++j) a.out.v[j] = fma_rn(a.out.v[j], keep, mul_rn(p, value.v[j]));
  return a;
}

// N consecutive elements a lane.
template <int N, typename P>
FUNC Floats<N> load_lane(P p, uint lane) {
  Floats<N> f;
  UNROLL for (int j = 0; j < N; ++j) f.v[j] = float(p[lane * N + j]);
  return f;
}

// The query takes the scale: rounded in each element, not once in the far larger score.
template <int N>
FUNC Floats<N> scaled(Floats<N> x, float scale) {
  UNROLL for (int j = 0; j < N; ++j) x.v[j] = mul_rn(x.v[j], scale);
  return x;
}

template <int N>
FUNC float lane_dot(Floats<N> a, Floats<N> b) {
  float sum = 0.0f;
  UNROLL for (int j = 0; j < N; ++j) sum = fma_rn(a.v[j], b.v[j], sum);
  return sum;
}

// RMS norm of a vector spread over the lanes, N consecutive elements each.
template <typename T, int N, typename W>
FUNC Floats<N> lane_norm(Floats<N> x, W weight, float eps, uint lane) {
  float scale = rms_scale(lane_sum(lane_dot<N>(x, x)), 32 * N, eps);
  UNROLL for (int j = 0; j < N; ++j) {
    x.v[j] = float(norm_element<T>(x.v[j], scale, float(weight[lane * N + j])));
  }
  return x;
}

// Rotary embedding of such a vector, element i paired with i + half: the partner sits 16 lanes off.
// `rope` holds (cos, sin) for each pair.
template <typename T, int N, typename R>
FUNC Floats<N> rope_halves(Floats<N> x, R rope, uint lane) {
  UNROLL for (int j = 0; j < N; ++j) {
    uint pair = (lane % 16u) * N + j;
    float c = rope[2 * pair], s = rope[2 * pair + 1];
    float other = shuffle_xor(x.v[j], 16u);
    float turned = mul_rn(other, lane < 16u ? -s : s);
    x.v[j] = rounded<T>(fma_rn(x.v[j], c, turned));
  }
  return x;
}

// The same for neighbours (2i, 2i + 1), element i in lane i % 32.
template <typename T, int D, typename P, typename R>
FUNC Floats<(D + 31) / 32> rope_neighbours(P p, R rope, uint lane) {
  Floats<(D + 31) / 32> x;
  UNROLL for (int j = 0; j < (D + 31) / 32; ++j) {
    uint i = lane + 32u * uint(j);
    float v = i < uint(D) ? float(p[i]) : 0.0f, other = shuffle_xor(v, 1u);
    float c = i < uint(D) ? rope[i / 2 * 2] : 0.0f, s = i < uint(D) ? rope[i / 2 * 2 + 1] : 0.0f;
    x.v[j] = rounded<T>(fma_rn(v, c, mul_rn(other, i % 2u == 0u ? -s : s)));
  }
  return x;
}

// The simdgroups of a threadgroup put their stretches together, then store the sum of N * 32 values
// at `partial` and (top, sum) at `stats`. `all` holds SIMDS * 32 * N floats, `heads` SIMDS * 2.
template <int SIMDS, int N, typename A, typename H, typename P, typename S>
FUNC void store_attended(Attended<N> a, A all, H heads, P partial, S stats, uint lane, uint simd) {
  UNROLL for (int j = 0; j < N; ++j) all[(simd * 32u + lane) * N + j] = a.out.v[j];
  if (lane == 0u) {
    heads[2 * simd] = a.top;
    heads[2 * simd + 1] = a.sum;
  }
  group_barrier();
  float highest = -as_float(0x7f800000u), total = 0.0f;
  for (uint i = 0; i < SIMDS; ++i) {
    float top = heads[2 * i];
    highest = top > highest ? top : highest;
  }
  for (uint i = 0; i < SIMDS; ++i) {
    total = fma_rn(heads[2 * i + 1], share_of(heads[2 * i], highest), total);
  }
  for (uint d = simd * 32u + lane; d < 32 * N; d += SIMDS * 32) {
    float sum = 0.0f;
    for (uint i = 0; i < SIMDS; ++i) {
      sum = fma_rn(all[i * 32 * N + d], share_of(heads[2 * i], highest), sum);
    }
    partial[d] = sum;
  }
  if (simd == 0u && lane == 0u) {
    stats[0] = highest;
    stats[1] = total;
  }
}

// Weight of stretch `which` among the SPLITS of a head: partial values times this are summed.
template <int SPLITS, typename S>
FUNC float split_weight(S stats, uint which) {
  float highest = -as_float(0x7f800000u), total = 0.0f;
  for (uint i = 0; i < SPLITS; ++i) {
    float top = stats[2 * i];
    highest = top > highest ? top : highest;
  }
  for (uint i = 0; i < SPLITS; ++i) {
    total = fma_rn(stats[2 * i + 1], share_of(stats[2 * i], highest), total);
  }
  return div_rn(share_of(stats[2 * which], highest), total);
}
