// Attention of N query heads, padded to 8 or 24, to latent positions that all of them share, by two
// warpgroups: 64 positions at a time, a stage, from tiles of 64 dimensions in shared memory. One
// warpgroup scores them, then each sums half of the dimensions. The blocks of a cluster meet once,
// at the end, where each merges its part of the heads' dimensions.
#pragma once

constexpr int kStage = 64, kTile = kStage * 64;

// Of a tile's element: its 16 bytes change places with others of its row.
FUNC uint in_tile(uint row, uint column) {
  return row * 64u + ((column / 8u ^ row % 8u) * 8u + column % 8u);
}
// Of dimension d of a row, in tiles of `rows` rows.
FUNC uint in_tiles(uint rows, uint row, uint d) {
  return d / 64u * (rows * 64u) + in_tile(row, d % 64u);
}

// What a thread knows so far. Heads are 8 j + 2 t + i for lane 4 g + t, as e = 2 j + i: the largest
// score, the same in every warp, the sum of the thread's own positions, and of its dimensions the
// values' sums: in the halves of columns the probabilities' high and low parts.
template <int N, int LORA>
struct LatentAttended {
  static constexpr int HEADS = N / 4, MINE = LORA / 128;  // tiles of a warpgroup
  static constexpr int TOGETHER = MINE % 2 == 0 ? 2 : 1;  // of those, as many as are sent at once
  static constexpr int UNIT = 64 * TOGETHER, UNITS = LORA / UNIT;  // a head's dimensions
  static constexpr int MOST = (N * UNITS + kCluster - 1) / kCluster;  // units of a block
  float top[HEADS], sum[HEADS];
  Floats<N> out[MINE];
};
FUNC uint head_of(int e, uint lane) {
  return uint(e / 2 * 8 + e % 2) + lane % 4u * 2u;
}

template <int N, int LORA>
FUNC LatentAttended<N, LORA> no_position_seen() {
  LatentAttended<N, LORA> a;
  UNROLL for (int e = 0; e < N / 4; ++e) {
    a.top[e] = -as_float(0x7f800000u);
    a.sum[e] = 0.0f;
  }
  UNROLL for (int m = 0; m < LORA / 128; ++m) a.out[m] = zeros<N>();
  return a;
}

// Exponents of two of a stage's positions, minus infinity from `valid` on, and each warp's largest
// of a head to tops [4][N]. scale carries log2 e.
template <typename T, int N, int ALL, typename P, typename F>
FUNC Floats<N / 2> score_stage(P keys, P queries, F tops, float scale, uint valid, uint warp,
                               uint lane) {
  Floats<N / 2> s = zeros<N / 2>();
  begin_products();
  UNROLL for (int k = 0; k < ALL; k += 16) {
    multiply_tiles<T, N, false>(s, keys + (k / 64 * kTile + k % 64),
                                queries + (k / 64 * (N * 64) + k % 64));
  }
  wait_for_products();
  settle(s);
  UNROLL for (int e = 0; e < N / 4; ++e) {
    float top = -as_float(0x7f800000u);
    UNROLL for (int r = 0; r < 2; ++r) {
      int at = e / 2 * 4 + 2 * r + e % 2;
      bool in = 16u * warp + lane / 4u + 8u * uint(r) < valid;
      s.v[at] = in ? s.v[at] * scale : -as_float(0x7f800000u);
      top = s.v[at] > top ? s.v[at] : top;
    }
    for (uint m = 4; m < 32u; m <<= 1) {
      float other = shuffle_xor(top, m);
      top = other > top ? other : top;
    }
    if (lane < 4u) tops[warp * N + head_of(e, lane)] = top;
  }
  return s;
}

