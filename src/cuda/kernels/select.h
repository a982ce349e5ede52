// The routers of moe_router.h on fp32 scores, for a warp that finds the maximum of 32 lanes in one
// instruction: the same choice in the same order, and the same weights, bit for bit. Choosing and
// weighing are apart, because an expert's matrices wait for the choice alone.
#pragma once

// A row's experts in the order in which their outputs are added up.
template <int K>
struct Experts {
  uint index[K];
};

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

// The values, asked for no later than here.
template <int E>
FUNC Spread<E> kept_here(Spread<E> values, uint lane) {
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) values.v[p] = shuffle(values.v[p], lane);
  return values;
}

// Element i, the same for all lanes, of values that are spread over them.
template <int E>
FUNC float element_of(const Spread<E>& values, uint i) {
  float value = values.v[0];
  UNROLL for (int p = 1; p < (E + 31) / 32; ++p) value = i / 32u == uint(p) ? values.v[p] : value;
  return shuffle(value, i % 32u);
}

template <int E, int K>
FUNC Floats<K> elements_of(const Spread<E>& values, const Experts<K>& chosen) {
  Floats<K> elements;
  UNROLL for (int c = 0; c < K; ++c) elements.v[c] = element_of<E>(values, chosen.index[c]);
  return elements;
}
template <int K>
FUNC float sum_of(const Floats<K>& values) {
  float sum = values.v[0];
  UNROLL for (int c = 1; c < K; ++c) sum = add_rn(sum, values.v[c]);
  return sum;
}

// Element i of K that every lane holds.
template <int K>
FUNC uint pick_index(const Experts<K>& chosen, uint i) {
  uint v = chosen.index[0];
  UNROLL for (int c = 1; c < K; ++c) v = i == uint(c) ? chosen.index[c] : v;
  return v;
}

// Of equal keys the highest index or the lowest has the higher rank; ranks begin at 1.
template <int E, bool HIGHEST>
FUNC uint rank_of(uint i) {
  return i < uint(E) ? (HIGHEST ? i + 1u : uint(E) - i) : 0u;
}
template <int E, bool HIGHEST>
FUNC uint of_rank(uint rank) {
  return HIGHEST ? rank - 1u : uint(E) - rank;
}

// The K best keys, best first: two maxima a place, of the keys and of the ranks among equal ones.
template <int E, int K, bool HIGHEST>
FUNC Experts<K> choose_exactly(const uint (&keys)[(E + 31) / 32], uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  Experts<K> chosen = {};
  uint ranks[PLACES];
  UNROLL for (int p = 0; p < PLACES; ++p) ranks[p] = rank_of<E, HIGHEST>(lane + 32u * uint(p));
  ROLLED for (uint c = 0; c < uint(K); ++c) {
    uint best = 0u, rank = 0u;
    UNROLL for (int p = 0; p < PLACES; ++p) best = ranks[p] > 0u && keys[p] > best ? keys[p] : best;
    best = lane_max(best);
    UNROLL for (int p = 0; p < PLACES; ++p) {
      rank = keys[p] == best && ranks[p] > rank ? ranks[p] : rank;
    }
    rank = lane_max(rank);
    UNROLL for (int p = 0; p < PLACES; ++p) ranks[p] = ranks[p] == rank ? 0u : ranks[p];
    UNROLL for (int i = 0; i < K; ++i) {
      chosen.index[i] = uint(i) == c ? of_rank<E, HIGHEST>(rank) : chosen.index[i];
    }
  }
  return chosen;
}

// Keys with their ranks in the low bits: one maximum a place finds the best of them.
template <int E>
struct Packed {
  static constexpr uint LOW = E < 128 ? 127u : E < 256 ? 255u : 2047u;
  uint v[(E + 31) / 32];
};

