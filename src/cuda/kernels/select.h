// The routers of moe_router.h for a warp that finds the maximum of 32 lanes in one instruction: the
// same choice in the same order, and the same weights, bit for bit.
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

// Scores of T are not negative and their low 13 bits as fp32 are zero: the place goes there, so
// that one maximum gives the score and, of equal ones, the highest index.
template <typename T, int E, int K, bool NORM>
FUNC Choice<K> select_softmax(const Spread<E>& logits, uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  float e[PLACES], top = -as_float(0x7f800000u), sum = 0.0f;
  UNROLL for (int p = 0; p < PLACES; ++p) {
    uint i = lane + 32u * uint(p);
    e[p] = i < uint(E) ? logits.v[p] : -as_float(0x7f800000u);
    top = e[p] > top ? e[p] : top;
  }
  top = lane_max(top);
  UNROLL for (int p = 0; p < PLACES; ++p) {
    e[p] = exp_fp32(add_rn(e[p], -top));
    sum = add_rn(sum, lane + 32u * uint(p) < uint(E) ? e[p] : 0.0f);
  }
  float normalizer = div_rn(1.0f, lane_sum(sum));
  uint keys[PLACES];
  UNROLL for (int p = 0; p < PLACES; ++p) {
    uint i = lane + 32u * uint(p);
    uint score = as_uint(rounded<T>(mul_rn(e[p], normalizer))) & 0x7fffe000u;
    keys[p] = i < uint(E) ? score | (i + 1u) : 0u;
  }
  Choice<K> ascending;
  UNROLL for (int c = K - 1; c >= 0; --c) {
    uint best = keys[0];
    UNROLL for (int p = 1; p < PLACES; ++p) best = keys[p] > best ? keys[p] : best;
    best = lane_max(best);
    UNROLL for (int p = 0; p < PLACES; ++p) keys[p] = keys[p] == best ? 0u : keys[p];
    ascending.index[c] = (best & 0x1fffu) - 1u;
    ascending.value[c] = as_float(best & 0x7fffe000u);
  }
  if (!NORM) return ascending;
  sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) sum = rounded<T>(add_rn(sum, ascending.value[c]));
  UNROLL for (int c = 0; c < K; ++c) {
    ascending.value[c] = rounded<T>(div_rn(ascending.value[c], sum));
  }
  return ascending;
}

// Chosen by the biased score, of equal ones the lowest index; weighted by the plain one.
template <int E, int K, bool NORM>
FUNC Choice<K> select_sigmoid(const Spread<E>& logits, const Spread<E>& bias, float scaling,
                              uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  float plain[PLACES];
  uint keys[PLACES], ranks[PLACES];
  UNROLL for (int p = 0; p < PLACES; ++p) {
    uint i = lane + 32u * uint(p);
    plain[p] = i < uint(E) ? sigmoid<float>(logits.v[p]) : 0.0f;
    keys[p] = i < uint(E) ? order_key<false>(add_rn(plain[p], bias.v[p])) : 0u;
    ranks[p] = i < uint(E) ? uint(E) - i : 0u;
  }
  Choice<K> chosen;
  float sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) {
    uint best = 0u, rank = 0u;
    UNROLL for (int p = 0; p < PLACES; ++p) best = ranks[p] > 0u && keys[p] > best ? keys[p] : best;
    best = lane_max(best);
    UNROLL for (int p = 0; p < PLACES; ++p) {
      rank = keys[p] == best && ranks[p] > rank ? ranks[p] : rank;
    }
    rank = lane_max(rank);
    uint winner = uint(E) - rank;
    float value = 0.0f;
    UNROLL for (int p = 0; p < PLACES; ++p) {
      value = winner / 32u == uint(p) ? plain[p] : value;
      ranks[p] = ranks[p] == rank ? 0u : ranks[p];
    }
    chosen.index[c] = winner;
    chosen.value[c] = shuffle(value, winner % 32u);
    sum = add_rn(sum, chosen.value[c]);
  }
  sum = add_rn(sum, 1e-20f);
  UNROLL for (int c = 0; c < K; ++c) {
    float w = NORM && K > 1 ? div_rn(chosen.value[c], sum) : chosen.value[c];
    chosen.value[c] = mul_rn(w, scaling);
  }
  return chosen;
}

template <typename T, int E, int K, bool NORM, bool SOFTMAX>
FUNC Choice<K> select_experts(const Spread<E>& logits, const Spread<E>& bias, float scaling,
                              uint lane) {
  if (SOFTMAX) return select_softmax<T, E, K, NORM>(logits, lane);
  return select_sigmoid<E, K, NORM>(logits, bias, scaling, lane);
}

// Element i of K that every lane holds.
template <int K>
FUNC uint pick_index(const Choice<K>& chosen, uint i) {
  uint v = chosen.index[0];
  UNROLL for (int c = 1; c < K; ++c) v = i == uint(c) ? chosen.index[c] : v;
  return v;
}