// The probabilities of those scores, as two halves each so that rounding them costs nothing: rows
// of a tile, the heads' low halves after their high ones.
template <typename T, int N, int LORA, typename P>
FUNC void put_probabilities(LatentAttended<N, LORA>& a, const Floats<N / 2>& s, P probabilities,
                            uint warp, uint lane) {
  UNROLL for (int e = 0; e < N / 4; ++e) {
    UNROLL for (int r = 0; r < 2; ++r) {
      float p = exp2_fast(s.v[e / 2 * 4 + 2 * r + e % 2] - a.top[e]);
      uint position = 16u * warp + lane / 4u + 8u * uint(r);
      a.sum[e] += p;
      probabilities[in_tile(head_of(e, lane), position)] = T(p);
      probabilities[in_tile(N + head_of(e, lane), position)] = T(p - rounded<T>(p));
    }
  }
}

// A stage of `count` positions or fewer that every thread has put its part of into shared memory.
// Values up to a multiple of 16 positions have to be numbers. scorer: of the two warpgroups.
template <typename T, int N, int ALL, int LORA, typename P, typename F>
FUNC void attend_stage(LatentAttended<N, LORA>& a, P keys, P queries, P probabilities, F tops,
                       float scale, uint count, uint scorer, uint warp, uint lane) {
  Floats<N / 2> s = zeros<N / 2>();
  bool scores = warp / 4u == scorer;
  tiles_written();
  group_barrier();
  if (scores) {
    s = score_stage<T, N, ALL>(keys, queries, tops, scale, count, warp % 4u, lane);
  }
  group_barrier();
  UNROLL for (int e = 0; e < N / 4; ++e) {
    float top = a.top[e];
    UNROLL for (int w = 0; w < 4; ++w) {
      float other = tops[uint(w * N) + head_of(e, lane)];
      top = other > top ? other : top;
    }
    float keep = exp2_fast(a.top[e] - top);
    a.top[e] = top;
    a.sum[e] *= keep;
    UNROLL for (int m = 0; m < LORA / 128; ++m) {
      UNROLL for (int i = 0; i < 4; ++i) {
        a.out[m].v[i / 2 * (N / 2) + e / 2 * 4 + i % 2 * 2 + e % 2] *= keep;
      }
    }
  }
  if (scores) put_probabilities<T>(a, s, probabilities, warp % 4u, lane);
  tiles_written();
  group_barrier();
  begin_products();
  P values = keys + warp / 4u * (LORA / 128 * kTile);
  UNROLL for (int k = 0; k < kStage; k += 16) {
    if (uint(k) >= count) continue;
    UNROLL for (int m = 0; m < LORA / 128; ++m) {
      multiply_tiles<T, 2 * N, true>(a.out[m], values + (m * kTile + k * 64), probabilities + k);
    }
  }
  wait_for_products();
  UNROLL for (int m = 0; m < LORA / 128; ++m) settle(a.out[m]);
}

// Units of `heads` heads, head by head, go to the cluster's blocks in turn: how many to this one.
template <typename A>
FUNC uint units_of(uint heads, uint rank) {
  return (heads * uint(A::UNITS) + uint(kCluster - 1) - rank) / uint(kCluster);
}
// What each block gets: its units of all 16, and all heads' (largest score, sum).
template <typename A>
FUNC uint bytes_of_units(uint heads, uint rank) {
  return uint(kCluster) * (units_of<A>(heads, rank) * uint(A::UNIT * 4) + heads * 8u);
}
// Where dimension d of a unit stands: what a lane sends at once, of 16 dimensions of a tile g and
// g + 8, of TOGETHER tiles, beside each other.
template <int TOGETHER>
FUNC uint unit_place(uint d) {
  return (d % 64u / 16u * 8u + d % 8u) * uint(2 * TOGETHER) + d / 64u * 2u + d / 8u % 2u;
}

