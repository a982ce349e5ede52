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
// values' sums. Probabilities are two halves: of eight heads columns beside each other of one
// product, which takes no longer; of more, two products to one sum.
template <int N, int LORA>
struct LatentAttended {
  static constexpr int MINE = LORA / 128;                 // tiles of a warpgroup
#ifdef MF_COMBINED
  static constexpr int WIDTH = N;           // columns of a product with values
#else
  static constexpr int WIDTH = 2 * N;           // columns of a product with values
#endif
  static constexpr int TOGETHER = MINE % 2 == 0 ? 2 : 1;  // tiles that are put down at once
  // What a block merges at once, dimensions of a head, comes as UNIT floats, (largest score, sum)
  // and two of padding.
  static constexpr int UNIT = 64 * TOGETHER, UNITS = LORA / UNIT, CHUNK = UNIT + 4;
  static constexpr int MOST = (N * UNITS + kCluster - 1) / kCluster;  // of a block
  static constexpr int FLOATS = kCluster * MOST * CHUNK;              // of all blocks, for one
  float top[N / 4], sum[N / 4];
  Floats<WIDTH / 2> out[MINE];
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
  UNROLL for (int m = 0; m < LORA / 128; ++m) {
    a.out[m] = zeros<LatentAttended<N, LORA>::WIDTH / 2>();
  }
  return a;
}

// Exponents of two of a stage's positions, minus infinity from `valid` on, and each warp's largest
// of a head to tops [4][N]. scale carries log2 e.
template <typename T, int N, int ALL, typename P, typename F>
FUNC Floats<N / 2> score_stage(P keys, P queries, F tops, float scale, uint valid, uint warp,
                               uint lane) {
  Floats<N / 2> s = zeros<N / 2>(), other = zeros<N / 2>();  // which do not wait for each other
  settle(s);
  settle(other);
  begin_products();
#ifndef MF_NOSCORE
  UNROLL for (int k = 0; k < ALL; k += 16) {
    multiply_tiles<T, N, false>(k / 16 % 2 == 0 ? s : other, keys + (k / 64 * kTile + k % 64),
                                queries + (k / 64 * (N * 64) + k % 64));
  }
#endif
  wait_for_products();
  settle(s);
  settle(other);
  UNROLL for (int e = 0; e < N / 4; ++e) {
    float top = -as_float(0x7f800000u);
    UNROLL for (int r = 0; r < 2; ++r) {
      int at = e / 2 * 4 + 2 * r + e % 2;
      bool in = 16u * warp + lane / 4u + 8u * uint(r) < valid;
      s.v[at] = in ? (s.v[at] + other.v[at]) * scale : -as_float(0x7f800000u);
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
  UNROLL for (int j = 0; j < N / 8; ++j) {
    Words<4> halves;  // of 8 positions each: two high, two low
    UNROLL for (int r = 0; r < 2; ++r) {
      float p[2];
      UNROLL for (int i = 0; i < 2; ++i) {
        p[i] = exp2_fast(s.v[4 * j + 2 * r + i] - a.top[2 * j + i]);
        a.sum[2 * j + i] += p[i];
      }
      halves.w[r] = two_halves<T>(p[0], p[1]);
      halves.w[2 + r] = two_halves<T>(p[0] - rounded<T>(p[0]), p[1] - rounded<T>(p[1]));
    }
    uint row = uint(8 * j) + lane % 8u + lane / 16u * uint(N);
    store_turned(probabilities + in_tile(row, 16u * warp + lane / 8u % 2u * 8u), halves);
  }
}

// A stage of `count` positions or fewer that every thread has put its part of into shared memory.
// Values up to a multiple of 16 positions have to be numbers. scorer: of the two warpgroups.
template <typename T, int N, int ALL, int LORA, typename P, typename F>
FUNC void attend_stage(LatentAttended<N, LORA>& a, P keys, P queries, P probabilities, F tops,
                       float scale, uint count, uint scorer, uint warp, uint lane) {
  constexpr int WIDTH = LatentAttended<N, LORA>::WIDTH;
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
      UNROLL for (int i = 0; i < LatentAttended<N, LORA>::WIDTH / N * 2; ++i) {
        a.out[m].v[i / 2 * (N / 2) + e / 2 * 4 + i % 2 * 2 + e % 2] *= keep;
      }
    }
  }
#ifndef MF_NOPROB
  if (scores) put_probabilities<T>(a, s, probabilities, warp % 4u, lane);
#endif
  tiles_written();
  group_barrier();
#ifndef MF_NOVALUES
  P values = keys + warp / 4u * (LORA / 128 * kTile);
  UNROLL for (int k = 0; k < kStage; k += 16) {
    if (uint(k) >= count) continue;
    UNROLL for (int m = 0; m < LORA / 128; ++m) settle(a.out[m]);
    begin_products();
    UNROLL for (int m = 0; m < LORA / 128; ++m) {
      P value = values + (m * kTile + k * 64);
      multiply_tiles<T, WIDTH, true>(a.out[m], value, probabilities + k);
      if (WIDTH == N) {
        multiply_tiles<T, WIDTH, true>(a.out[m], value, probabilities + (N * 64 + k));
      }
    }
  }
#endif
  wait_for_products();
  UNROLL for (int m = 0; m < LORA / 128; ++m) settle(a.out[m]);
}

