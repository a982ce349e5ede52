#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/stock_math.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/checks.h"
#include "ops/stock.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "moe_router_argpartition_logits_topk";

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
    e[i] = cpu::stock_exp(static_cast<float>(logits[i]) - top);
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
  float top = -std::numeric_limits<float>::infinity(), sum = 0.0f, e[kMaxTopK];
  for (int i = 0; i < row.k; ++i) top = std::max(top, static_cast<float>(logits[chosen[i]]));
  for (int i = 0; i < row.k; ++i) {
    indices[i] = chosen[i];
    e[i] = cpu::stock_exp(static_cast<float>(logits[chosen[i]]) - top);
  }
  const int summed = o.norm_topk_prob ? row.k : row.experts;
  for (int i = 0; i < summed; ++i) {
    const uint32_t at = o.norm_topk_prob ? chosen[i] : i;
    sum = sum + cpu::stock_exp(static_cast<float>(logits[at]) - top);
  }
  for (int i = 0; i < row.k; ++i) weights[i] = static_cast<T>(e[i] / sum);
}

// Keeps the topk_group best groups of experts, judged by the sum of each group's two best scores,
// and sets the scores of the others to zero.
void mask_groups(const RouterOptions& o, std::vector<float>& scores) {
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
    scores[i] = cpu::stock_sigmoid(static_cast<float>(logits[i]));
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

class MoeRouter : public mx::Primitive {
 public:
  MoeRouter(mx::Stream s, int k, RouterOptions options) : Primitive(s), k_(k), options_(options) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (auto& out : outputs) out.set_data(mx::allocator::malloc(out.nbytes()));
    count(kOp, options_.mode == RouterMode::exact ? "exact" : "logits");
    encoder.dispatch([logits = mx::array::unsafe_weak_copy(inputs[0]),
                      bias = inputs.size() > 1 ? inputs[1].data<float>() : nullptr,
                      indices = outputs[0].data<uint32_t>(),
                      weights = mx::array::unsafe_weak_copy(outputs[1]), k = k_,
                      options = options_]() mutable {
      cpu::with_float_type(logits.dtype(), [&](auto zero) {
        run<decltype(zero)>(logits, bias, indices, weights, k, options);
      });
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error(std::string("[") + kOp + "] has no GPU form of this primitive.");
  }

  bool is_equivalent(const Primitive& other) const override {
    auto& o = static_cast<const MoeRouter&>(other);
    return k_ == o.k_ && options_.scoring == o.options_.scoring &&
           options_.norm_topk_prob == o.options_.norm_topk_prob &&
           options_.scaling_factor == o.options_.scaling_factor &&
           options_.n_group == o.options_.n_group && options_.topk_group == o.options_.topk_group &&
           options_.mode == o.options_.mode;
  }
  DEFINE_NAME(MoeRouter)

 private:
  template <class T>
  static void run(const mx::array& logits, const float* bias, uint32_t* indices, mx::array& weights,
                  int k, const RouterOptions& options) {
    const int experts = logits.shape(-1);
    Row row(experts, k);
    for (size_t r = 0; r < logits.size() / experts; ++r) {
      const T* in = logits.data<T>() + r * experts;
      if (options.scoring == Scoring::sigmoid)
        route_sigmoid(row, options, in, bias, indices + r * k, weights.data<float>() + r * k);
      else if (options.mode == RouterMode::exact)
        route_softmax(row, options, in, indices + r * k, weights.data<T>() + r * k);
      else
        route_logits(row, options, in, indices + r * k, weights.data<T>() + r * k);
    }
  }

  int k_;
  RouterOptions options_;
};

void check_options(const RouterOptions& o, int k, int experts, bool has_bias) {
  const std::string got = std::to_string(k);
  if (k < 1 || k > kMaxTopK) fail(kOp, "k", "1 to " + std::to_string(kMaxTopK), got);
  if (k > experts) fail(kOp, "k", "at most the " + std::to_string(experts) + " experts", got);
  const bool softmax = o.scoring == Scoring::softmax;
  if (softmax && has_bias) fail(kOp, "correction_bias", "none with scoring 'softmax'", "an array");
  if (!softmax && o.mode == RouterMode::logits)
    fail(kOp, "mode", "'exact' with scoring 'sigmoid'", "'logits'");
  if (softmax && (o.n_group != 1 || o.scaling_factor != 1.0f))
    fail(kOp, "n_group and scaling_factor", "1 with scoring 'softmax'",
         std::to_string(o.n_group) + " and " + std::to_string(o.scaling_factor));
  if (o.n_group < 1 || experts % o.n_group != 0 || (o.n_group > 1 && experts / o.n_group < 2))
    fail(kOp, "n_group",
         "a divisor of the " + std::to_string(experts) + " experts that leaves two or more a group",
         std::to_string(o.n_group));
  if (o.topk_group < 1 || o.topk_group > o.n_group)
    fail(kOp, "topk_group", "1 to n_group " + std::to_string(o.n_group),
         std::to_string(o.topk_group));
}

}  // namespace

std::pair<mx::array, mx::array> moe_router_argpartition_logits_topk(
    const mx::array& logits, int k, const RouterOptions& options,
    const std::optional<mx::array>& correction_bias, mx::StreamOrDevice s) {
  check_float(kOp, "logits", logits);
  if (logits.ndim() < 1 || logits.shape(-1) < 1)
    fail(kOp, "logits", "rank 1 or more, [..., experts]", describe(logits.shape()));
  const int experts = logits.shape(-1);
  check_options(options, k, experts, correction_bias.has_value());
  if (correction_bias) {
    check_float(kOp, "correction_bias", *correction_bias);
    check_shape(kOp, "correction_bias", *correction_bias, {experts});
  }
  if (!has_kernel(kOp, s)) return stock::moe_router(logits, k, options, correction_bias, s);

  auto shape = logits.shape();
  shape.back() = k;
  std::vector<mx::array> inputs = {row_contiguous(logits, s)};
  if (correction_bias)
    inputs.push_back(row_contiguous(mx::astype(*correction_bias, mx::float32, s), s));
  auto dtype = options.scoring == Scoring::softmax ? logits.dtype() : mx::float32;
  auto outputs =
      mx::array::make_arrays({shape, shape}, {mx::uint32, dtype},
                             std::make_shared<MoeRouter>(mx::to_stream(s), k, options), inputs);
  return {outputs[0], outputs[1]};
}

}  // namespace moefuse
