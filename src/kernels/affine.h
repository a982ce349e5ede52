// Products with matrices in MLX's affine layout: W[n, k] = scales[n, k / GROUP] * q[n, k] +
// biases[n, k / GROUP], where value i of a 32-bit word sits at bit i * BITS.
#pragma once

// W, S: pointers to the words and to the scales, in whatever memory they live.
template <typename W, typename S>
struct Affine {
  W weight;
  S scales;
  S biases;
};

template <typename W, typename S>
FUNC Affine<W, S> affine(W weight, S scales, S biases) {
  Affine<W, S> a = {weight, scales, biases};
  return a;
}

// Eight consecutive values of x, value i divided by 2^(BITS * i) within each word: a product with
// the masked word then needs no shift. Powers of two, so nothing is rounded.
template <int BITS>
struct Eight {
  float v[8];
  float sum;
};

template <int BITS, typename X>
FUNC Eight<BITS> load_eight(X x, uint k) {
  Eight<BITS> e;
  float low = 0.0f, high = 0.0f;
  UNROLL for (int i = 0; i < 4; ++i) {
    float a = float(x[k + i]), b = float(x[k + i + 4]);
    low = add_rn(low, a);
    high = add_rn(high, b);
    e.v[i] = mul_rn(a, 1.0f / float(1u << (i * BITS % 32)));
    e.v[i + 4] = mul_rn(b, 1.0f / float(1u << ((i + 4) * BITS % 32)));
  }
  e.sum = add_rn(low, high);
  return e;
}

// Two chains of four: half the wait of one chain of eight, and fewer roundings.
template <int BITS>
FUNC float dot_eight(Words<BITS / 4> q, Eight<BITS> x) {
  constexpr uint ONES = (1u << BITS) - 1u;
  float low = 0.0f, high = 0.0f;
  UNROLL for (int i = 0; i < 4; ++i) {
    int a = i * BITS, b = (i + 4) * BITS;
    low = fma_rn(float(q.w[a / 32] & (ONES << (a % 32))), x.v[i], low);
    high = fma_rn(float(q.w[b / 32] & (ONES << (b % 32))), x.v[i + 4], high);
  }
  return add_rn(low, high);
}

// One lane's part of ROWS rows of W x, from `row`: k = 8 * lane, then every 256. A simdgroup reads
// 128 or 256 bytes of a row at a time, and any K that is a multiple of a group will do. Rows past
// `last` repeat it, so that nothing is read outside the matrix; the caller drops them. A
// step's bias and product cancel before they meet the larger sum: one rounding of that size, not
// two.
template <int BITS, int GROUP, int ROWS, typename W, typename S, typename X>
FUNC Floats<ROWS> affine_part(Affine<W, S> m, uint row, uint last, uint cols, X x, uint lane) {
  Floats<ROWS> acc = zeros<ROWS>();
  for (uint k = lane * 8; k < cols; k += 256) {
    Eight<BITS> e = load_eight<BITS>(x, k);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      uint n = row + r < last ? row + r : last;
      Words<BITS / 4> q = load_words<BITS / 4>(m.weight, n * (cols * BITS / 32) + k * BITS / 32);
      uint g = n * (cols / GROUP) + k / GROUP;
      float rest = mul_rn(float(m.biases[g]), e.sum);
      acc.v[r] = add_rn(acc.v[r], fma_rn(float(m.scales[g]), dot_eight<BITS>(q, e), rest));
    }
  }
  return acc;
}

// ROWS rows of W x; every lane holds them all.
template <int BITS, int GROUP, int ROWS, typename W, typename S, typename X>
FUNC Floats<ROWS> affine_rows(Affine<W, S> m, uint row, uint last, uint cols, X x, uint lane) {
  Floats<ROWS> acc = affine_part<BITS, GROUP, ROWS>(m, row, last, cols, x, lane);
  UNROLL for (int r = 0; r < ROWS; ++r) acc.v[r] = lane_sum(acc.v[r]);
  return acc;
}

// The lane's own element of a small array that every lane holds: no indexing by a variable, which
// would put the array in memory.
template <int N>
FUNC float pick(Floats<N> f, uint i) {
  float v = f.v[0];
  UNROLL for (int r = 1; r < N; ++r) v = i == uint(r) ? f.v[r] : v;
  return v;
}
