#include "ops/moe_experts.h"

#include <vector>

#include "cpu/moe_experts.h"
#include "metal/metal_ops.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/checks.h"
#include "ops/stock.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "moe_gather_qmm_swiglu_downproj_combine";

struct Setup {
  const char* op;
  Accumulate accumulate;
  bool promoted;  // weights are float32 beside half activations: exact combines in fp32
  Quantization quantization;
  bool operator==(const Setup&) const = default;
};

cpu::CombineSteps combine_steps(const Setup& setup) {
  if (setup.accumulate == Accumulate::fp32) return cpu::CombineSteps::fp32;
  if (setup.accumulate == Accumulate::exact && !setup.promoted) return cpu::CombineSteps::dtype;
  return cpu::CombineSteps::fp32_no_fma;
}

class MoeExperts : public mx::UnaryPrimitive {
 public:
  MoeExperts(mx::Stream s, Setup setup) : UnaryPrimitive(s), setup_(setup) {}

  // inputs: x, indices, weights, then the stacks gate, up and down.
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    count(setup_.op, to_string(setup_.accumulate));
    const int k = inputs[1].shape(-1);
    auto stack = [&](int i) {
      return expert_stack(inputs, 3, i, setup_.quantization, out.dtype());
    };
    const cpu::ExpertsArgs args = {.gate = stack(0),
                                   .up = stack(1),
                                   .down = stack(2),
                                   .arithmetic = cpu_arithmetic(setup_.accumulate, out.dtype()),
                                   .combine = combine_steps(setup_),
                                   .dtype = cpu_dtype(out.dtype()),
                                   .x = inputs[0].data<char>(),
                                   .indices = inputs[1].data<uint32_t>(),
                                   .weights = inputs[2].data<float>(),
                                   .out = out.data<char>(),
                                   .rows = static_cast<int>(inputs[1].size() / k),
                                   .k = k};
    mx::cpu::get_command_encoder(stream()).dispatch([args, op = setup_.op] {
      check_indices(op, args.indices, int64_t(args.rows) * args.k, args.gate.experts);
      cpu::moe_experts(args);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(std::string("[") + kOp + "] has no GPU form of this primitive.");
  }

  bool is_equivalent(const Primitive& other) const override {
    return setup_ == static_cast<const MoeExperts&>(other).setup_;
  }
  DEFINE_NAME(MoeExperts)

 private:
  Setup setup_;
};

void check_geometry(const std::string& op, const mx::array& x, const QuantizedExperts& gate,
                    const QuantizedExperts& up, const QuantizedExperts& down,
                    const Quantization& quantization) {
  const auto g = check_experts(op, "gate", gate, x.dtype(), quantization);
  const auto u = check_experts(op, "up", up, x.dtype(), quantization);
  const auto d = check_experts(op, "down", down, x.dtype(), quantization);
  auto shape = [](const ExpertShape& e) { return mx::Shape{e.experts, e.rows, e.cols}; };
  if (x.shape(-1) != g.cols)
    fail(op, "x", "a last axis of gate's K " + std::to_string(g.cols), describe(x.shape()));
  if (shape(u) != shape(g))
    fail(op, "up", "gate's geometry " + describe(shape(g)), describe(shape(u)));
  if (d.experts != g.experts || d.cols != g.rows)
    fail(op, "down",
         "geometry [" + std::to_string(g.experts) + ", D, " + std::to_string(g.rows) + "]",
         describe(shape(d)));
}

}  // namespace

void check_moe_experts(const std::string& op, const mx::array& x, const QuantizedExperts& gate,
                       const QuantizedExperts& up, const QuantizedExperts& down,
                       const mx::array& indices, const mx::array& weights,
                       const Quantization& quantization) {
  check_float(op, "x", x);
  check_float(op, "weights", weights);
  check_integer(op, "indices", indices);
  if (x.ndim() < 1) fail(op, "x", "rank 1 or more, [..., H]", describe(x.shape()));
  check_geometry(op, x, gate, up, down, quantization);
  auto shape = x.shape();
  const int k = indices.ndim() ? indices.shape(-1) : 0;
  if (k < 1 || k > kMaxTopK)
    fail(op, "indices", "1 to " + std::to_string(kMaxTopK) + " experts a row",
         describe(indices.shape()));
  shape.back() = k;
  check_shape(op, "indices", indices, shape);
  check_shape(op, "weights", weights, shape);
}

mx::array moe_experts_on_cpu(const char* op, const mx::array& x, const QuantizedExperts& gate,
                             const QuantizedExperts& up, const QuantizedExperts& down,
                             const mx::array& indices, const mx::array& weights,
                             Accumulate accumulate, const Quantization& quantization,
                             mx::StreamOrDevice s) {
  check_known_indices(op, indices, gate.weight.shape(0));
  auto shape = x.shape();
  shape.back() = down.weight.shape(1);
  const Setup setup = {op, accumulate, weights.dtype() != x.dtype(), quantization};
  std::vector<mx::array> inputs = {row_contiguous(x, s),
                                   row_contiguous(mx::astype(indices, mx::uint32, s), s),
                                   row_contiguous(mx::astype(weights, mx::float32, s), s)};
  for (const auto* w : {&gate, &up, &down}) append_experts(inputs, *w, s);
  return mx::array(shape, x.dtype(), std::make_shared<MoeExperts>(mx::to_stream(s), setup),
                   std::move(inputs));
}

mx::array moe_gather_qmm_swiglu_downproj_combine(const mx::array& x, const QuantizedExperts& gate,
                                                 const QuantizedExperts& up,
                                                 const QuantizedExperts& down,
                                                 const mx::array& indices, const mx::array& weights,
                                                 Accumulate accumulate, int group_size, int bits,
                                                 const std::string& mode, mx::StreamOrDevice s) {
  const Quantization quantization(kOp, mode, group_size, bits);
  check_moe_experts(kOp, x, gate, up, down, indices, weights, quantization);
  const Path path =
      choose_path(kOp, s, metal::experts_refusal(x, {gate, up, down}, indices.shape(-1)));
  if (path == Path::stock)
    return stock::moe_experts(x, gate, up, down, indices, weights, accumulate, group_size, bits,
                              mode, s);
  if (path == Path::metal) {
    count(kOp, to_string(accumulate));
    return metal::moe_experts(x, gate, up, down, indices, weights, accumulate, group_size, bits, s);
  }

  return moe_experts_on_cpu(kOp, x, gate, up, down, indices, weights, accumulate, quantization, s);
}

}  // namespace moefuse
