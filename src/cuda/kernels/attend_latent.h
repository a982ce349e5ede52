// Attention of N query heads, padded to 8 or 24, to latent positions that all of them share, by two
// warpgroups: stages of 64 positions as tiles of 64 dimensions in shared memory, two at a time.
// Each warpgroup scores a stage, then sums half of the dimensions of both. The blocks of a cluster
// meet once, at the end, where each merges its part of the heads' dimensions.
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

// Latent positions to a stage, a warp one at a time: `left` that are wanted, of which `old` are in
// the caches, then zeros for values up to a multiple of 16. The pointers are the lane's own: to row
// `warp` of the stage, to position 0 of the caches.
template <int LORA, int ROPE, typename S, typename P>
FUNC void fetch_stage(S stage, P latents, P rotated, uint left, uint old, uint warp, uint lane) {
  uint rows = (left + 15u) / 16u * 16u;
  old = old < left ? old : left;
  UNROLL for (int i = 0; i < kStage / 8; ++i) {
    uint p = warp + uint(i) * 8u;
    bool copied = p < old, zero = p >= left && p < rows;
    UNROLL for (int k = 0; k < LORA + ROPE; k += 256) {
      auto at = stage + (k / 64 * kTile + i * 8 * 64);
      if (lane * 8u + k < uint(LORA)) {
        if (copied) copy_async(at, latents + (p * LORA + k));
        if (zero) store_zeros(at);
      } else if (lane * 8u + k < uint(LORA + ROPE)) {
        if (copied) copy_async(at, rotated + (int(p * ROPE) + k - LORA));
      }
    }
  }
}

// A latent position: N consecutive values to a lane, then `count` rotated ones, every 32nd.
template <typename T, int N, int R, typename P>
FUNC void put_newest(const Floats<N>& latent, P latents, const Floats<R>& rotated, P others,
                     uint count, uint lane) {
  UNROLL for (int j = 0; j < N; ++j) latents[lane * N + j] = T(latent.v[j]);
  UNROLL for (int j = 0; j < R; ++j) {
    uint d = lane + 32u * uint(j);
    if (d < count) others[d] = T(rotated.v[j]);
  }
}
// The same to row `at` of a stage.
template <typename T, int LORA, int ROPE, typename S>
FUNC void put_position(S stage, uint at, const Floats<LORA / 32>& latent,
                       const Floats<(ROPE + 31) / 32>& rotated, uint lane) {
  UNROLL for (int j = 0; j < LORA / 32; ++j) {
    stage[in_tiles(kStage, at, lane * (LORA / 32) + j)] = T(latent.v[j]);
  }
  UNROLL for (int j = 0; j < (ROPE + 31) / 32; ++j) {
    uint d = lane + 32u * uint(j);
    if (d < uint(ROPE)) stage[in_tiles(kStage, at, LORA + d)] = T(rotated.v[j]);
  }
}

// A block's `count` heads' latent parts to tiles of N rows, a warp a head at a time, and zeros.
template <int N, int LORA, typename S, typename P>
FUNC void fetch_queries(S queries, P latents, uint count, uint warp, uint lane) {
  UNROLL for (int i = 0; i < N / 8; ++i) {
    uint row = warp + 8u * uint(i);
    for (uint d = lane * 8u; d < uint(LORA); d += 256u) {
      if (row < count) {
        copy_async(queries + in_tiles(N, row, d), latents + (row * LORA + d));
      } else {
        store_zeros(queries + in_tiles(N, row, d));
      }
    }
  }
}
// Their other parts, turned, from `rotated` on every `stride`th.
template <typename T, int N, int LORA, int ROPE, typename S, typename P, typename A>
FUNC void put_rotated(S queries, P rotated, uint stride, A angles, uint count, uint warp,
                      uint lane) {
  UNROLL for (int i = 0; i < N / 8; ++i) {
    uint row = warp + 8u * uint(i);
    Floats<(ROPE + 31) / 32> x =
        rope_neighbours<float, ROPE>(rotated + (row < count ? row : 0u) * stride, angles, lane);
    UNROLL for (int j = 0; j < (ROPE + 31) / 32; ++j) {
      uint d = lane + 32u * uint(j);
      if (d < uint(ROPE)) {
        queries[in_tiles(N, row, LORA + d)] = T(row < count ? x.v[j] : 0.0f);
      }
    }
  }
}

