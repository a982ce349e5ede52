// Attention of eight query heads to one stretch of a cache by a cluster of 16 blocks, on the tensor
// cores. A block has a sixteenth of the positions, kBatch of them at a time in shared memory. Each
// warp scores 16 positions, then sums every eighth 16 dimensions of the values: no warp waits for
// another's sums, and the blocks' meet once, at the end.
#pragma once

constexpr float kLog2e = 1.44269504f;
constexpr int kCluster = 16, kTiles = 5, kBatch = 16 * kTiles;
constexpr int kProbabilities = kBatch + 8;  // of a head; eight more keep the banks apart

// RMS norm of a vector spread over the lanes, the weight at hand.
template <int N>
FUNC Floats<N> gained_norm(Floats<N> x, const Floats<N>& gain, float eps) {
  float scale = rsqrt_fast(fma_rn(lane_sum(lane_dot<N>(x, x)), 1.0f / (32 * N), eps));
  UNROLL for (int j = 0; j < N; ++j) x.v[j] = norm_element<float>(x.v[j], scale, gain.v[j]);
  return x;
}

// Rotary embedding of such a vector, element i with i + half; turns: the lane's (cos, sin) pairs.
template <int N>
FUNC Floats<N> turned(Floats<N> x, const Floats<2 * N>& turns, uint lane) {
  UNROLL for (int j = 0; j < N; ++j) {
    float s = turns.v[2 * j + 1], other = shuffle_xor(x.v[j], 16u);
    x.v[j] = fma_rn(x.v[j], turns.v[2 * j], mul_rn(other, lane < 16u ? -s : s));
  }
  return x;
}

// Of the lanes that differ in the bits from FROM on below TO: the largest, the sum.
template <uint FROM, uint TO>
FUNC float largest_across(float v) {
  for (uint m = FROM; m < TO; m <<= 1) {
    float other = shuffle_xor(v, m);
    v = other > v ? other : v;
  }
  return v;
}
template <uint FROM, uint TO>
FUNC float sum_across(float v) {
  for (uint m = FROM; m < TO; m <<= 1) v += shuffle_xor(v, m);
  return v;
}

// Of a stretch the positions that a block has: [begin, end); the newest of all is the owner's last.
struct Positions {
  uint begin, end;
  bool owner;
};
FUNC Positions positions_of(uint cached, uint block, uint blocks) {
  uint all = cached + 1u;
  return {all * block / blocks, all * (block + 1u) / blocks, block == blocks - 1u};
}

// Of `count` positions that are left the next batch's tiles.
FUNC uint tiles_of(uint count) {
  return count < uint(kBatch) ? (count + 15u) / 16u : uint(kTiles);
}

// 16 positions of D dimensions at keys, PITCH apart as the eight heads at queries; `valid` of them
// count, scale carries log2 e. What is left behind, of each head: the probabilities against the
// tile's own largest score, as two halves each so that rounding them costs nothing, and that score
// and their sum in stats.
template <typename T, int D, int PITCH, typename P, typename F>
FUNC void score_tile(P keys, P queries, P high, P low, F stats, float scale, uint valid,
                     uint lane) {
  Floats<4> chains[4] = {zeros<4>(), zeros<4>(), zeros<4>(), zeros<4>()};
  P a = keys + (lane % 16u * PITCH + lane / 16u * 8u);
  P b = queries + (lane % 8u * PITCH + lane / 8u * 8u);
  UNROLL for (int k = 0; k < D; k += 32) {
    Words<4> q = load_tiles(b + k);
    UNROLL for (int h = 0; h < 2; ++h) {
      Words<4> key = load_tiles(a + (k + 16 * h));
      int chain = k / 32 % 2 * 2 + h;
      chains[chain] = multiply_halves<T>(chains[chain], key.w[0], key.w[1], key.w[2], key.w[3],
                                         q.w[2 * h], q.w[2 * h + 1]);
    }
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    float s[2], p[2];
    UNROLL for (int r = 0; r < 2; ++r) {
      int j = 2 * r + i;
      float sum = (chains[0].v[j] + chains[1].v[j]) + (chains[2].v[j] + chains[3].v[j]);
      s[r] = lane / 4u + 8u * uint(r) < valid ? sum * scale : -as_float(0x7f800000u);
    }
    float top = largest_across<4, 32>(s[0] > s[1] ? s[0] : s[1]);
    uint head = lane % 4u * 2u + uint(i), at = head * kProbabilities + lane / 4u;
    UNROLL for (int r = 0; r < 2; ++r) {
      p[r] = exp2_fast(s[r] - top);
      high[at + 8 * r] = T(p[r]);
      low[at + 8 * r] = T(p[r] - rounded<T>(p[r]));
    }
    float sum = sum_across<4, 32>(p[0] + p[1]);
    if (lane < 4u) {
      stats[2u * head] = top;
      stats[2u * head + 1u] = sum;
    }
  }
}

// What a block knows so far: of heads 2 t and 2 t + 1 of lane 4 g + t the largest score and the
// sum, the same in every warp; of the warp's 16 dimensions, of 128 at most, the sum of values, for
// dimensions g and g + 8 of both heads.
struct ClusterAttended {
  float top[2], sum[2];
  Floats<4> out;
};

FUNC ClusterAttended nothing_seen() {
  ClusterAttended a;
  UNROLL for (int i = 0; i < 2; ++i) {
    a.top[i] = -as_float(0x7f800000u);
    a.sum[i] = 0.0f;
  }
  a.out = zeros<4>();
  return a;
}

