// Attention of eight query heads to one stretch of a cache by a cluster of 16 blocks, on the tensor
// cores. A block has a sixteenth of the positions, in eight streams of every eighth tile of 16. A
// warp takes a tile from the caches straight to the registers that the products read, and asks for
// the next one's keys and values as soon as this one's are used: what is on its way needs no shared
// memory. The streams' sums meet in pairs, four apart, then all, then the blocks': the same bits
// whether one warp has a pair or two have it.
#pragma once

constexpr int kStreams = 8, kPairs = kStreams / 2, kStep = 16 * kStreams;

// A tile as lane 4 g + t has it. Products take dimensions and positions in any order, if both
// factors have the same: of the keys of positions g and g + 8 dimensions 8 t on of every 32, of the
// values of positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 dimensions 8 g on of every 64.
template <int D>
struct GroupedTile {
  static constexpr int CHUNKS = D / 32, HALVES = (D + 63) / 64;
  Words<4> keys[CHUNKS][2], values[HALVES][4];
};

// Keys of the positions [from, end), zeros behind them; the pointer is the lane's own, to `from`'s.
template <int D, typename P>
FUNC void fetch_keys(GroupedTile<D>& tile, P keys, uint from, uint end, uint lane) {
  UNROLL for (int r = 0; r < 2; ++r) {
    bool in = from + lane / 4u + 8u * uint(r) < end;
    UNROLL for (int c = 0; c < (GroupedTile<D>::CHUNKS); ++c) {
      tile.keys[c][r] = in ? load_stream(keys + (8 * D * r + 32 * c), 0) : no_words();
    }
  }
}
// Of the lane's positions the one that stands in slot i.
FUNC constexpr int slot_place(int i) {
  return i % 2 + i / 2 * 8;
}
template <int D, typename P>
FUNC void fetch_values(GroupedTile<D>& tile, P values, uint from, uint end, uint lane) {
  UNROLL for (int i = 0; i < 4; ++i) {
    bool in = from + lane % 4u * 2u + uint(slot_place(i)) < end;
    UNROLL for (int h = 0; h < (GroupedTile<D>::HALVES); ++h) {
      bool has = in && (D % 64 == 0 || lane / 4u * 8u + 64u * uint(h) < uint(D));
      tile.values[h][i] = has ? load_stream(values + (D * slot_place(i) + 64 * h), 0) : no_words();
    }
  }
}