template <int E, bool HIGHEST>
FUNC Packed<E> pack(const uint (&keys)[(E + 31) / 32], uint lane) {
  Packed<E> packed;
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    uint rank = rank_of<E, HIGHEST>(lane + 32u * uint(p));
    packed.v[p] = rank > 0u ? (keys[p] & ~Packed<E>::LOW) | rank : 0u;
  }
  return packed;
}

// The best one, which leaves.
template <int E>
FUNC uint take_best(Packed<E>& packed) {
  uint best = packed.v[0];
  UNROLL for (int p = 1; p < (E + 31) / 32; ++p) best = packed.v[p] > best ? packed.v[p] : best;
  best = lane_max(best);
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    packed.v[p] = packed.v[p] == best ? 0u : packed.v[p];
  }
  return best;
}

template <int E>
FUNC Spread<E> softmax_of(const Spread<E>& logits, uint lane) {
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
  UNROLL for (int p = 0; p < PLACES; ++p) scores.v[p] = mul_rn(scores.v[p], normalizer);
  return scores;
}

// Whether two logits, as their packed keys tell them, are so far apart that their scores have the
// same order. A key has lost at most (LOW + 1) 2^-23 of its logit. A score is good to 2^-16 of
// itself where its logit is no more than 64 below the best, so 2^-14 between two logits is enough.
// False for NaN and for infinities.
template <uint LOW>
FUNC bool far_apart(float above, float below) {
  float size = below < 0.0f ? -below : below;
  float lost = fma_rn(size, float(LOW + 1u) * 0x1.1p-23f, 0x1p-14f);
  return add_rn(above, -below) > lost;
}
FUNC float of_order_key(uint key) {
  return as_float(key >= 0x80000000u ? key ^ 0x80000000u : ~key);
}

// What a softmax router's choice goes by: its logits, before the norm's scale is known.
template <int E>
FUNC Packed<E> pack_logits(const Spread<E>& logits, uint lane) {
  uint keys[(E + 31) / 32];
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) keys[p] = order_key<true>(logits.v[p]);
  return pack<E, true>(keys, lane);
}
// Whether the scores of packed logits have the order of the logits: `top` is the best of all.
template <int E>
FUNC bool logits_decide(uint top, uint above, uint below, float norm) {
  constexpr uint LOW = Packed<E>::LOW;
  float a = mul_rn(of_order_key(above & ~LOW), norm), b = mul_rn(of_order_key(below & ~LOW), norm);
  bool near_top = add_rn(mul_rn(of_order_key(top & ~LOW), norm), -b) < 64.0f;
  return far_apart<LOW>(a, b) & near_top;
}

// The K highest scores in ascending order, of equal ones the higher index the later.
template <int E, int K>
FUNC Experts<K> choose_scores(const Spread<E>& logits, uint lane) {
  uint keys[(E + 31) / 32];
  Spread<E> scores = softmax_of<E>(logits, lane);  // not negative: their bits are in order
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) keys[p] = as_uint(scores.v[p]) & 0x7fffffffu;
  Experts<K> best = choose_exactly<E, K, true>(keys, lane), ascending;
  UNROLL for (int c = 0; c < K; ++c) ascending.index[c] = best.index[K - 1 - c];
  return ascending;
}

// The chosen ones' scores; NORM divides by their sum.
template <int E, int K, bool NORM>
FUNC Floats<K> weigh_softmax(const Spread<E>& logits, const Experts<K>& chosen, uint lane) {
  Floats<K> weights = elements_of<E, K>(softmax_of<E>(logits, lane), chosen);
  float sum = sum_of<K>(weights);
  if (NORM) {
    UNROLL for (int c = 0; c < K; ++c) weights.v[c] = div_rn(weights.v[c], sum);
  }
  return weights;
}

template <int E>
FUNC Spread<E> sigmoid_of(const Spread<E>& logits, uint lane) {
  Spread<E> scores;
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    bool inside = lane + 32u * uint(p) < uint(E);
    scores.v[p] = inside ? sigmoid<float>(logits.v[p]) : 0.0f;
  }
  return scores;
}

