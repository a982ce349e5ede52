// The routers of moe_router.h on fp32 scores, for a warp that finds the maximum of 32 lanes in one
// instruction: the same choice in the same order, and the same weights, bit for bit. Choosing and
// weighing are apart, because an expert's matrices wait for the choice alone. Lane c holds the c-th
// of a row's K experts, in the order in which their outputs are added up, and its weight; the lanes
// behind them hold nothing of use.
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

// The values, asked for no later than here.
template <int E>
FUNC Spread<E> kept_here(Spread<E> values, uint lane) {
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) values.v[p] = shuffle(values.v[p], lane);
  return values;
}

// The element at each lane's own index.
template <int E>
FUNC float element_at(const Spread<E>& values, uint index) {
  float value = shuffle(values.v[0], index % 32u);
  UNROLL for (int p = 1; p < (E + 31) / 32; ++p) {
    float other = shuffle(values.v[p], index % 32u);
    value = index / 32u == uint(p) ? other : value;
  }
  return value;
}

// What the first K lanes hold.
template <int K>
FUNC Floats<K> from_lanes(float own) {
  Floats<K> all;
  UNROLL for (int c = 0; c < K; ++c) all.v[c] = shuffle(own, uint(c));
  return all;
}
// Its sum, in their order.
template <int K>
FUNC float sum_of_lanes(float own) {
  Floats<K> all = from_lanes<K>(own);
  float sum = all.v[0];
  UNROLL for (int c = 1; c < K; ++c) sum = add_rn(sum, all.v[c]);
  return sum;
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

// The lane of the c-th best: the highest are added up last, the lowest first.
template <int K, bool HIGHEST>
FUNC uint lane_of(uint c) {
  return HIGHEST ? uint(K - 1) - c : c;
}

// The K best keys' experts: two maxima a place, of the keys and of the ranks among equal ones.
template <int E, int K, bool HIGHEST>
FUNC uint choose_exactly(const uint (&keys)[(E + 31) / 32], uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  uint chosen = 0u, ranks[PLACES];
  UNROLL for (int p = 0; p < PLACES; ++p) ranks[p] = rank_of<E, HIGHEST>(lane + 32u * uint(p));
  uint count = lane_max(uint(K));  // not known to the compiler, which would unroll the loop
  ROLLED for (uint c = 0; c < count; ++c) {
    uint best = 0u, rank = 0u;
    UNROLL for (int p = 0; p < PLACES; ++p) best = ranks[p] > 0u && keys[p] > best ? keys[p] : best;
    best = lane_max(best);
    UNROLL for (int p = 0; p < PLACES; ++p) {
      rank = keys[p] == best && ranks[p] > rank ? ranks[p] : rank;
    }
    rank = lane_max(rank);
    UNROLL for (int p = 0; p < PLACES; ++p) ranks[p] = ranks[p] == rank ? 0u : ranks[p];
    chosen = lane == lane_of<K, HIGHEST>(c) ? of_rank<E, HIGHEST>(rank) : chosen;
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

// A lane's own, best first.
template <int E>
FUNC void sort_places(Packed<E>& packed) {
  constexpr int PLACES = (E + 31) / 32;
  UNROLL for (int i = 0; i < PLACES; ++i) {
    UNROLL for (int p = 1; p < PLACES - i; ++p) {
      uint a = packed.v[p - 1], b = packed.v[p];
      packed.v[p - 1] = a > b ? a : b;
      packed.v[p] = a > b ? b : a;
    }
  }
}

// The best one of lanes that hold theirs in order. It leaves.
template <int E>
FUNC uint take_best(Packed<E>& packed) {
  constexpr int LAST = (E + 31) / 32 - 1;
  uint best = lane_max(packed.v[0]);
  bool mine = packed.v[0] == best;
  UNROLL for (int p = 0; p < LAST; ++p) packed.v[p] = mine ? packed.v[p + 1] : packed.v[p];
  packed.v[LAST] = mine ? 0u : packed.v[LAST];
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
FUNC uint choose_scores(const Spread<E>& logits, uint lane) {
  uint keys[(E + 31) / 32];
  Spread<E> scores = softmax_of<E>(logits, lane);  // not negative: their bits are in order
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) keys[p] = as_uint(scores.v[p]) & 0x7fffffffu;
  return choose_exactly<E, K, true>(keys, lane);
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
FUNC uint choose_surely(const Spread<E>& logits, float norm, const Spread<E>& bias, uint lane) {
  if (SOFTMAX) return choose_scores<E, K>(scaled<E>(logits, norm), lane);
  uint keys[(E + 31) / 32];
  key_scores<E>(keys, scaled<E>(logits, norm), bias, lane);
  return choose_exactly<E, K, false>(keys, lane);
}

// fetch(expert) asks for what the choice is for: at once by the order of the packed keys, and again
// where that turns out not to be the exact one, which is rare.
template <int E, int K, bool SOFTMAX, typename F>
FUNC uint choose_experts(const Spread<E>& logits, float norm, const Spread<E>& bias, uint lane,
                         F fetch) {
  Packed<E> packed = pack_experts<E, SOFTMAX>(logits, norm, bias, lane);
  sort_places<E>(packed);
  uint own = 0u, below = 0u, top = 0u;
  UNROLL for (int c = 0; c <= K; ++c) {
    uint best = take_best<E>(packed);
    if (c == 0) top = best;
    if (c < K) own = lane == lane_of<K, SOFTMAX>(uint(c)) ? best : own;
    if (c > 0) below = lane == lane_of<K, SOFTMAX>(uint(c - 1)) ? best : below;
  }
  uint chosen = of_rank<E, SOFTMAX>(own & Packed<E>::LOW);
  ROLLED for (bool again = false;; again = true) {
    fetch(chosen);
    bool sure = again || lane >= uint(K) || order_is_sure<E, SOFTMAX>(top, own, below, norm);
    if (lane_max(sure ? 0u : 1u) == 0u) return chosen;
    chosen = choose_surely<E, K, SOFTMAX>(logits, norm, bias, lane);
  }
}

// A softmax's scores, or a sigmoid's without their bias; NORM divides them by their sum.
template <int E, int K, bool NORM, bool SOFTMAX>
FUNC float weigh_experts(const Spread<E>& logits, float norm, uint chosen, float scaling,
                         uint lane) {
  Spread<E> whole = scaled<E>(logits, norm);
  if (SOFTMAX) {
    float weight = element_at<E>(softmax_of<E>(whole, lane), chosen), sum = sum_of_lanes<K>(weight);
    return NORM ? div_rn(weight, sum) : weight;
  }
  float weight = sigmoid<float>(element_at<E>(whole, chosen));
  float sum = add_rn(sum_of_lanes<K>(weight), 1e-20f);
  return mul_rn(NORM && K > 1 ? div_rn(weight, sum) : weight, scaling);
}