// This block's part of every head to the blocks that merge it: gathered [MOST][kCluster][UNIT],
// stats [heads][kCluster][2]. sums: [8][N], for the warps' to meet.
template <int N, int LORA, typename F, typename C>
FUNC void send_units(const LatentAttended<N, LORA>& a, F gathered, F stats, F sums, C arrivals,
                     uint rank, uint heads, uint warp, uint lane) {
  using A = LatentAttended<N, LORA>;
  UNROLL for (int e = 0; e < N / 4; ++e) {
    uint head = head_of(e, lane);
    if (head >= heads) continue;
    UNROLL for (int m = 0; m < A::MINE; m += A::TOGETHER) {
      Floats<2 * A::TOGETHER> part;
      UNROLL for (int j = 0; j < 2 * A::TOGETHER; ++j) {
        int at = e / 2 * 4 + j % 2 * 2 + e % 2;
        part.v[j] = a.out[m + j / 2].v[at] + a.out[m + j / 2].v[N / 2 + at];
      }
      uint unit = head * uint(A::UNITS) + (warp / 4u * A::MINE + uint(m)) / A::TOGETHER;
      uint at = (unit / uint(kCluster) * uint(kCluster) + rank) * uint(A::UNIT);
      send_part(gathered + (at + unit_place<A::TOGETHER>(warp % 4u * 16u + lane / 4u)), arrivals,
                unit % uint(kCluster), part);
    }
  }
  for (uint i = warp * 32u + lane; i < heads * uint(kCluster); i += 256u) {
    uint head = i / uint(kCluster);
    Floats<2> known = {{sums[8 * N + head], 0.0f}};
    UNROLL for (int w = 0; w < 8; ++w) known.v[1] += sums[uint(w * N) + head];
    send_part(stats + 2u * (head * uint(kCluster) + rank), arrivals, i % uint(kCluster), known);
  }
}

// The warps' sums of a head and its largest score to sums [9][N].
template <int N, int LORA, typename F>
FUNC void put_sums(const LatentAttended<N, LORA>& a, F sums, uint warp, uint lane) {
  UNROLL for (int e = 0; e < N / 4; ++e) {
    float sum = a.sum[e];
    for (uint m = 4; m < 32u; m <<= 1) sum += shuffle_xor(sum, m);
    if (lane < 4u) {
      sums[warp * N + head_of(e, lane)] = sum;
      if (warp == 0u) sums[8 * N + head_of(e, lane)] = a.top[e];
    }
  }
}

// This block's units to values divided by their sums, and of heads whose first unit it has (largest
// score, sum). A head's partial [LORA] and partial_stats [2] stand `stretches` apart.
template <typename A, int LORA, typename F, typename P>
FUNC void merge_units(F gathered, F stats, F weights, P partial, P partial_stats, uint heads,
                      uint rank, uint stretches, uint warp, uint lane) {
  uint mine = units_of<A>(heads, rank), of = warp * 2u + lane / 16u, from = lane % 16u;
  uint unit = of * uint(kCluster) + rank, head = unit / uint(A::UNITS);
  bool known = of < mine;
  uint at = 2u * ((known ? head : 0u) * uint(kCluster) + from);
  float top = stats[at], highest = top;
  for (uint m = 1; m < 16u; m <<= 1) {
    float other = shuffle_xor(highest, m);
    highest = other > highest ? other : highest;
  }
  float share = exp2_fast(top - highest), sum = share * stats[at + 1u];
  for (uint m = 1; m < 16u; m <<= 1) sum += shuffle_xor(sum, m);
  if (known) weights[of * uint(kCluster) + from] = div_fast(share, sum);
  if (known && unit % uint(A::UNITS) == 0u && from == 0u) {
    partial_stats[head * stretches * 2u] = highest;
    partial_stats[head * stretches * 2u + 1u] = sum;
  }
  group_barrier();
  for (uint i = warp * 32u + lane; i < mine * uint(A::UNIT); i += 256u) {
    uint place = i / uint(A::UNIT), d = i % uint(A::UNIT);
    unit = place * uint(kCluster) + rank;
    auto parts = gathered + (place * uint(kCluster * A::UNIT) + unit_place<A::TOGETHER>(d));
    float value = 0.0f;
    UNROLL for (int b = 0; b < kCluster; ++b) {
      value = fma_rn(weights[place * uint(kCluster) + b], parts[b * A::UNIT], value);
    }
    partial[unit / uint(A::UNITS) * stretches * LORA + unit % uint(A::UNITS) * A::UNIT + d] = value;
  }
}
