// The routers of moe_router.h on fp32 scores, for a warp that finds the maximum of 32 lanes in one
// instruction: the same choice in the same order, and the same weights, bit for bit.
#pragma once

// A row's logits, or a router's biases, spread over the lanes: element i in lane i % 32.
template <int E, typename L>
FUNC Spread<E> load_spread(L values, uint lane) {
  Spread<E> spread;
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    uint i = lane + 32u * uint(p);
    spread.v[p] = i < uint(E) ? values[i] : 0.0f;
  }
  return spread;
}

// The K best keys, best first, with their values; of equal ones the highest index or the lowest.
// `ranks`: 0 where nothing is.
template <int E, int K, int PLACES>
FUNC void choose_exactly(Choice<K>& chosen, uint (&ranks)[PLACES], const uint (&keys)[PLACES]) {
  ROLLED for (uint c = 0; c < uint(K); ++c) {
    uint best = 0u, rank = 0u;
    UNROLL for (int p = 0; p < PLACES; ++p) best = ranks[p] > 0u && keys[p] > best ? keys[p] : best;
    best = lane_max(best);
    UNROLL for (int p = 0; p < PLACES; ++p) {
      rank = keys[p] == best && ranks[p] > rank ? ranks[p] : rank;
    }
    rank = lane_max(rank);
    UNROLL for (int p = 0; p < PLACES; ++p) ranks[p] = ranks[p] == rank ? 0u : ranks[p];
    UNROLL for (int i = 0; i < K; ++i) chosen.index[i] = uint(i) == c ? rank : chosen.index[i];
  }
}

// The same, as a rule with one maximum a place instead of two: a key's low bits make room for its
// rank. Where that makes two of the best K + 1 equal, the whole keys decide.
template <int E, int K, bool HIGHEST>
FUNC Choice<K> choose_by_keys(const Spread<E>& values, const uint (&keys)[(E + 31) / 32],
                              uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  constexpr uint LOW = E < 128 ? 127u : E < 256 ? 255u : 2047u;
  uint ranks[PLACES], packed[PLACES], found[K + 1];
  UNROLL for (int p = 0; p < PLACES; ++p) {
    uint i = lane + 32u * uint(p);
    ranks[p] = i < uint(E) ? (HIGHEST ? i + 1u : uint(E) - i) : 0u;
    packed[p] = i < uint(E) ? (keys[p] & ~LOW) | ranks[p] : 0u;
  }
  UNROLL for (int c = 0; c <= K; ++c) {
    uint best = packed[0];
    UNROLL for (int p = 1; p < PLACES; ++p) best = packed[p] > best ? packed[p] : best;
    found[c] = lane_max(best);
    UNROLL for (int p = 0; p < PLACES; ++p) packed[p] = packed[p] == found[c] ? 0u : packed[p];
  }
  Choice<K> chosen;
  bool close = false;
  UNROLL for (int c = 0; c < K; ++c) {
    chosen.index[c] = found[c] & LOW;
    close = close || (found[c] ^ found[c + 1]) <= LOW;
  }
  if (close) choose_exactly<E, K, PLACES>(chosen, ranks, keys);
  UNROLL for (int c = 0; c < K; ++c) {
    uint winner = HIGHEST ? chosen.index[c] - 1u : uint(E) - chosen.index[c];
    float value = 0.0f;
    UNROLL for (int p = 0; p < PLACES; ++p) {
      value = lane + 32u * uint(p) == winner ? values.v[p] : value;
    }
    chosen.index[c] = winner;
    chosen.value[c] = shuffle(value, winner % 32u);
  }
  return chosen;
}

// softmax in fp32, then the K best in ascending order; NORM divides by their sum.
template <int E, int K, bool NORM>
FUNC Choice<K> select_softmax(const Spread<E>& logits, uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  Spread<E> scores;
  float top = -as_float(0x7f800000u), sum = 0.0f;
  UNROLL for (int p = 0; p < PLACES; ++p) {
    bool inside = lane + 32u * uint(p) < uint(E);
    scores.v[p] = inside ? logits.v[p] : -as_float(0x7f800000u);
    top = scores.v[p] > top ? scores.v[p] : top;
  }
  top = lane_max(top);
  UNROLL for (int p = 0; p < PLACES; ++p) {
    scores.v[p] = exp_fp32(add_rn(scores.v[p], -top));
    sum = add_rn(sum, lane + 32u * uint(p) < uint(E) ? scores.v[p] : 0.0f);
  }
  float normalizer = div_rn(1.0f, lane_sum(sum));
  uint keys[PLACES];  // not negative: their bits are in order, NaN on top
  UNROLL for (int p = 0; p < PLACES; ++p) {
    scores.v[p] = mul_rn(scores.v[p], normalizer);
    keys[p] = as_uint(scores.v[p]) & 0x7fffffffu;
  }
  Choice<K> best = choose_by_keys<E, K, true>(scores, keys, lane), ascending;
  sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) {
    ascending.index[c] = best.index[K - 1 - c];
    ascending.value[c] = best.value[K - 1 - c];
    sum = add_rn(sum, ascending.value[c]);
  }
  if (NORM) {
    UNROLL for (int c = 0; c < K; ++c) ascending.value[c] = div_rn(ascending.value[c], sum);
  }
  return ascending;
}

// Chosen by the biased score, of equal ones the lowest index; weighted by the plain one.
template <int E, int K, bool NORM>
FUNC Choice<K> select_sigmoid(const Spread<E>& logits, const Spread<E>& bias, float scaling,
                              uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  Spread<E> plain;
  uint keys[PLACES];
  UNROLL for (int p = 0; p < PLACES; ++p) {
    uint i = lane + 32u * uint(p);
    plain.v[p] = i < uint(E) ? sigmoid<float>(logits.v[p]) : 0.0f;
    keys[p] = i < uint(E) ? order_key<false>(add_rn(plain.v[p], bias.v[p])) : 0u;
  }
  Choice<K> chosen = choose_by_keys<E, K, false>(plain, keys, lane);
  float sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) sum = add_rn(sum, chosen.value[c]);
  sum = add_rn(sum, 1e-20f);
  UNROLL for (int c = 0; c < K; ++c) {
    float w = NORM && K > 1 ? div_rn(chosen.value[c], sum) : chosen.value[c];
    chosen.value[c] = mul_rn(w, scaling);
  }
  return chosen;
}

template <int E, int K, bool NORM, bool SOFTMAX>
FUNC Choice<K> select_experts(const Spread<E>& logits, const Spread<E>& bias, float scaling,
                              uint lane) {
  if (SOFTMAX) return select_softmax<E, K, NORM>(logits, lane);
  return select_sigmoid<E, K, NORM>(logits, bias, scaling, lane);
}

// Element i of K that every lane holds.
template <int K>
FUNC uint pick_index(const Choice<K>& chosen, uint i) {
  uint v = chosen.index[0];
  UNROLL for (int c = 1; c < K; ++c) v = i == uint(c) ? chosen.index[c] : v;
  return v;
}
