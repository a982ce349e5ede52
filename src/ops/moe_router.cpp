#include "cpu/moe_router.h"
#include "metal/metal_ops.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/checks.h"
#include "ops/stock.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "moe_router_argpartition_logits_topk";

using namespace cpu;

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
  const Path path = choose_path(kOp, s, metal::router_refusal(logits, options));
  if (path == Path::stock) return stock::moe_router(logits, k, options, correction_bias, s);
  if (path == Path::metal) {
    count(kOp, options.mode == RouterMode::exact ? "exact" : "logits");
    return metal::moe_router(logits, k, options, correction_bias, s);
  }

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