// Units of `heads` heads, head by head, go to the cluster's blocks in turn: how many to this one.
template <typename A>
FUNC uint units_of(uint heads, uint rank) {
  return (heads * uint(A::UNITS) + uint(kCluster - 1) - rank) / uint(kCluster);
}
// Where a block's part of a unit stands among what it sends: [kCluster][MOST][CHUNK].
template <typename A>
FUNC uint chunk_of(uint unit) {
  return (unit % uint(kCluster) * uint(A::MOST) + unit / uint(kCluster)) * uint(A::CHUNK);
}
// Where dimension d of a unit stands: what a lane puts down at once, of 16 dimensions of a tile g
// and g + 8, of TOGETHER tiles, beside each other.
template <int TOGETHER>
FUNC uint unit_place(uint d) {
  return (d % 64u / 16u * 8u + d % 8u) * uint(2 * TOGETHER) + d / 64u * 2u + d / 8u % 2u;
}

// This block's part of every head, for send_units. sums: [9][N].
template <int N, int LORA, typename F>
FUNC void put_units(const LatentAttended<N, LORA>& a, F outgoing, F sums, uint heads, uint warp,
                    uint lane) {
  using A = LatentAttended<N, LORA>;
  UNROLL for (int e = 0; e < N / 4; ++e) {
    uint head = head_of(e, lane);
    float sum = a.sum[e];
    for (uint m = 4; m < 32u; m <<= 1) sum += shuffle_xor(sum, m);
    if (lane < 4u) {
      sums[warp * N + head] = sum;
      if (warp == 0u) sums[8 * N + head] = a.top[e];
    }
    UNROLL for (int m = 0; m < A::MINE; m += A::TOGETHER) {
      Floats<2 * A::TOGETHER> part;
      UNROLL for (int j = 0; j < 2 * A::TOGETHER; ++j) {
        int at = e / 2 * 4 + j % 2 * 2 + e % 2;
        part.v[j] = a.out[m + j / 2].v[at];
        if (A::WIDTH > N) part.v[j] += a.out[m + j / 2].v[A::WIDTH / 2 - N / 2 + at];
      }
      uint unit = head * uint(A::UNITS) + (warp / 4u * A::MINE + uint(m)) / A::TOGETHER;
      uint at = chunk_of<A>(unit) + unit_place<A::TOGETHER>(warp % 4u * 16u + lane / 4u);
      if (head < heads) store_floats(outgoing + at, part);
    }
  }
}

// Those to the cluster's blocks that merge them: gathered [kCluster][MOST][CHUNK].
template <int N, typename A, typename F, typename C>
FUNC void send_units(F outgoing, F gathered, F sums, C arrivals, uint rank, uint heads,
                     uint thread) {
  for (uint unit = thread; unit < heads * uint(A::UNITS); unit += 256u) {
    uint head = unit / uint(A::UNITS);
    Floats<4> known = {{sums[8 * N + head], 0.0f, 0.0f, 0.0f}};
    UNROLL for (int w = 0; w < 8; ++w) known.v[1] += sums[uint(w * N) + head];
    store_floats(outgoing + (chunk_of<A>(unit) + uint(A::UNIT)), known);
  }
  tiles_written();
  group_barrier();
  if (thread >= uint(kCluster)) return;
  uint floats = units_of<A>(heads, thread) * uint(A::CHUNK);
  if (floats > 0u) {
    send_floats(outgoing + thread * uint(A::MOST * A::CHUNK),
                gathered + rank * uint(A::MOST * A::CHUNK), arrivals, thread, floats);
  }
}

// This block's units to values divided by their sums, and of heads whose first unit it has (largest
// score, sum). A head's partial [LORA] and partial_stats [2] stand `stretches` apart.
template <typename A, int LORA, typename F, typename P>
FUNC void merge_units(F gathered, F weights, P partial, P partial_stats, uint heads, uint rank,
                      uint stretches, uint thread) {
  uint mine = units_of<A>(heads, rank), of = thread / 16u, from = thread % 16u;
  uint unit = of * uint(kCluster) + rank;
  bool known = of < mine;
  uint at = (from * uint(A::MOST) + (known ? of : 0u)) * uint(A::CHUNK) + uint(A::UNIT);
  float top = known ? float(gathered[at]) : 0.0f, highest = top;
  for (uint m = 1; m < 16u; m <<= 1) {
    float other = shuffle_xor(highest, m);
    highest = other > highest ? other : highest;
  }
  float share = exp2_fast(top - highest), sum = known ? share * gathered[at + 1u] : 0.0f;
  for (uint m = 1; m < 16u; m <<= 1) sum += shuffle_xor(sum, m);
  if (known) weights[of * uint(kCluster) + from] = div_fast(share, sum);
  if (known && unit % uint(A::UNITS) == 0u && from == 0u) {
    partial_stats[unit / uint(A::UNITS) * stretches * 2u] = highest;
    partial_stats[unit / uint(A::UNITS) * stretches * 2u + 1u] = sum;
  }
  group_barrier();
  for (uint i = thread; i < mine * uint(A::UNIT); i += 256u) {
    uint place = i / uint(A::UNIT), d = i % uint(A::UNIT);
    unit = place * uint(kCluster) + rank;
    auto parts = gathered + (place * uint(A::CHUNK) + unit_place<A::TOGETHER>(d));
    float value = 0.0f;
    UNROLL for (int b = 0; b < kCluster; ++b) {
      value = fma_rn(weights[place * uint(kCluster) + uint(b)], parts[b * (A::MOST * A::CHUNK)],
                     value);
    }
    partial[unit / uint(A::UNITS) * stretches * LORA + unit % uint(A::UNITS) * A::UNIT + d] = value;
  }
}