// Adds the values of a batch of `tiles` tiles that score_tile has seen. Values past the last valid
// position have to be numbers.
template <typename T, int D, int PITCH, typename P, typename F>
FUNC void add_values(ClusterAttended& a, P values, P high, P low, F stats, uint tiles, uint warp,
                     uint lane) {
  float shares[kTiles][2], keep[2];
  UNROLL for (int i = 0; i < 2; ++i) {
    uint head = lane % 4u * 2u + uint(i);
    float best = a.top[i];
    UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      shares[tile][i] = -as_float(0x7f800000u);
      if (uint(tile) < tiles) shares[tile][i] = stats[16u * uint(tile) + 2u * head];
      best = shares[tile][i] > best ? shares[tile][i] : best;
    }
    keep[i] = exp2_fast(a.top[i] - best);
    a.top[i] = best;
    a.sum[i] *= keep[i];
    UNROLL for (int tile = 0; tile < kTiles; ++tile) {
      shares[tile][i] = exp2_fast(shares[tile][i] - best);
      if (uint(tile) < tiles) {
        a.sum[i] = fma_rn(shares[tile][i], stats[16u * uint(tile) + 2u * head + 1u], a.sum[i]);
      }
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) a.out.v[i] *= keep[i % 2];
  UNROLL for (int tile = 0; tile < kTiles; ++tile) {
    if (uint(tile) >= tiles) continue;
    uint at = lane / 4u * kProbabilities + 16u * uint(tile) + lane % 4u * 2u;
    uint h0 = load_two(high + at), h1 = load_two(high + (at + 8u));
    uint l0 = load_two(low + at), l1 = load_two(low + (at + 8u));
    // 16 positions of 16 dimensions, turned: each lane names one row of an 8 by 8 tile.
    P row =
        values + ((16u * uint(tile) + lane % 8u + lane / 16u * 8u) * PITCH + lane / 8u % 2u * 8u);
    if (D == 128 || warp < uint(D / 16)) {
      Words<4> v = load_turned(row + warp * 16u);
      Floats<4> c = multiply_halves<T>(zeros<4>(), v.w[0], v.w[1], v.w[2], v.w[3], h0, h1);
      c = multiply_halves<T>(c, v.w[0], v.w[1], v.w[2], v.w[3], l0, l1);
      UNROLL for (int i = 0; i < 4; ++i) {
        a.out.v[i] = fma_rn(shares[tile][i % 2], c.v[i], a.out.v[i]);
      }
    }
  }
}

// A batch of `count` positions or fewer that every thread has put its part of into shared memory.
template <typename T, int D, int PITCH, typename P, typename F>
FUNC void attend_batch(ClusterAttended& a, P keys, P values, P queries, P high, P low, F stats,
                       float scale, uint count, uint warp, uint lane) {
  uint tiles = tiles_of(count), tile = 16u * warp;
  group_barrier();
  if (warp < tiles) {
    score_tile<T, D, PITCH>(keys + tile * PITCH, queries, high + tile, low + tile, stats + tile,
                            scale, count - tile, lane);
  }
  group_barrier();
  add_values<T, D, PITCH>(a, values, high, low, stats, tiles, warp, lane);
}

// Where dimension d of a head's part stands: what a lane sends at once, g and g + 8 of 16, beside
// each other.
FUNC uint part_place(uint d) {
  return (d / 16u * 8u + d % 8u) * 2u + d / 8u % 2u;
}

// Each head's part to the block of that rank: gathered [kCluster][D], stats [kCluster][2].
template <int D>
FUNC constexpr uint bytes_of_parts() {
  return kCluster * (D + 2) * 4;
}
template <int D, typename F, typename C>
FUNC void send_parts(const ClusterAttended& a, F gathered, F stats, C arrivals, uint rank,
                     uint heads, uint warp, uint lane) {
  UNROLL for (int i = 0; i < 2; ++i) {
    uint head = lane % 4u * 2u + uint(i);
    if (head >= heads) continue;
    Floats<2> part = {{a.out.v[i], a.out.v[2 + i]}}, known = {{a.top[i], a.sum[i]}};
    if (warp < uint(D / 16)) {
      send_part(gathered + (rank * D + part_place(warp * 16u + lane / 4u)), arrivals, head, part);
    }
    if (warp == 0u && lane < 4u) send_part(stats + 2u * rank, arrivals, head, known);
  }
}

// A head's parts to its values, divided by their sum, and to (largest score, sum) of the stretch.
template <int D, typename F, typename P>
FUNC void merge_parts(F gathered, F stats, P partial, P partial_stats, uint thread) {
  float shares[kCluster], highest = -as_float(0x7f800000u), sum = 0.0f;
  UNROLL for (int b = 0; b < kCluster; ++b) {
    shares[b] = stats[2 * b];
    highest = shares[b] > highest ? shares[b] : highest;
  }
  UNROLL for (int b = 0; b < kCluster; ++b) {
    shares[b] = exp2_fast(shares[b] - highest);
    sum = fma_rn(shares[b], stats[2 * b + 1], sum);
  }
  float inverse = div_fast(1.0f, sum);
  if (thread < uint(D)) {
    float value = 0.0f;
    UNROLL for (int b = 0; b < kCluster; ++b) {
      value = fma_rn(shares[b], gathered[uint(b) * D + part_place(thread)], value);
    }
    partial[thread] = value * inverse;
  }
  if (thread == 0u) {
    partial_stats[0] = highest;
    partial_stats[1] = sum;
  }
}
