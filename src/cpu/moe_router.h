// The router's arithmetic for one row of logits, shared by the op and the decode step.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/stock_math.h"
#include "moefuse/ops.h"

namespace moefuse::cpu {

// Stock MLX's argpartition on CPU: std::nth_element over indices, NaN last, ties to the lower
// index. The order inside the parts is introselect's own and part of the contract, because the
// combine that follows is not associative.
template <class T>
void argpartition(const T* values, std::vector<uint32_t>& order, int kth) {
  std::iota(order.begin(), order.end(), 0u);
  std::nth_element(order.begin(), order.begin() + kth, order.end(), [=](uint32_t a, uint32_t b) {
    auto x = static_cast<float>(values[a]), y = static_cast<float>(values[b]);
    if (std::isnan(x)) return false;
    if (std::isnan(y)) return true;
    return x < y || (x == y && a < b);
  });
}

// softmax in fp32, stored in T, as mx.softmax(precise=True) does.
template <class T>
void precise_softmax(const T* logits, T* out, int n) {
  float top = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < n; ++i) top = std::max(top, static_cast<float>(logits[i]));
  float sum = 0.0f;
  std::vector<float> e(n);
  for (int i = 0; i < n; ++i) {
    e[i] = stock_exp(static_cast<float>(logits[i]) - top);
    sum = sum + e[i];
  }
  const float normalizer = 1.0f / sum;
  for (int i = 0; i < n; ++i) out[i] = static_cast<T>(e[i] * normalizer);
}

struct Row {
  int experts, k;
  std::vector<uint32_t> order;
  Row(int experts, int k) : experts(experts), k(k), order(experts) {}
};

template <class T>
void normalize(T* weights, int k) {
  float sum = 0.0f;  // stock MLX sums halves in fp32 and casts once
  for (int i = 0; i < k; ++i) sum = sum + static_cast<float>(weights[i]);
  const T total = static_cast<T>(sum);
  for (int i = 0; i < k; ++i) weights[i] = static_cast<T>(weights[i] / total);
}

template <class T>
void route_softmax(Row& row, const RouterOptions& o, const T* logits, uint32_t* indices,
                   T* weights) {
  std::vector<T> scores(row.experts);
  precise_softmax(logits, scores.data(), row.experts);
  argpartition(scores.data(), row.order, row.experts - row.k);
  for (int i = 0; i < row.k; ++i) {
    indices[i] = row.order[row.experts - row.k + i];
    weights[i] = scores[indices[i]];
  }
  if (o.norm_topk_prob) normalize(weights, row.k);
}

// Selects before the softmax: one pass of exponentials over k instead of all experts when the
// weights are normalised over the selected. Differs from exact where rounding to T makes ties.
template <class T>
void route_logits(Row& row, const RouterOptions& o, const T* logits, uint32_t* indices,
                  T* weights) {
  argpartition(logits, row.order, row.experts - row.k);
  const uint32_t* chosen = row.order.data() + row.experts - row.k;
  float top = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  std::vector<float> e(row.k);
  for (int i = 0; i < row.k; ++i) top = std::max(top, static_cast<float>(logits[chosen[i]]));
  for (int i = 0; i < row.k; ++i) {
    indices[i] = chosen[i];
    e[i] = stock_exp(static_cast<float>(logits[chosen[i]]) - top);
  }
  const int summed = o.norm_topk_prob ? row.k : row.experts;
  for (int i = 0; i < summed; ++i) {
    const uint32_t at = o.norm_topk_prob ? chosen[i] : i;
    sum = sum + stock_exp(static_cast<float>(logits[at]) - top);
  }
  for (int i = 0; i < row.k; ++i) weights[i] = static_cast<T>(e[i] / sum);
}

// Keeps the topk_group best groups of experts, judged by the sum of each group's two best scores,
// and sets the scores of the others to zero.
inline void mask_groups(const RouterOptions& o, std::vector<float>& scores) {
  const int size = static_cast<int>(scores.size()) / o.n_group, dropped = o.n_group - o.topk_group;
  if (o.n_group <= 1 || dropped <= 0) return;
  std::vector<float> group_scores(o.n_group);
  std::vector<uint32_t> order(size), groups(o.n_group);
  for (int g = 0; g < o.n_group; ++g) {
    const float* group = scores.data() + g * size;
    argpartition(group, order, size - 2);
    group_scores[g] = group[order[size - 2]] + group[order[size - 1]];
  }
  argpartition(group_scores.data(), groups, dropped - 1);
  for (int i = 0; i < dropped; ++i)
    std::fill_n(scores.begin() + int64_t(groups[i]) * size, size, 0.0f);
}

template <class T>
void route_sigmoid(Row& row, const RouterOptions& o, const T* logits, const float* bias,
                   uint32_t* indices, float* weights) {
  std::vector<float> scores(row.experts), choice(row.experts);
  for (int i = 0; i < row.experts; ++i) {
    scores[i] = stock_sigmoid(static_cast<float>(logits[i]));
    choice[i] = bias ? scores[i] + bias[i] : scores[i];
  }
  mask_groups(o, choice);
  for (float& c : choice) c = -c;
  argpartition(choice.data(), row.order, row.k - 1);
  float sum = 0.0f;
  for (int i = 0; i < row.k; ++i) {
    indices[i] = row.order[i];
    weights[i] = scores[indices[i]];
    sum = sum + weights[i];
  }
  for (int i = 0; i < row.k; ++i) {
    if (row.k > 1 && o.norm_topk_prob) weights[i] = weights[i] / (sum + 1e-20f);
    weights[i] = weights[i] * o.scaling_factor;
  }
}

}  // namespace moefuse::cpu
