#include <vector>

#include "cpu/parallel.h"
#include "metal/metal_ops.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/checks.h"
#include "ops/stock.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "moe_combine_weighted_sum_fp32_no_fma";

class MoeCombine : public mx::UnaryPrimitive {
 public:
  MoeCombine(mx::Stream s, Accumulate accumulate) : UnaryPrimitive(s), accumulate_(accumulate) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    count(kOp, to_string(accumulate_));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [y = mx::array::unsafe_weak_copy(inputs[0]), weights = inputs[1].data<float>(),
         out = mx::array::unsafe_weak_copy(out),
         steps = steps()]() mutable { run(y, weights, out.data<char>(), steps); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(std::string("[") + kOp + "] has no GPU form of this primitive.");
  }

  bool is_equivalent(const Primitive& other) const override {
    return accumulate_ == static_cast<const MoeCombine&>(other).accumulate_;
  }
  DEFINE_NAME(MoeCombine)

 private:
  cpu::CombineSteps steps() const {
    if (accumulate_ == Accumulate::exact) return cpu::CombineSteps::dtype;
    return accumulate_ == Accumulate::fp32 ? cpu::CombineSteps::fp32
                                           : cpu::CombineSteps::fp32_no_fma;
  }

  static void run(const mx::array& y, const float* weights, char* out, cpu::CombineSteps steps) {
    const int k = y.shape(-2), columns = y.shape(-1);
    const int64_t rows = y.size() / (int64_t(k) * columns);
    const int64_t row_bytes = int64_t(columns) * y.itemsize();
    const auto dtype = cpu_dtype(y.dtype());
    std::vector<const void*> part(k);
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < k; ++i) part[i] = y.data<char>() + (r * k + i) * row_bytes;
      cpu::kernels().combine(
          {part.data(), weights + r * k, out + r * row_bytes, dtype, dtype, steps, k}, 0, columns);
    }
  }

  Accumulate accumulate_;
};

}  // namespace

mx::array moe_combine_weighted_sum_fp32_no_fma(const mx::array& y, const mx::array& weights,
                                               Accumulate accumulate, mx::StreamOrDevice s) {
  check_float(kOp, "y", y);
  check_float(kOp, "weights", weights);
  if (y.ndim() < 2) fail(kOp, "y", "rank 2 or more, [..., k, D]", describe(y.shape()));
  auto shape = y.shape();
  shape.pop_back();
  check_shape(kOp, "weights", weights, shape);
  const Path path = choose_path(kOp, s, metal::combine_refusal(y));
  if (path == Path::stock) return stock::moe_combine(y, weights, accumulate, s);
  if (path == Path::metal) {
    count(kOp, to_string(accumulate));
    return metal::moe_combine(y, weights, accumulate, s);
  }
  shape.back() = y.shape(-1);
  if (accumulate == Accumulate::exact && y.dtype() != weights.dtype())
    accumulate = Accumulate::fp32_no_fma;  // the promoted dtype is fp32: the same bits
  return mx::array(shape, y.dtype(), std::make_shared<MoeCombine>(mx::to_stream(s), accumulate),
                   {row_contiguous(y, s), row_contiguous(mx::astype(weights, mx::float32, s), s)});
}

}  // namespace moefuse
