// A router's logits come with the output projection in front of it. With x the layer's row, a what
// attention gives, O the output projection and g the norm's gains, the normed row is g (x + O a)
// times a scale, and so the logits are G (a beside x) times that scale, G = gate g O beside gate g
// (fold_router.body). The scale's parts are left with the logits, for whoever reads them.
#pragma once

// Experts to each of so many blocks.
FUNC constexpr int router_share(int experts, int blocks) {
  return experts > 0 ? (experts + blocks - 1) / blocks : 1;
}

// A thread's part of EACH rows of G.
template <int EACH, int K, int N, int THREADS>
struct RouterPart {
  RowPart<K, THREADS> attended[EACH];
  RowPart<N, THREADS> before[EACH];
};

// Rows [first, first + EACH) of E, the last one again past it.
template <int EACH, int E, int K, int N, int THREADS, typename P>
FUNC RouterPart<EACH, K, N, THREADS> load_router(P router, uint first, uint thread_at) {
  RouterPart<EACH, K, N, THREADS> part;
  UNROLL for (int e = 0; e < EACH; ++e) {
    uint expert = first + uint(e) < uint(E) ? first + uint(e) : uint(E - 1);
    part.attended[e] = load_row<K, THREADS>(router + expert * (K + N), thread_at);
    part.before[e] = load_row<N, THREADS>(router + (expert * (K + N) + K), thread_at);
  }
  return part;
}

template <int COLS, int THREADS>
FUNC float part_dot(const RowPart<COLS, THREADS>& a, const RowPart<COLS, THREADS>& b, float sum) {
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    UNROLL for (int j = 0; j < 8; ++j) sum = fma_rn(a.v[i].v[j], b.v[i].v[j], sum);
  }
  return sum;
}

// Each warp's sums in products: [ROWS][EACH][warps]. own: the layer's rows.
template <int ROWS, int EACH, int K, int N, int THREADS, typename F>
FUNC void dot_routers(const RouterPart<EACH, K, N, THREADS>& part,
                      const RowPart<K, THREADS> (&attended)[ROWS],
                      const RowPart<N, THREADS> (&own)[ROWS], F products, uint thread_at) {
  constexpr int WARPS = THREADS / 32;
  UNROLL for (int i = 0; i < ROWS * EACH; ++i) {
    int row = i / EACH, e = i % EACH;
    float sum = part_dot<N, THREADS>(part.before[e], own[row], 0.0f);
    sum = lane_sum(part_dot<K, THREADS>(part.attended[e], attended[row], sum));
    if (thread_at % 32u == 0u) products[uint(i) * WARPS + thread_at / 32u] = sum;
  }
}

// The sums of the warps, by the block's last threads: its first ones have the row to finish.
template <int ROWS, int EACH, int E, int WARPS, typename O, typename F>
FUNC void store_logits(O logits, F products, uint first, uint thread_at) {
  uint i = WARPS * 32u - 1u - thread_at, expert = first + i % uint(EACH);
  if (i >= uint(ROWS * EACH) || expert >= uint(E)) return;
  logits[i / uint(EACH) * uint(E) + expert] = sum_slices<WARPS, 1>(products + i * uint(WARPS), 0u);
}

// Sums of squares that a row of n values, a multiple of 64, comes with: one of each eight.
FUNC constexpr int square_parts(int n) {
  return n / 8;
}

// Lane 4 i of a warp holds value `row` + i of eight.
template <typename O>
FUNC void store_squares(O squares, float value, uint row, uint lane) {
  float square = lane % 4u == 0u ? mul_rn(value, value) : 0.0f;
  for (uint m = 4; m < 32u; m <<= 1) square = add_rn(square, shuffle_xor(square, m));
  if (lane == 0u) squares[row / 8u] = square;
}

// The norm's scale of a row of N values. Through L1: thousands of warps of a kernel ask for these
// few lines at once, which L2 hands out one after the other.
template <int N, typename F>
FUNC float scale_of_parts(F squares, float eps, uint lane) {
  float sum = 0.0f;
  UNROLL for (int i = 0; i < (square_parts(N) + 255) / 256; ++i) {
    uint at = lane * 8u + 256u * uint(i);
    Floats<8> eight = zeros<8>();
    if (at < uint(square_parts(N))) eight = load_values<8>(squares + at);
    UNROLL for (int j = 0; j < 8; ++j) sum = add_rn(sum, eight.v[j]);
  }
  return rsqrt_fast(fma_rn(lane_sum(sum), 1.0f / N, eps));
}

template <int E>
FUNC Spread<E> scaled(Spread<E> values, float scale) {
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) values.v[p] = mul_rn(values.v[p], scale);
  return values;
}
