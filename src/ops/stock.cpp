#include "ops/stock.h"

#include "mlx/mlx.h"
#include "ops/checks.h"

namespace moefuse::stock {

namespace {

mx::array last(const mx::array& a, int from, int to, mx::StreamOrDevice s) {
  mx::Shape start(a.ndim(), 0), stop = a.shape();
  start.back() = from;
  stop.back() = to;
  return mx::slice(a, start, stop, s);
}

mx::array sigmoid_choice(const mx::array& scores, const RouterOptions& o,
                         const std::optional<mx::array>& bias, mx::StreamOrDevice s) {
  auto choice = bias ? mx::add(scores, *bias, s) : scores;
  if (o.n_group > 1) {
    choice = mx::unflatten(choice, -1, {o.n_group, -1}, s);
    auto group = mx::sum(mx::topk(choice, 2, -1, s), -1, true, s);
    const int dropped = o.n_group - o.topk_group;
    auto order = mx::argpartition(group, dropped - 1, -2, s);
    auto stop = order.shape();
    stop[stop.size() - 2] = dropped;
    auto worst = mx::slice(order, mx::Shape(order.ndim(), 0), stop, s);
    choice = mx::put_along_axis(choice, worst, mx::array(0.0f), -2, s);
    choice = mx::flatten(choice, -2, -1, s);
  }
  return mx::negative(choice, s);
}

}  // namespace

std::pair<mx::array, mx::array> moe_router(const mx::array& logits, int k, const RouterOptions& o,
                                           const std::optional<mx::array>& correction_bias,
                                           mx::StreamOrDevice s) {
  const int experts = logits.shape(-1);
  if (o.scoring == Scoring::sigmoid) {
    auto scores = mx::sigmoid(mx::astype(logits, mx::float32, s), s);
    auto choice = sigmoid_choice(scores, o, correction_bias, s);
    auto indices = last(mx::argpartition(choice, k - 1, -1, s), 0, k, s);
    auto weights = mx::take_along_axis(scores, indices, -1, s);
    if (k > 1 && o.norm_topk_prob) {
      auto sum = mx::add(mx::sum(weights, -1, true, s), mx::array(1e-20f), s);
      weights = mx::divide(weights, sum, s);
    }
    return {indices, mx::multiply(weights, mx::array(o.scaling_factor), s)};
  }
  const bool on_logits = o.mode == RouterMode::logits;
  auto scores = on_logits ? logits : mx::softmax(logits, -1, true, s);
  auto indices = last(mx::argpartition(scores, -k, -1, s), experts - k, experts, s);
  if (on_logits && !o.norm_topk_prob) scores = mx::softmax(logits, -1, true, s);
  auto weights = mx::take_along_axis(scores, indices, -1, s);
  if (on_logits && o.norm_topk_prob) return {indices, mx::softmax(weights, -1, true, s)};
  if (o.norm_topk_prob) weights = mx::divide(weights, mx::sum(weights, -1, true, s), s);
  return {indices, weights};
}

mx::array moe_combine(const mx::array& y, const mx::array& weights, Accumulate accumulate,
                      mx::StreamOrDevice s) {
  auto scores = accumulate == Accumulate::exact ? weights : mx::astype(weights, mx::float32, s);
  auto product = mx::multiply(y, mx::expand_dims(scores, -1, s), s);
  return mx::astype(mx::sum(product, -2, false, s), y.dtype(), s);
}

mx::array swiglu(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s) {
  return mx::multiply(mx::multiply(gate, mx::sigmoid(gate, s), s), up, s);
}

mx::array gather_qmm_swiglu(const mx::array& x, const QuantizedExperts& gate,
                            const QuantizedExperts& up, const std::optional<mx::array>& lhs_indices,
                            const std::optional<mx::array>& rhs_indices, bool transpose,
                            int group_size, int bits, const std::string& mode,
                            mx::StreamOrDevice s) {
  auto qmm = [&](const QuantizedExperts& w) {
    return mx::gather_qmm(x, w.weight, w.scales, w.biases, lhs_indices, rhs_indices, transpose,
                          group_size, bits, mode, std::nullopt, false, s);
  };
  return stock::swiglu(qmm(gate), qmm(up), s);
}

mx::array moe_experts(const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
                      const QuantizedExperts& down, const mx::array& indices,
                      const mx::array& weights, Accumulate accumulate, int group_size, int bits,
                      const std::string& mode, mx::StreamOrDevice s) {
  auto h = stock::gather_qmm_swiglu(mx::expand_dims(x, {-2, -3}, s), gate, up, std::nullopt,
                                    indices, true, group_size, bits, mode, s);
  auto y = mx::gather_qmm(h, down.weight, down.scales, down.biases, std::nullopt, indices, true,
                          group_size, bits, mode, std::nullopt, false, s);
  return stock::moe_combine(mx::squeeze(y, -2, s), weights, accumulate, s);
}

}  // namespace moefuse::stock
