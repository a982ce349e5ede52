#include <numeric>
#include <vector>

#include "metal/metal_ops.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/checks.h"
#include "ops/stock.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "gather_qmm_swiglu";

class GatherQmmSwiglu : public mx::UnaryPrimitive {
 public:
  GatherQmmSwiglu(mx::Stream s, Accumulate accumulate, const Quantization& quantization)
      : UnaryPrimitive(s), accumulate_(accumulate), quantization_(quantization) {}

  // inputs: x [matrices, M, K], lhs and rhs indices [batches], then the stacks gate and up.
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    count(kOp, to_string(accumulate_));
    auto stack = [&](int i) { return expert_stack(inputs, 3, i, quantization_, out.dtype()); };
    const cpu::GatherSwigluArgs args = {.gate = stack(0),
                                        .up = stack(1),
                                        .arithmetic = cpu_arithmetic(accumulate_, out.dtype()),
                                        .dtype = cpu_dtype(out.dtype()),
                                        .x = inputs[0].data<char>(),
                                        .matrix = inputs[1].data<uint32_t>(),
                                        .expert = inputs[2].data<uint32_t>(),
                                        .out = out.data<char>(),
                                        .batches = static_cast<int>(inputs[1].size()),
                                        .m = inputs[0].shape(1)};
    const int matrices = inputs[0].shape(0);
    mx::cpu::get_command_encoder(stream()).dispatch([args, matrices] {
      check_indices("gather_qmm_swiglu, lhs", args.matrix, args.batches, matrices);
      check_indices("gather_qmm_swiglu, rhs", args.expert, args.batches, args.gate.experts);
      cpu::gather_qmm_swiglu(args);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(std::string("[") + kOp + "] has no GPU form of this primitive.");
  }

  bool is_equivalent(const Primitive& other) const override {
    auto& o = static_cast<const GatherQmmSwiglu&>(other);
    return accumulate_ == o.accumulate_ && quantization_ == o.quantization_;
  }
  DEFINE_NAME(GatherQmmSwiglu)

 private:
  Accumulate accumulate_;
  Quantization quantization_;
};

// The batch of an operand in order, the default of gather_qmm where no indices are given.
mx::array batch_indices(const mx::Shape& batch, mx::StreamOrDevice s) {
  const int n = std::accumulate(batch.begin(), batch.end(), 1, std::multiplies<>());
  return mx::reshape(mx::arange(0, n, mx::uint32, s), batch, s);
}

mx::Shape batch_of(const mx::array& a) {
  return {a.shape().begin(), a.shape().end() - 2};
}

}  // namespace

mx::array gather_qmm_swiglu(const mx::array& x, const QuantizedExperts& gate,
                            const QuantizedExperts& up, const std::optional<mx::array>& lhs_indices,
                            const std::optional<mx::array>& rhs_indices, bool transpose,
                            int group_size, int bits, const std::string& mode,
                            Accumulate accumulate, mx::StreamOrDevice s) {
  const Quantization quantization(kOp, mode, group_size, bits);
  check_float(kOp, "x", x);
  if (!transpose) fail(kOp, "transpose", "true", "false");
  if (x.ndim() < 2) fail(kOp, "x", "rank 2 or more, [..., M, K]", describe(x.shape()));
  const auto g = check_experts(kOp, "gate", gate, x.dtype(), quantization);
  const auto u = check_experts(kOp, "up", up, x.dtype(), quantization);
  if (u.experts != g.experts || u.rows != g.rows || u.cols != g.cols)
    fail(kOp, "up", "gate's geometry " + describe(gate.weight.shape()),
         describe(up.weight.shape()));
  if (x.shape(-1) != g.cols)
    fail(kOp, "x", "a last axis of gate's K " + std::to_string(g.cols), describe(x.shape()));
  for (const auto* indices : {&lhs_indices, &rhs_indices})
    if (*indices) check_integer(kOp, "indices", **indices);
  const Path path = choose_path(kOp, s, metal::experts_refusal(x, {gate, up}));
  if (path == Path::stock)
    return stock::gather_qmm_swiglu(x, gate, up, lhs_indices, rhs_indices, transpose, group_size,
                                    bits, mode, s);
  if (path == Path::metal) {
    count(kOp, to_string(accumulate));
    return metal::gather_qmm_swiglu(x, gate, up, lhs_indices, rhs_indices, group_size, bits,
                                    accumulate, s);
  }

  const mx::Shape batch = batch_of(x);
  const int matrices = std::accumulate(batch.begin(), batch.end(), 1, std::multiplies<>());
  if (lhs_indices) check_known_indices("gather_qmm_swiglu, lhs", *lhs_indices, matrices);
  if (rhs_indices) check_known_indices("gather_qmm_swiglu, rhs", *rhs_indices, g.experts);
  auto pair = mx::broadcast_arrays({lhs_indices ? *lhs_indices : batch_indices(batch, s),
                                    rhs_indices ? *rhs_indices : batch_indices({g.experts}, s)},
                                   s);
  auto shape = pair[0].shape();
  const int m = x.shape(-2);
  shape.insert(shape.end(), {m, g.rows});
  auto flat = [&](const mx::array& a) {
    return row_contiguous(mx::reshape(mx::astype(a, mx::uint32, s), {-1}, s), s);
  };
  std::vector<mx::array> inputs = {row_contiguous(mx::reshape(x, {-1, m, g.cols}, s), s),
                                   flat(pair[0]), flat(pair[1])};
  append_experts(inputs, gate, s);
  append_experts(inputs, up, s);
  return mx::array(shape, x.dtype(),
                   std::make_shared<GatherQmmSwiglu>(mx::to_stream(s), accumulate, quantization),
                   std::move(inputs));
}

}  // namespace moefuse