// What a thread knows so far. Heads are 8 j + 2 t + i for lane 4 g + t, as e = 2 j + i: the largest
// score, the same in every warp, the sum of the thread's own positions, and of its dimensions the
// values' sums, those by the probabilities' high halves in front of those by the low ones.
template <int N, int LORA>
struct LatentAttended {
  static constexpr int MINE = LORA / 128;                 // tiles of a warpgroup
  static constexpr int TOGETHER = MINE % 2 == 0 ? 2 : 1;  // of those, as many as are sent at once
  static constexpr int UNIT = 64 * TOGETHER, UNITS = LORA / UNIT;     // a head's dimensions
  static constexpr int MOST = (N * UNITS + kCluster - 1) / kCluster;  // units of a block
  float top[N / 4], sum[N / 4];
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
  UNROLL for (int m = 0; m < LatentAttended<N, LORA>::MINE; ++m) a.out[m] = zeros<N>();
  return a;
}

// Exponents of two of a stage's positions, minus infinity from `valid` on. scale carries log2 e.
template <typename T, int N, int ALL, typename P>
FUNC Floats<N / 2> score_stage(P keys, P queries, float scale, uint valid, uint warp, uint lane) {
  Floats<N / 2> s = zeros<N / 2>(), other = zeros<N / 2>();  // which do not wait for each other
  settle(s);
  settle(other);
  begin_products();
  UNROLL for (int k = 0; k < ALL; k += 16) {
    multiply_tiles<T, N, false>(k / 16 % 2 == 0 ? s : other, keys + (k / 64 * kTile + k % 64),
                                queries + (k / 64 * (N * 64) + k % 64));
  }
  wait_for_products();
  settle(s);
  settle(other);
  UNROLL for (int i = 0; i < N / 2; ++i) {
    bool in = 16u * warp + lane / 4u + 8u * uint(i / 2 % 2) < valid;
    s.v[i] = in ? (s.v[i] + other.v[i]) * scale : -as_float(0x7f800000u);
  }
  return s;
}

// A warp's largest of each head to tops [8][N].
template <int N, typename F>
FUNC void put_tops(const Floats<N / 2>& s, F tops, uint warp, uint lane) {
  UNROLL for (int e = 0; e < N / 4; ++e) {
    int at = e / 2 * 4 + e % 2;
    float top = largest_across<4, 32>(s.v[at] > s.v[at + 2] ? s.v[at] : s.v[at + 2]);
    if (lane < 4u) tops[warp * N + head_of(e, lane)] = top;
  }
}

// The largest scores with those of `warps` warps, and all sums so far in terms of them.
template <int N, int LORA, typename F>
FUNC void raise_tops(LatentAttended<N, LORA>& a, F tops, uint warps, bool first, uint lane) {
  UNROLL for (int e = 0; e < N / 4; ++e) {
    float top = a.top[e];
    UNROLL for (int w = 0; w < 8; ++w) {
      if (uint(w) >= warps) continue;
      float other = tops[uint(w * N) + head_of(e, lane)];
      top = other > top ? other : top;
    }
    float keep = exp2_fast(a.top[e] - top);
    a.top[e] = top;
    if (first) continue;  // they are zero
    a.sum[e] *= keep;
    UNROLL for (int m = 0; m < LatentAttended<N, LORA>::MINE; ++m) {
      UNROLL for (int i = 0; i < 4; ++i) {
        a.out[m].v[i / 2 * (N / 2) + e / 2 * 4 + i % 2 * 2 + e % 2] *= keep;
      }
    }
  }
}

// The probabilities of a stage's scores, as two halves each so that rounding them costs nothing:
// rows of a tile, the heads' low halves after their high ones.
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

