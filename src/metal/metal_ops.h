// The public ops on a Metal device: same arguments as include/moefuse/ops.h, already checked by the
// caller. Emulated, never run on Apple hardware.
//
// exact keeps the rounding steps of the stock Metal graph (each stage to the activation dtype, the
// combine's product and sum in the promoted dtype); the order of the fp32 sums inside a dot product
// and the last bit of exp are our own, so it does not promise stock's bits on this device.
//
// An expert index outside the stack gives NaN in what depends on it, and reads nothing: a GPU
// kernel cannot throw.
#pragma once

#include <vector>

#include "moefuse/ops.h"

namespace moefuse::metal {

// COMBINE of src/kernels/moe_combine.h for values and weights of these dtypes. In the promoted
// dtype fp32, exact is fp32_no_fma.
int combine_steps(Accumulate accumulate, mx::Dtype dtype, mx::Dtype weights);

// Why a kernel does not take these arguments; empty when it does. The caller then uses the stock
// graph and counts it.
std::string combine_refusal(const mx::array& y);
std::string router_refusal(const mx::array& logits, const RouterOptions& options);
std::string experts_refusal(const mx::array& x, const std::vector<QuantizedExperts>& stacks,
                            int k = 1);

std::pair<mx::array, mx::array> moe_router(const mx::array& logits, int k,
                                           const RouterOptions& options,
                                           const std::optional<mx::array>& correction_bias,
                                           mx::StreamOrDevice s);
mx::array moe_combine(const mx::array& y, const mx::array& weights, Accumulate accumulate,
                      mx::StreamOrDevice s);
mx::array moe_experts(const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
                      const QuantizedExperts& down, const mx::array& indices,
                      const mx::array& weights, Accumulate accumulate, int group_size, int bits,
                      mx::StreamOrDevice s);
mx::array gather_qmm_swiglu(const mx::array& x, const QuantizedExperts& gate,
                            const QuantizedExperts& up, const std::optional<mx::array>& lhs_indices,
                            const std::optional<mx::array>& rhs_indices, int group_size, int bits,
                            Accumulate accumulate, mx::StreamOrDevice s);

}  // namespace moefuse::metal