// A position's keys and values, [2][D], to place `at` of a tile.
template <int D, typename S>
FUNC void set_position(GroupedTile<D>& tile, S position, uint at, uint lane) {
  UNROLL for (int r = 0; r < 2; ++r) {
    UNROLL for (int c = 0; c < (GroupedTile<D>::CHUNKS); ++c) {
      if (at != lane / 4u + 8u * uint(r)) continue;
      tile.keys[c][r] = load_shared(position, lane % 4u * 8u + 32 * c);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    UNROLL for (int h = 0; h < (GroupedTile<D>::HALVES); ++h) {
      uint d = lane / 4u * 8u + 64u * uint(h);
      if (at != lane % 4u * 2u + uint(slot_place(i)) || d >= uint(D)) continue;
      tile.values[h][i] = load_shared(position, D + d);
    }
  }
}

// What a warp knows of a stream: of heads 2 t and 2 t + 1 of lane 4 g + t the largest score, the
// sum of the lane's own positions, and of the values' sums dimensions 64 h + 8 g + 2 i and the next
// in out[4 h + i], of both heads beside each other.
template <int D>
struct GroupedAttended {
  static constexpr int OUT = 4 * GroupedTile<D>::HALVES;
  float top[2], sum[2];
  Floats<4> out[OUT];
};
template <int D>
FUNC GroupedAttended<D> no_grouped_seen() {
  GroupedAttended<D> a;
  UNROLL for (int i = 0; i < 2; ++i) {
    a.top[i] = -as_float(0x7f800000u);
    a.sum[i] = 0.0f;
  }
  UNROLL for (int j = 0; j < (GroupedAttended<D>::OUT); ++j) a.out[j] = zeros<4>();
  return a;
}

// Of positions g and g + 8 the products with heads 2 t and 2 t + 1; queries: [8][PITCH].
template <typename T, int D, int PITCH, typename S>
FUNC Floats<4> scores_of(const GroupedTile<D>& tile, S queries, uint lane) {
  Floats<4> chains[2] = {zeros<4>(), zeros<4>()};
  UNROLL for (int c = 0; c < (GroupedTile<D>::CHUNKS); ++c) {
    Words<4> q = load_shared(queries, lane / 4u * PITCH + lane % 4u * 8u + 32 * c);
    UNROLL for (int h = 0; h < 2; ++h) {
      chains[h] = multiply_halves<T>(chains[h], tile.keys[c][0].w[2 * h], tile.keys[c][1].w[2 * h],
                                     tile.keys[c][0].w[2 * h + 1], tile.keys[c][1].w[2 * h + 1],
                                     q.w[2 * h], q.w[2 * h + 1]);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) chains[0].v[i] += chains[1].v[i];
  return chains[0];
}

// Those of `valid` positions, times scale, which carries log2 e, as probabilities against the
// largest so far, each as two halves so that rounding it costs nothing: the second factor of
// add_values. What is known already is brought to the same.
template <typename T, int D>
FUNC Words<4> probabilities_of(GroupedAttended<D>& a, const Floats<4>& scores, float scale,
                               uint valid, uint lane) {
  float p[4];
  UNROLL for (int i = 0; i < 2; ++i) {
    float s[2];
    UNROLL for (int r = 0; r < 2; ++r) {
      bool in = lane / 4u + 8u * uint(r) < valid;
      s[r] = in ? scores.v[2 * r + i] * scale : -as_float(0x7f800000u);
    }
    float top = largest_across<4, 32>(s[0] > s[1] ? s[0] : s[1]);
    top = top > a.top[i] ? top : a.top[i];
    float keep = exp2_fast(a.top[i] - top);
    a.top[i] = top;
    UNROLL for (int r = 0; r < 2; ++r) p[2 * r + i] = exp2_fast(s[r] - top);
    a.sum[i] = fma_rn(a.sum[i], keep, p[i] + p[2 + i]);
    UNROLL for (int j = 0; j < (GroupedAttended<D>::OUT); ++j) {
      a.out[j].v[i] *= keep;
      a.out[j].v[2 + i] *= keep;
    }
  }
  Words<4> w;
  UNROLL for (int r = 0; r < 2; ++r) {
    float one = p[2 * r], other = p[2 * r + 1];
    w.w[r] = transposed(two_halves<T>(one, other));
    w.w[2 + r] = transposed(two_halves<T>(one - rounded<T>(one), other - rounded<T>(other)));
  }
  return w;
}

template <typename T, int D>
FUNC void add_values(GroupedAttended<D>& a, const GroupedTile<D>& tile, const Words<4>& p) {
  constexpr uint LOW = 0x5410u, HIGH = 0x7632u;  // halves of two words
  UNROLL for (int j = 0; j < (GroupedAttended<D>::OUT); ++j) {
    const Words<4>* v = tile.values[j / 4];
    uint w[4];
    UNROLL for (int i = 0; i < 4; ++i) {
      w[i] = byte_permute(v[i / 2 * 2].w[j % 4], v[i / 2 * 2 + 1].w[j % 4], i % 2 ? HIGH : LOW);
    }
    a.out[j] = multiply_halves<T>(a.out[j], w[0], w[1], w[2], w[3], p.w[0], p.w[1]);
    a.out[j] = multiply_halves<T>(a.out[j], w[0], w[1], w[2], w[3], p.w[2], p.w[3]);
  }
}

// The largest of two scores, and what sums against each count for beside it.
struct Joint {
  float top, first, second;
};
FUNC Joint joint(float first, float second) {
  float none = -as_float(0x7f800000u), top = first > second ? first : second;
  float beside = top > none ? top : 0.0f;  // without a position nothing counts
  return {top, exp2_fast(first - beside), exp2_fast(second - beside)};
}
FUNC float joined(const Joint& j, float first, float second) {
  return fma_rn(j.second, second, first * j.first);
}

// Largest score and sum of heads 2 t and 2 t + 1.
struct Known {
  float top[2], sum[2];
};
FUNC Known nothing_known() {
  float none = -as_float(0x7f800000u);
  return {{none, none}, {0.0f, 0.0f}};
}

// A stream's sums to place `at` of sums [][8][D + 4] and stats [][8][2]; if it is the second of a
// pair, joined with the first's, of which the same warp put there what is `before`.
template <int D, typename F>
FUNC Known put_sums(const GroupedAttended<D>& a, const Known& before, bool second, F sums, F stats,
                    uint at, uint lane) {
  Known known;
  UNROLL for (int i = 0; i < 2; ++i) {
    uint head = at * 8u + lane % 4u * 2u + uint(i);
    Joint of = joint(before.top[i], a.top[i]);
    known.top[i] = of.top;
    known.sum[i] = joined(of, before.sum[i], sum_across<4, 32>(a.sum[i]));
    if (lane < 4u) {
      stats[2u * head] = known.top[i];
      stats[2u * head + 1u] = known.sum[i];
    }
    UNROLL for (int j = 0; j < (GroupedAttended<D>::OUT); j += 2) {
      uint d = lane / 4u * 8u + uint(j / 4 * 64 + j % 4 * 2);
      if (D % 64 != 0 && d >= uint(D)) continue;
      Floats<4> v = {{a.out[j].v[i], a.out[j].v[2 + i], a.out[j + 1].v[i], a.out[j + 1].v[2 + i]}};
      if (second) {
        Words<4> first = load_shared(sums, head * (D + 4) + d);
        UNROLL for (int e = 0; e < 4; ++e) v.v[e] = joined(of, as_float(first.w[e]), v.v[e]);
      }
      store_four(sums + (head * (D + 4) + d), v);
    }
  }
  return known;
}

// Each head's part to the block of that rank: gathered [kCluster][D], stats [kCluster][2].
template <int D>
FUNC constexpr uint bytes_of_parts() {
  return kCluster * (D + 2) * 4;
}
// A head's sums of all streams or of all pairs, which are what WARPS warps have put, four
// dimensions a lane, to the block that merges it.
template <int D, int WARPS, typename F, typename C>
FUNC void send_head(F sums, F warp_stats, F gathered, F stats, C arrivals, uint rank, uint head,
                    uint lane) {
  Joint pairs[kPairs];
  float shares[kPairs], none = -as_float(0x7f800000u), top = none, sum = 0.0f;
  UNROLL for (int p = 0; p < kPairs; ++p) {
    pairs[p].top = warp_stats[2u * (8u * uint(p) + head)];
    shares[p] = warp_stats[2u * (8u * uint(p) + head) + 1u];
    if (WARPS == kStreams) {
      F other = warp_stats + (2u * (8u * uint(p + kPairs) + head));
      pairs[p] = joint(pairs[p].top, other[0]);
      shares[p] = joined(pairs[p], shares[p], other[1]);
    }
    top = pairs[p].top > top ? pairs[p].top : top;
  }
  float beside = top > none ? top : 0.0f;
  UNROLL for (int p = 0; p < kPairs; ++p) {
    float share = exp2_fast(pairs[p].top - beside);
    sum = fma_rn(share, shares[p], sum);
    shares[p] = share;
  }
  if (lane < uint(D / 4)) {
    Floats<4> part = zeros<4>();
    UNROLL for (int p = 0; p < kPairs; ++p) {
      uint at = (8u * uint(p) + head) * (D + 4) + 4u * lane;
      Words<4> first = load_shared(sums, at), second = no_words();
      if (WARPS == kStreams) second = load_shared(sums, at + kPairs * 8 * (D + 4));
      UNROLL for (int i = 0; i < 4; ++i) {
        float v = as_float(first.w[i]);
        if (WARPS == kStreams) v = joined(pairs[p], v, as_float(second.w[i]));
        part.v[i] = fma_rn(shares[p], v, part.v[i]);
      }
    }
    send_part(gathered + (rank * D + 4u * lane), arrivals, head, part);
  }
  Floats<2> known = {{top, sum}};
  if (lane == 0u) send_part(stats + 2u * rank, arrivals, head, known);
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
      value = fma_rn(shares[b], gathered[uint(b) * D + thread], value);
    }
    partial[thread] = value * inverse;
  }
  if (thread == 0u) {
    partial_stats[0] = highest;
    partial_stats[1] = sum;
  }
}
