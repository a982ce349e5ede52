// Threadgroups, bytes and occupancy, the same choice for M1 to M5 (published: 8 to 40 cores of a
// phone-to-Max range, simdgroups of 32, 32 KB of threadgroup memory a group; per core about 208 KB
// of registers, 1,024 threads at 52 registers each). Argued, not measured:
//   gate/up: two simdgroups of 4 rows of both matrices. A lane has 8 loads of 4 bytes under way, a
//     simdgroup 1 KB. 400 GB/s at 1 us of latency over 32 cores asks for 12.5 KB under way on a
//     core, 614 GB/s over 40 for 15 KB. nvcc gives this text 96 registers; at 96 a core holds 17
//     simdgroups, 17 KB.
//   Qwen3-30B-A3B: 96 x 8 threadgroups, 14.2 MB read; GLM-4.7-Flash: 192 x 5, 17.7 MB.
//   down: one simdgroup for each expert, so K x 4 rows are under way in one threadgroup and the sum
//     needs no second dispatch; 512 threadgroups of 8 simdgroups (Qwen), 7.1 MB.
//   router and combine move a few KB: one simdgroup a row, 256 threads a strip.
// Batches repeat the grid a row; rows share weights through the system cache only.
#include "metal/metal_ops.h"

#include <numeric>

#include "metal/launch.h"

