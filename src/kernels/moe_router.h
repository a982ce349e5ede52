// Top-k selection in the order of a full stable sort, and the weights of the chosen experts.
#pragma once

// Element i of a row of E values is in lane i % 32, place i / 32.
template <int E>
struct Spread {
  float v[(E + 31) / 32];
};

template <int K>
struct Choice {
  uint index[K];
  float value[K];
};

// Keys of floats that compare as the floats do, -0 beside 0; NaN above all or below all.
template <bool NAN_HIGH>
FUNC uint order_key(float v) {
  if (v != v) return NAN_HIGH ? 0xffffffffu : 0u;
  uint bits = as_uint(v == 0.0f ? 0.0f : v);
  return (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
}

// The K best of a row, best first; every lane holds them. LAST_WINS gives ties to the higher index
// and puts NaN on top: the end of a stable ascending sort. Otherwise ties go to the lower index and
// NaN comes last: the start of a stable ascending sort of the negated values.
template <int E, int K, bool LAST_WINS>
FUNC Choice<K> choose(Spread<E> row, uint lane) {
  constexpr int PLACES = (E + 31) / 32;
  Choice<K> chosen;
  uint taken = 0u;
  UNROLL for (int c = 0; c < K; ++c) {
    uint best_key = 0u, best_rank = 0u;  // rank 0: nothing found yet
    UNROLL for (int p = 0; p < PLACES; ++p) {
      uint i = lane + 32u * uint(p);
      uint key = order_key<LAST_WINS>(row.v[p]), rank = LAST_WINS ? i + 1u : uint(E) - i;
      bool free = i < uint(E) && (taken >> p & 1u) == 0u;
      bool better = key > best_key || (key == best_key && rank > best_rank);
      best_key = free && better ? key : best_key;
      best_rank = free && better ? rank : best_rank;
    }
    for (uint m = 16; m > 0; m >>= 1) {
      uint key = shuffle_xor(best_key, m), rank = shuffle_xor(best_rank, m);
      bool better = key > best_key || (key == best_key && rank > best_rank);
      best_key = better ? key : best_key;
      best_rank = better ? rank : best_rank;
    }
    uint winner = LAST_WINS ? best_rank - 1u : uint(E) - best_rank;
    float value = 0.0f;
    UNROLL for (int p = 0; p < PLACES; ++p) value = winner / 32u == uint(p) ? row.v[p] : value;
    chosen.index[c] = winner;
    chosen.value[c] = shuffle(value, winner % 32u);
    taken |= winner % 32u == lane ? 1u << (winner / 32u) : 0u;
  }
  return chosen;
}

// Sum over the row of e^(v - top).
template <int E>
FUNC float exp_sum(Spread<E> row, float top, uint lane) {
  float sum = 0.0f;
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    float e = exp_fp32(add_rn(row.v[p], -top));
    sum = add_rn(sum, lane + 32u * uint(p) < uint(E) ? e : 0.0f);
  }
  return lane_sum(sum);
}

// softmax in fp32 stored in T, then the K best in ascending order; NORM divides by their sum in T.
template <typename T, int E, int K, bool NORM>
FUNC Choice<K> route_softmax(Spread<E> logits, uint lane) {
  float top = -as_float(0x7f800000u);
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    bool inside = lane + 32u * uint(p) < uint(E);
    top = inside && logits.v[p] > top ? logits.v[p] : top;
  }
  top = lane_max(top);
  float normalizer = div_rn(1.0f, exp_sum<E>(logits, top, lane));
  Spread<E> scores;
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    scores.v[p] = rounded<T>(mul_rn(exp_fp32(add_rn(logits.v[p], -top)), normalizer));
  }
  Choice<K> best = choose<E, K, true>(scores, lane), ascending;
  float sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) {
    ascending.index[c] = best.index[K - 1 - c];
    ascending.value[c] = best.value[K - 1 - c];
    sum = rounded<T>(add_rn(sum, ascending.value[c]));
  }
  if (!NORM) return ascending;
  UNROLL for (int c = 0; c < K; ++c) ascending.value[c] = div_rn(ascending.value[c], sum);
  return ascending;
}

// The K best logits in ascending order, then e^(v - best) over their sum, or over the sum of the
// whole row without NORM; in fp32.
template <int E, int K, bool NORM>
FUNC Choice<K> route_logits(Spread<E> logits, uint lane) {
  Choice<K> best = choose<E, K, true>(logits, lane), ascending;
  float top = best.value[0], sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) {
    ascending.index[c] = best.index[K - 1 - c];
    ascending.value[c] = exp_fp32(add_rn(best.value[K - 1 - c], -top));
    sum = add_rn(sum, ascending.value[c]);
  }
  if (!NORM) sum = exp_sum<E>(logits, top, lane);
  UNROLL for (int c = 0; c < K; ++c) ascending.value[c] = div_rn(ascending.value[c], sum);
  return ascending;
}

// sigmoid in fp32; chosen by the biased score, weighted by the plain one.
template <int E, int K, bool NORM, typename B>
FUNC Choice<K> route_sigmoid(Spread<E> logits, B bias, float scaling, uint lane) {
  Spread<E> biased;
  UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
    uint i = lane + 32u * uint(p);
    logits.v[p] = sigmoid<float>(logits.v[p]);
    biased.v[p] = i < uint(E) ? add_rn(logits.v[p], bias[i]) : 0.0f;
  }
  Choice<K> chosen = choose<E, K, false>(biased, lane);
  float sum = 0.0f;
  UNROLL for (int c = 0; c < K; ++c) {
    float plain = 0.0f;
    UNROLL for (int p = 0; p < (E + 31) / 32; ++p) {
      plain = chosen.index[c] / 32u == uint(p) ? logits.v[p] : plain;
    }
    chosen.value[c] = shuffle(plain, chosen.index[c] % 32u);
    sum = add_rn(sum, chosen.value[c]);
  }
  sum = add_rn(sum, 1e-20f);
  UNROLL for (int c = 0; c < K; ++c) {
    float w = NORM && K > 1 ? div_rn(chosen.value[c], sum) : chosen.value[c];
    chosen.value[c] = mul_rn(w, scaling);
  }
  return chosen;
}

// Lane c stores the choice's element c.
template <typename T, int K, typename I, typename W>
FUNC void store_choice(Choice<K> chosen, I indices, W weights, uint at, uint lane) {
  UNROLL for (int c = 0; c < K; ++c) {
    if (lane == uint(c)) {
      indices[at + lane] = chosen.index[c];
      weights[at + lane] = T(chosen.value[c]);
    }
  }
}