// Biased scores, best first, of equal ones the lowest index.
template <int E>
FUNC void key_scores(uint (&keys)[(E + 31) / 32], const Spread<E>& logits, const Spread<E>& bias,
                     uint lane) {
  Spread<E> scores = sigmoid_of<E>(logits, lane);
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    keys[p] = order_key<false>(add_rn(scores.v[p], bias.v[p]));
  }
}

// Weighted by the score without its bias.
template <int E, int K, bool NORM>
FUNC Floats<K> weigh_sigmoid(const Spread<E>& logits, const Experts<K>& chosen, float scaling,
                             uint lane) {
  Floats<K> weights = elements_of<E, K>(sigmoid_of<E>(logits, lane), chosen);
  float sum = add_rn(sum_of<K>(weights), 1e-20f);
  UNROLL for (int c = 0; c < K; ++c) {
    float w = NORM && K > 1 ? div_rn(weights.v[c], sum) : weights.v[c];
    weights.v[c] = mul_rn(w, scaling);
  }
  return weights;
}

// What decides a router's choice. logits lack their norm's scale: a softmax's do without it.
template <int E, bool SOFTMAX>
FUNC Packed<E> pack_experts(const Spread<E>& logits, float norm, const Spread<E>& bias, uint lane) {
  if (SOFTMAX) return pack_logits<E>(logits, lane);
  uint keys[(E + 31) / 32];
  key_scores<E>(keys, scaled<E>(logits, norm), bias, lane);
  return pack<E, false>(keys, lane);
}
// Whether the order of two that follow each other among the best is the exact one.
template <int E, bool SOFTMAX>
FUNC bool order_is_sure(uint top, uint above, uint below, float norm) {
  if (SOFTMAX) return logits_decide<E>(top, above, below, norm);
  return (above ^ below) > Packed<E>::LOW;
}
template <int E, int K, bool SOFTMAX>
FUNC Experts<K> choose_surely(const Spread<E>& logits, float norm, const Spread<E>& bias,
                              uint lane) {
  if (SOFTMAX) return choose_scores<E, K>(scaled<E>(logits, norm), lane);
  uint keys[(E + 31) / 32];
  key_scores<E>(keys, scaled<E>(logits, norm), bias, lane);
  return choose_exactly<E, K, false>(keys, lane);
}
template <int E, int K, bool SOFTMAX>
FUNC Experts<K> choose_experts(const Spread<E>& logits, float norm, const Spread<E>& bias,
                               uint lane) {
  Packed<E> packed = pack_experts<E, SOFTMAX>(logits, norm, bias, lane);
  uint best[K + 1];
  UNROLL for (int c = 0; c <= K; ++c) best[c] = take_best<E>(packed);
  bool sure = true;
  UNROLL for (int c = 0; c < K; ++c) {
    sure = sure & order_is_sure<E, SOFTMAX>(best[0], best[c], best[c + 1], norm);
  }
  if (!sure) return choose_surely<E, K, SOFTMAX>(logits, norm, bias, lane);
  Experts<K> chosen;
  UNROLL for (int c = 0; c < K; ++c) {
    uint rank = best[SOFTMAX ? K - 1 - c : c] & Packed<E>::LOW;
    chosen.index[c] = of_rank<E, SOFTMAX>(rank);
  }
  return chosen;
}
template <int E, int K, bool NORM, bool SOFTMAX>
FUNC Floats<K> weigh_experts(const Spread<E>& logits, float norm, const Experts<K>& chosen,
                             float scaling, uint lane) {
  Spread<E> whole = scaled<E>(logits, norm);
  if (SOFTMAX) return weigh_softmax<E, K, NORM>(whole, chosen, lane);
  return weigh_sigmoid<E, K, NORM>(whole, chosen, scaling, lane);
}