namespace moefuse::metal {

namespace {

using Arg = mx::fast::TemplateArg;

mx::array as(const mx::array& a, mx::Dtype dtype, mx::StreamOrDevice s) {
  return mx::astype(a, dtype, s);
}

void append(std::vector<mx::array>& inputs, const QuantizedExperts& w) {
  inputs.insert(inputs.end(), {w.weight, w.scales, *w.biases});
}

// The batch of an operand in order: gather_qmm's default where no indices are given.
mx::array batch_indices(const mx::array& a, mx::StreamOrDevice s) {
  const mx::Shape batch(a.shape().begin(), a.shape().end() - 2);
  const int n = std::accumulate(batch.begin(), batch.end(), 1, std::multiplies<>());
  return mx::reshape(mx::arange(0, n, mx::uint32, s), batch, s);
}

}  // namespace

int combine_steps(Accumulate accumulate, mx::Dtype dtype, mx::Dtype weights) {
  if (accumulate == Accumulate::fp32) return 2;
  return accumulate == Accumulate::exact && dtype == weights ? 0 : 1;
}

std::string combine_refusal(const mx::array& y) {
  if (y.size() == 0) return "no rows";
  if (y.size() >= (size_t{1} << 32)) return "2^32 elements or more";
  return "";
}

std::string router_refusal(const mx::array& logits, const RouterOptions& options) {
  if (logits.size() == 0) return "no rows";
  if (options.n_group > 1) return "n_group > 1";
  if (logits.shape(-1) > 1024) return "more than 1024 experts";
  return "";
}

std::string experts_refusal(const mx::array& x, const std::vector<QuantizedExperts>& stacks,
                            int k) {
  if (x.size() == 0 || k == 0) return "no rows";
  for (const auto& experts : stacks) {
    if (!experts.biases) return "fp4 weights";
    // Fewer than 8 elements come in constant memory, which the vector loads do not read; offsets
    // are 32 bits wide.
    if (experts.weight.size() < 8 || experts.scales.size() < 8) return "fewer than 8 weights";
    if (experts.weight.size() >= (size_t{1} << 32)) return "2^32 words of weights or more";
  }
  if (k > 16) return "more than 16 experts a row";
  return "";
}

std::pair<mx::array, mx::array> moe_router(const mx::array& logits, int k,
                                           const RouterOptions& options,
                                           const std::optional<mx::array>& correction_bias,
                                           mx::StreamOrDevice s) {
  const int experts = logits.shape(-1), rows = static_cast<int>(logits.size() / experts);
  mx::Shape shape = logits.shape();
  shape.back() = k;
  const bool softmax = options.scoring == Scoring::softmax;
  std::vector<mx::array> inputs = {logits};
  std::vector<Arg> args = {logits.dtype(), experts, k, options.norm_topk_prob};
  if (softmax) {
    args.push_back(options.mode == RouterMode::logits);
  } else {
    inputs.push_back(correction_bias ? as(*correction_bias, mx::float32, s)
                                     : mx::zeros({experts}, mx::float32, s));
    inputs.push_back(mx::array({options.scaling_factor}));
  }
  const auto& text = kernel_text(softmax ? "moe_router_softmax" : "moe_router_sigmoid");
  auto out = launch({&text,
                     inputs,
                     args,
                     {shape, shape},
                     {mx::uint32, softmax ? logits.dtype() : mx::float32},
                     {rows, 1, 1},
                     32},
                    s);
  return {out[0], out[1]};
}

mx::array moe_combine(const mx::array& y, const mx::array& weights, Accumulate accumulate,
                      mx::StreamOrDevice s) {
  const int k = y.shape(-2), columns = y.shape(-1);
  const int rows = static_cast<int>(y.size() / (int64_t{k} * columns));
  mx::Shape shape(y.shape().begin(), y.shape().end() - 2);
  shape.push_back(columns);
  const int steps = combine_steps(accumulate, y.dtype(), weights.dtype());
  return launch({&kernel_text("moe_combine"),
                 {y, as(weights, mx::float32, s)},
                 {y.dtype(), k, columns, steps},
                 {shape},
                 {y.dtype()},
                 {blocks(columns, 256), rows, 1},
                 256},
                s)[0];
}

mx::array moe_experts(const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
                      const QuantizedExperts& down, const mx::array& indices,
                      const mx::array& weights, Accumulate accumulate, int group_size, int bits,
                      mx::StreamOrDevice s) {
  const int h = x.shape(-1), experts = gate.weight.shape(0), width = gate.weight.shape(1);
  const int out_width = down.weight.shape(1), k = indices.shape(-1);
  const int rows = static_cast<int>(x.size() / h);
  const bool steps = accumulate == Accumulate::exact;
  const mx::Dtype stored = steps ? x.dtype() : mx::float32;
  const mx::array chosen = as(indices, mx::uint32, s);

  std::vector<mx::array> inputs = {x, chosen};
  append(inputs, gate);
  append(inputs, up);
  auto hidden = launch({&kernel_text("moe_experts_gate_up"),
                        inputs,
                        {x.dtype(), stored, bits, group_size, experts, k, h, width, steps},
                        {{rows, k, width}},
                        {stored},
                        {blocks(width, 8), k, rows},
                        64},
                       s)[0];
  inputs = {hidden, chosen, as(weights, mx::float32, s)};
  append(inputs, down);
  mx::Shape shape = x.shape();
  shape.back() = out_width;
  return launch({&kernel_text("moe_experts_down"),
                 inputs,
                 {x.dtype(), stored, bits, group_size, experts, k, width, out_width,
                  combine_steps(accumulate, x.dtype(), weights.dtype()), steps},
                 {shape},
                 {x.dtype()},
                 {blocks(out_width, 4), rows, 1},
                 32 * k},
                s)[0];
}

mx::array gather_qmm_swiglu(const mx::array& x, const QuantizedExperts& gate,
                            const QuantizedExperts& up, const std::optional<mx::array>& lhs_indices,
                            const std::optional<mx::array>& rhs_indices, int group_size, int bits,
                            Accumulate accumulate, mx::StreamOrDevice s) {
  const int m = x.shape(-2), h = x.shape(-1), experts = gate.weight.shape(0);
  const int width = gate.weight.shape(1), matrices = static_cast<int>(x.size() / (int64_t{m} * h));
  auto pair = mx::broadcast_arrays({lhs_indices ? *lhs_indices : batch_indices(x, s),
                                    rhs_indices ? *rhs_indices : batch_indices(gate.weight, s)},
                                   s);
  mx::Shape shape = pair[0].shape();
  shape.insert(shape.end(), {m, width});
  const int batches = static_cast<int>(pair[0].size());
  std::vector<mx::array> inputs = {x, as(pair[0], mx::uint32, s), as(pair[1], mx::uint32, s)};
  append(inputs, gate);
  append(inputs, up);
  return launch({&kernel_text("gather_qmm_swiglu"),
                 inputs,
                 {x.dtype(), bits, group_size, experts, matrices, m, h, width,
                  accumulate == Accumulate::exact},
                 {shape},
                 {x.dtype()},
                 {blocks(width, 8), m, batches},
                 64},
                s)[0];
}

}  // namespace moefuse::metal
