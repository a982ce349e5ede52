// gate, up and SwiGLU of one expert, and down with the weighted sum.
#pragma once

// Rows [row, row + ROWS) of silu(gate x) * (up x) of one expert, x read once for both.
template <typename T, int BITS, int GROUP, int ROWS, bool STEPS, typename W, typename S, typename X>
FUNC Floats<ROWS> swiglu_rows(Affine<W, S> gate, Affine<W, S> up, uint row, uint last, uint cols,
                              X x, uint lane) {
  Floats<ROWS> g = zeros<ROWS>(), u = zeros<ROWS>();
  for (uint k = lane * 8; k < cols; k += 256) {
    Eight<BITS> e = load_eight<BITS>(x, k);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      uint n = row + r < last ? row + r : last;
      uint word = n * (cols * BITS / 32) + k * BITS / 32, scale = n * (cols / GROUP) + k / GROUP;
      float rest = mul_rn(float(gate.biases[scale]), e.sum);
      Words<BITS / 4> q = load_words<BITS / 4>(gate.weight, word);
      rest = fma_rn(float(gate.scales[scale]), dot_eight<BITS>(q, e), rest);
      g.v[r] = add_rn(g.v[r], rest);
      rest = mul_rn(float(up.biases[scale]), e.sum);
      q = load_words<BITS / 4>(up.weight, word);
      rest = fma_rn(float(up.scales[scale]), dot_eight<BITS>(q, e), rest);
      u.v[r] = add_rn(u.v[r], rest);
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) {
    g.v[r] = swiglu<T, STEPS>(lane_sum(g.v[r]), lane_sum(u.v[r]));
  }
  return g;
}

// The stack's matrix of one expert, rows x cols.
template <int BITS, int GROUP, typename W, typename S>
FUNC Affine<W, S> expert_matrix(Affine<W, S> stack, uint expert, uint rows, uint cols) {
  uint scale = expert * rows * (cols / GROUP);
  return affine(stack.weight + expert * rows * (cols * BITS / 32), stack.scales + scale,
                stack.biases + scale);
}

// Four rows of an expert's matrix times x. An index outside the stack gives NaN and reads nothing.
template <int BITS, int GROUP, typename W, typename S, typename X>
FUNC Floats<4> expert_rows(Affine<W, S> stack, uint experts, uint expert, uint row, uint rows,
                           uint cols, X x, uint lane) {
  Floats<4> y;
  UNROLL for (int r = 0; r < 4; ++r) y.v[r] = as_float(0x7fc00000u);
  if (expert < experts) {
    y = affine_rows<BITS, GROUP, 4>(expert_matrix<BITS, GROUP>(stack, expert, rows, cols), row,
                                    rows - 1, cols, x, lane);
  }
  return y;
}

// The same for silu(gate x) * (up x).
template <typename T, int BITS, int GROUP, bool STEPS, typename W, typename S, typename X>
FUNC Floats<4> expert_swiglu(Affine<W, S> gate, Affine<W, S> up, uint experts, uint expert,
                             uint row, uint rows, uint cols, X x, uint lane) {
  Floats<4> h;
  UNROLL for (int r = 0; r < 4; ++r) h.v[r] = as_float(0x7fc00000u);
  if (expert < experts) {
    h = swiglu_rows<T, BITS, GROUP, 4, STEPS>(expert_matrix<BITS, GROUP>(gate, expert, rows, cols),
                                              expert_matrix<BITS, GROUP>(up, expert, rows, cols),
                                              row, rows - 1, cols, x, lane);
  }
  return h;
}

// Lane r stores element r of ROWS results, as TYPE.
template <typename TYPE, int ROWS, typename O>
FUNC void store_rows(Floats<ROWS> values, O out, uint at, uint row, uint rows, uint lane) {
  if (lane < uint(ROWS) && row + lane < rows) out[at + row + lane] = TYPE(pick<ROWS>(values, lane));
}