// Scores and probabilities of two stages of `count` positions together or fewer, that every thread
// has put its part of into shared memory; a stage each of two warpgroups, its probabilities after
// the other's.
template <typename T, int N, int ALL, int LORA, typename P, typename F>
FUNC void score_stages(LatentAttended<N, LORA>& a, P keys, P queries, P probabilities, F tops,
                       float scale, uint count, bool first, uint warp, uint lane) {
  constexpr int STAGE = (ALL + 63) / 64 * kTile;
  uint half = warp / 4u;
  bool scores = count > half * uint(kStage);
  Floats<N / 2> s = zeros<N / 2>();
  tiles_written();
  group_barrier();
  if (scores) {
    s = score_stage<T, N, ALL>(keys + half * STAGE, queries, scale, count - half * uint(kStage),
                               warp % 4u, lane);
    put_tops<N>(s, tops, warp, lane);
  }
  group_barrier();
  raise_tops(a, tops, count > uint(kStage) ? 8u : 4u, first, lane);
  if (scores) {
    put_probabilities<T>(a, s, probabilities + half * uint(2 * N * 64), warp % 4u, lane);
  }
  tiles_written();
  group_barrier();
}

// Adds a stage's values, whose first `count` positions have probabilities. Values up to a multiple
// of 16 positions have to be numbers. No branch divides a sequence of products: the compiler would
// have each wait for the one in front.
template <typename T, int N, int LORA, typename P>
FUNC void add_stage(LatentAttended<N, LORA>& a, P values, P probabilities, uint count, uint warp) {
  constexpr int MINE = LatentAttended<N, LORA>::MINE;
  values = values + warp / 4u * (MINE * kTile);
  UNROLL for (int most = 16; most <= kStage; most += 16) {
    if (most < kStage ? (count + 15u) / 16u * 16u != uint(most) : count <= uint(most - 16))
      continue;
    UNROLL for (int m = 0; m < MINE; ++m) settle(a.out[m]);
    begin_products();
    UNROLL for (int k = 0; k < most; k += 16) {
      UNROLL for (int m = 0; m < MINE; ++m) {
        multiply_tiles<T, 2 * N, true>(a.out[m], values + (m * kTile + k * 64), probabilities + k);
      }
    }
    wait_for_products();
    UNROLL for (int m = 0; m < MINE; ++m) settle(a.out[m]);
  }
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

// The warps' sums of a head and its largest score to sums [9][N].
template <int N, int LORA, typename F>
FUNC void put_sums(const LatentAttended<N, LORA>& a, F sums, uint warp, uint lane) {
  UNROLL for (int e = 0; e < N / 4; ++e) {
    float sum = sum_across<4, 32>(a.sum[e]);
    if (lane < 4u) {
      sums[warp * N + head_of(e, lane)] = sum;
      if (warp == 0u) sums[8 * N + head_of(e, lane)] = a.top[e];
    }
  }
}

// This block's part of every head to the blocks that merge it: gathered [MOST][kCluster][UNIT],
// stats [heads][kCluster][2].
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

// This block's units to values divided by their sums, and of heads whose first unit it has (largest
// score, sum). A head's partial [LORA] and partial_stats [2] stand `stretches` apart.
template <typename A, int LORA, typename F, typename P>
FUNC void merge_units(F gathered, F stats, F weights, P partial, P partial_stats, uint heads,
                      uint rank, uint stretches, uint thread) {
  uint mine = units_of<A>(heads, rank), of = thread / 16u, from = thread % 16u;
  uint unit = of * uint(kCluster) + rank, head = unit / uint(A::UNITS);
  bool known = of < mine;
  uint at = 2u * ((known ? head : 0u) * uint(kCluster) + from);
  float top = stats[at], highest = largest_across<1, 16>(top);
  float share = exp2_fast(top - highest), sum = sum_across<1, 16>(share * stats[at + 1u]);
  if (known) weights[of * uint(kCluster) + from] = div_fast(share, sum);
  if (known && unit % uint(A::UNITS) == 0u && from == 0u) {
    partial_stats[head * stretches * 2u] = highest;
    partial_stats[head * stretches * 2u + 1u] = sum;
  }
  group_barrier();
  for (uint i = thread; i < mine * uint(A::UNIT); i += 256u) {
    uint place = i / uint(A::UNIT), d = i % uint(A::UNIT);
    unit = place * uint(kCluster) + rank;
    auto parts = gathered + (place * uint(kCluster * A::UNIT) + unit_place<A::TOGETHER>(d));
    float value = 0.0f;
    UNROLL for (int b = 0; b < kCluster; ++b) {
      value = fma_rn(weights[place * uint(kCluster) + uint(b)], parts[b * A::UNIT], value);
    }
    partial[unit / uint(A::UNITS) * stretches * LORA + unit % uint(A::UNITS) * A::UNIT + d] = value;
  }
}
