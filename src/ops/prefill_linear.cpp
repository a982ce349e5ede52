#include <vector>

#include "metal/launch.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "prefill_linear";

class PrefillLinear : public mx::UnaryPrimitive {
 public:
  PrefillLinear(mx::Stream s, Accumulate accumulate, const Quantization& quantization)
      : UnaryPrimitive(s), accumulate_(accumulate), quantization_(quantization) {}

  // inputs: x, then the matrix as a stack of one.
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    count(kOp, to_string(accumulate_));
    const auto w = expert_stack(inputs, 1, 0, quantization_, out.dtype()).first;
    const cpu::LinearArgs args = {.w = w,
                                  .arithmetic = cpu_arithmetic(accumulate_, out.dtype()),
                                  .dtype = cpu_dtype(out.dtype()),
                                  .x = inputs[0].data<char>(),
                                  .out = out.data<char>(),
                                  .rows = static_cast<int>(inputs[0].size() / w.cols)};
    mx::cpu::get_command_encoder(stream()).dispatch([args] { cpu::prefill_linear(args); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(std::string("[") + kOp + "] has no GPU form of this primitive.");
  }

  bool is_equivalent(const Primitive& other) const override {
    auto& o = static_cast<const PrefillLinear&>(other);
    return accumulate_ == o.accumulate_ && quantization_ == o.quantization_;
  }
  DEFINE_NAME(PrefillLinear)

 private:
  Accumulate accumulate_;
  Quantization quantization_;
};

}  // namespace

mx::array prefill_linear(const mx::array& x, const QuantizedExperts& w, Accumulate accumulate,
                         int group_size, int bits, const std::string& mode, mx::StreamOrDevice s) {
  const Quantization quantization(kOp, mode, group_size, bits);
  check_float(kOp, "x", x);
  if (x.ndim() < 1) fail(kOp, "x", "rank 1 or more, [..., K]", describe(x.shape()));
  if (w.weight.ndim() != 2) fail(kOp, "w.weight", "rank 2 [N, words]", describe(w.weight.shape()));
  auto one = [&](const mx::array& a) { return mx::expand_dims(a, 0, s); };
  const QuantizedExperts stack = {one(w.weight), one(w.scales),
                                  w.biases ? std::optional(one(*w.biases)) : std::nullopt};
  const auto [experts, rows, cols] = check_experts(kOp, "w", stack, x.dtype(), quantization);
  if (x.shape(-1) != cols)
    fail(kOp, "x", "a last axis of w's K " + std::to_string(cols), describe(x.shape()));
  if (metal::serves(s) || mx::to_stream(s).device != mx::Device::cpu) {
    count(kOp, "stock: no kernel for this GPU");
    return mx::quantized_matmul(x, w.weight, w.scales, w.biases, true, group_size, bits, mode, s);
  }
  cpu::check_settings();
  auto shape = x.shape();
  shape.back() = rows;
  std::vector<mx::array> inputs = {row_contiguous(x, s)};
  append_experts(inputs, stack, s);
  return mx::array(shape, x.dtype(),
                   std::make_shared<PrefillLinear>(mx::to_stream(s), accumulate, quantization),
                   std::move(inputs));
}

}  // namespace moefuse
