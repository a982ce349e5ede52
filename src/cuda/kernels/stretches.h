// Long caches are attended to in stretches by clusters side by side. How many depends on the row's
// own cache alone, so that its bits do not depend on its neighbours.
#pragma once

constexpr int kStretch = 2048;

// At most MOST, one for every kStretch tokens, the newest among them.
template <int MOST>
FUNC uint stretches(uint cached) {
  uint wanted = 1u + cached / uint(kStretch);
  return wanted < uint(MOST) ? wanted : uint(MOST);
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

// A thread's part of COLS values, those of heads of D each.
template <int COLS, int D, int MOST, int THREADS, typename P>
FUNC RowPart<COLS, THREADS> merged_row(P partial, P stats, uint active, uint thread_at) {
  RowPart<COLS, THREADS> row;
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    uint k = (thread_at + uint(i) * THREADS) * 8u, head = k / D;
    row.v[i] = zeros<8>();
    if (k < uint(COLS)) {
      row.v[i] = merged_stretches<MOST, D>(partial + head * (MOST * D), stats + head * (MOST * 2),
                                           k % D, active);
    }
  }
  return row;
}
