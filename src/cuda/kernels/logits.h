// A router's logits without a kernel of their own. RMS norm's scale is one number, so logit[e] =
// scale * sum of x[k] gain[k] W[e, k]: the block that makes 16 values of x has 16 columns' part of
// every logit at once. A cluster's blocks, 256 columns, send each part to the one of them that adds
// it up. Whoever wants the logits adds up the clusters'. All in a fixed order.
#pragma once

// Of a row E + 1 sums are made: the logits before the norm's scale, then that of x[k]^2. So many
// of them, in a row, are one block's of a cluster to add up.
FUNC constexpr int sums_of_block(int experts) {
  return (experts + kCluster) / kCluster;
}
// What the block of that rank hears from the others, for so many rows.
FUNC constexpr uint bytes_of_sums(int experts, uint rank, int rows) {
  uint from = rank * uint(sums_of_block(experts)), all = uint(experts) + 1u;
  uint left = from < all ? all - from : 0u, most = uint(sums_of_block(experts));
  return (left < most ? left : most) * uint(rows * kCluster * 4);
}

// Eight columns of an expert: of 8 bits in groups of GROUP, or of T.
template <typename T, int GROUP>
struct GateColumns {
  Words<2> q;
  float scale, bias;

  template <typename W, typename S>
  FUNC void load(W weight, S scales, S biases, uint at) {
    q = load_words<2>(weight, at / 4u);
    scale = float(scales[at / GROUP]);
    bias = float(biases[at / GROUP]);
  }
  FUNC float dot(const Floats<8>& x) const {
    float y = 0.0f, sum = 0.0f;
    UNROLL for (int j = 0; j < 8; ++j) {
      y = fma_rn(float(q.w[j / 4] >> (j % 4 * 8) & 255u), x.v[j], y);
      sum = add_rn(sum, x.v[j]);
    }
    return fma_rn(scale, y, mul_rn(bias, sum));
  }
};
template <typename T>
struct GateColumns<T, 0> {
  Floats<8> w;

  template <typename W, typename S>
  FUNC void load(W weight, S, S, uint at) {
    w = load_fresh(weight, at);
  }
  FUNC float dot(const Floats<8>& x) const {
    float y = 0.0f;
    UNROLL for (int j = 0; j < 8; ++j) y = fma_rn(w.v[j], x.v[j], y);
    return y;
  }
};

// What a thread of 256 has of the gate: of every 128th expert half of the block's 16 columns.
template <typename T, int GROUP, int E>
struct GateShare {
  static constexpr int PASSES = (2 * E + 255) / 256;
  GateColumns<T, GROUP> experts[PASSES > 0 ? PASSES : 1];
  Floats<8> gains;
};
// Columns past the last stand for the first: their values of x are zero.
template <typename T, int GROUP, int E, int H, typename N, typename W, typename S>
FUNC GateShare<T, GROUP, E> load_gate(N norm, W weight, S scales, S biases, uint block,
                                      uint thread) {
  GateShare<T, GROUP, E> gate;
  uint column = block * 16u + thread % 2u * 8u;
  column = column < uint(H) ? column : 0u;
  gate.gains = zeros<8>();
  if (E > 0) gate.gains = load_fresh(norm, column);
  UNROLL for (int i = 0; i < (GateShare<T, GROUP, E>::PASSES); ++i) {
    uint e = thread / 2u + 128u * uint(i);
    gate.experts[i].load(weight, scales, biases, (e < uint(E) ? e : 0u) * H + column);
  }
  return gate;
}

// The block's parts of the sums of ROWS rows, 16 values of each, to the blocks that add them up.
// gathered: [kCluster][ROWS][sums_of_block(E)].
template <int ROWS, typename T, int GROUP, int E, typename V, typename A>
FUNC void send_sums(const GateShare<T, GROUP, E>& gate, V values, V gathered, A arrivals, uint rank,
                    uint thread) {
  constexpr uint MINE = sums_of_block(E);
  UNROLL for (int r = 0; r < ROWS; ++r) {
    auto send = [&](uint at, float v) {
      send_part(gathered + ((rank * ROWS + uint(r)) * MINE + at % MINE), arrivals, at / MINE, v);
    };
    Floats<8> x;
    float square = 0.0f;
    UNROLL for (int j = 0; j < 8; ++j) {
      x.v[j] = values[uint(r) * 16u + thread % 2u * 8u + uint(j)];
      square = fma_rn(x.v[j], x.v[j], square);
      x.v[j] = mul_rn(x.v[j], gate.gains.v[j]);
    }
    UNROLL for (int i = 0; i < (GateShare<T, GROUP, E>::PASSES); ++i) {
      uint e = thread / 2u + 128u * uint(i);
      float y = gate.experts[i].dot(x);
      y = add_rn(y, shuffle_xor(y, 1u));
      if (thread % 2u == 0u && e < uint(E)) send(e, y);
    }
    square = add_rn(square, shuffle_xor(square, 1u));
    if (thread == 1u) send(E, square);
  }
}

// The cluster's sums of ROWS rows to sums [rows][slices(H)][E + 1], by the blocks that have them.
template <int ROWS, int E, int H, typename G, typename P>
FUNC void store_sums(G gathered, P sums, uint cluster, uint rank, uint thread) {
  constexpr uint MINE = sums_of_block(E);
  UNROLL for (uint first = 0; first < ROWS * MINE; first += 256u) {
    uint i = first + thread, at = rank * MINE + i % MINE;
    if (i < ROWS * MINE && at <= uint(E)) {
      sums[(i / MINE * slices(H) + cluster) * (E + 1) + at] =
          sum_slices<kCluster, ROWS * MINE>(gathered, i);
    }
  }
}

// A row's sums on their way: a thread's, of every THREADS-th expert.
template <int E, int H, int THREADS>
struct RowSums {
  static constexpr int COUNT = (E + THREADS - 1) / THREADS;
  float experts[COUNT][slices(H)], squares[slices(H)];
};
template <int E, int H, int THREADS, typename P>
FUNC RowSums<E, H, THREADS> load_sums(P sums, uint thread) {
  RowSums<E, H, THREADS> row;
  UNROLL for (int s = 0; s < slices(H); ++s) {
    UNROLL for (int i = 0; i < (RowSums<E, H, THREADS>::COUNT); ++i) {
      uint e = thread + uint(i) * THREADS;
      row.experts[i][s] = sums[uint(s) * (E + 1) + (e < uint(E) ? e : 0u)];
    }
    row.squares[s] = sums[uint(s) * (E + 1) + E];
  }
  return row;
}
// The row's logits, rounded to T, to shared memory. A barrier has to follow.
template <typename T, int E, int H, int THREADS, typename F>
FUNC void store_logits(const RowSums<E, H, THREADS>& row, F logits, float eps, uint thread) {
  float scale = scale_of_squares<slices(H)>(row.squares, H, eps);
  UNROLL for (int i = 0; i < (RowSums<E, H, THREADS>::COUNT); ++i) {
    uint e = thread + uint(i) * THREADS;
    float y = sum_slices<slices(H), 1>(row.experts[i], 0u);
    if (e < uint(E)) logits[e] = rounded<T>(mul_rn(y, scale));
  }
}
