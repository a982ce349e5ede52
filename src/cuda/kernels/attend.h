// Attention of up to eight heads to 16 positions by one warp, on the tensor cores.
#pragma once

constexpr float kLog2e = 1.44269504f;

// N consecutive values of T, aligned to as many.
template <int N, typename T>
FUNC Floats<N> load_values(const T* p) {
  struct alignas(N % 8 == 0 ? 16 : N * sizeof(T)) Aligned {
    T v[N];
  };
  Aligned all = *reinterpret_cast<const Aligned*>(p);
  Floats<N> f;
  UNROLL for (int i = 0; i < N; ++i) f.v[i] = float(all.v[i]);
  return f;
}

// RMS norm of a vector spread over the lanes, the weight at hand.
template <typename T, int N>
FUNC Floats<N> gained_norm(Floats<N> x, const Floats<N>& gain, float eps) {
  float scale = rsqrt_fast(fma_rn(lane_sum(lane_dot<N>(x, x)), 1.0f / (32 * N), eps));
  UNROLL for (int j = 0; j < N; ++j) x.v[j] = float(norm_element<T>(x.v[j], scale, gain.v[j]));
  return x;
}

// Rotary embedding of such a vector, element i with i + half; turns: the lane's (cos, sin) pairs.
template <typename T, int N>
FUNC Floats<N> turned(Floats<N> x, const Floats<2 * N>& turns, uint lane) {
  UNROLL for (int j = 0; j < N; ++j) {
    float s = turns.v[2 * j + 1], other = shuffle_xor(x.v[j], 16u);
    x.v[j] = rounded<T>(fma_rn(x.v[j], turns.v[2 * j], mul_rn(other, lane < 16u ? -s : s)));
  }
  return x;
}

// 16 positions of one cache: lane 4 g + t holds dimensions 32 j + 8 t to 32 j + 8 t + 7 of
// positions g and g + 8.
template <int D>
struct Positions {
  Words<4> words[2][D / 32];
};

// Positions [at, end) of p, D apart; past the end the last one is repeated, or position 0 of an
// empty cache: what is there does not count.
template <int D, typename T>
FUNC Positions<D> load_positions(const T* p, uint at, uint end, uint lane) {
  Positions<D> k;
  UNROLL for (int h = 0; h < 2; ++h) {
    uint i = at + lane / 4u + 8u * uint(h);
    i = i < end ? i : (end > 0u ? end - 1u : 0u);
    UNROLL for (int j = 0; j < D / 32; ++j) {
      k.words[h][j] = load_eight(p + (size_t(i) * D + 32u * uint(j) + lane % 4u * 8u));
    }
  }
  return k;
}

// Position `which` of these 16 becomes the D values at p.
template <int D, typename T>
FUNC void put_position(Positions<D>& positions, const T* p, uint which, uint lane) {
  UNROLL for (int h = 0; h < 2; ++h) {
    if (lane / 4u + 8u * uint(h) == which) {
      UNROLL for (int j = 0; j < D / 32; ++j) {
        positions.words[h][j] = load_eight(p + (32u * uint(j) + lane % 4u * 8u));
      }
    }
  }
}

// What a warp knows so far: of heads 2 t and 2 t + 1 the largest score and the sum (each lane's own
// positions), and the sum of values: out[j][r] holds for dimensions 32 j + 8 (g / 2) + 4 r + g % 2
// and 2 more the two heads.
template <int D>
struct WarpAttention {
  float top[2], sum[2];
  Floats<4> out[D / 32][2];
};

template <int D>
FUNC WarpAttention<D> nothing_seen() {
  WarpAttention<D> a;
  UNROLL for (int i = 0; i < 2; ++i) {
    a.top[i] = -as_float(0x7f800000u);
    a.sum[i] = 0.0f;
  }
  UNROLL for (int j = 0; j < D / 32; ++j) {
    UNROLL for (int r = 0; r < 2; ++r) a.out[j][r] = zeros<4>();
  }
  return a;
}

// Scores of 16 positions for heads 2 t and 2 t + 1, positions g and then g + 8. queries: lane
// 4 g + t holds head g's dimensions as Positions do.
template <int D, typename T>
FUNC Floats<4> position_scores(const Positions<D>& keys, const Words<4>* queries) {
  Floats<4> chains[2] = {zeros<4>(), zeros<4>()};
  UNROLL for (int j = 0; j < D / 32; ++j) {
    UNROLL for (int h = 0; h < 4; h += 2) {
      chains[h / 2] = multiply_halves<T>(
          chains[h / 2], keys.words[0][j].w[h], keys.words[1][j].w[h], keys.words[0][j].w[h + 1],
          keys.words[1][j].w[h + 1], queries[j].w[h], queries[j].w[h + 1]);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) chains[0].v[i] += chains[1].v[i];
  return chains[0];
}

// scale carries log2 e; `valid` of the positions count.
template <int D, typename T>
FUNC void attend_values(WarpAttention<D>& a, Floats<4> s, const Positions<D>& values, float scale,
                        uint valid, uint lane) {
  float p[4], keep[2];
  UNROLL for (int i = 0; i < 2; ++i) {
    float first = lane / 4u < valid ? s.v[i] * scale : -as_float(0x7f800000u);
    float second = lane / 4u + 8u < valid ? s.v[i + 2] * scale : -as_float(0x7f800000u);
    float top = first > second ? first : second;
    for (uint m = 4; m < 32u; m <<= 1) {
      float other = shuffle_xor(top, m);
      top = other > top ? other : top;
    }
    top = a.top[i] > top ? a.top[i] : top;
    keep[i] = exp2_fast(a.top[i] - top);
    p[i] = exp2_fast(first - top);
    p[i + 2] = exp2_fast(second - top);
    a.sum[i] = a.sum[i] * keep[i] + (p[i] + p[i + 2]);
    a.top[i] = top;
  }
  // The probabilities as two halves each, so that rounding them to T costs nothing.
  uint high[2], low[2];
  UNROLL for (int h = 0; h < 2; ++h) {
    high[h] = pack_halves<T>(p[2 * h], p[2 * h + 1]);
    low[h] =
        pack_halves<T>(p[2 * h] - rounded<T>(p[2 * h]), p[2 * h + 1] - rounded<T>(p[2 * h + 1]));
    high[h] = transpose_tile(high[h]);
    low[h] = transpose_tile(low[h]);
  }
  UNROLL for (int j = 0; j < D / 32; ++j) {
    UNROLL for (int r = 0; r < 2; ++r) {
      uint v[4];
      UNROLL for (int h = 0; h < 4; ++h) {
        v[h] = transpose_tile(values.words[h / 2][j].w[2 * r + h % 2]);
      }
      UNROLL for (int h = 0; h < 4; ++h) a.out[j][r].v[h] *= keep[h % 2];
      a.out[j][r] = multiply_halves<T>(a.out[j][r], v[0], v[1], v[2], v[3], high[0], high[1]);
      a.out[j][r] = multiply_halves<T>(a.out[j][r], v[0], v[1], v[2], v[3], low[0], low[1]);
    }
  }
}
