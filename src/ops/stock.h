// The stock MLX graphs that the fused ops replace: what runs where a device has no kernel, and what
// the tests and benchmarks compare with.
#pragma once

#include "moefuse/ops.h"

namespace moefuse::stock {

std::pair<mx::array, mx::array> moe_router(const mx::array& logits, int k,
                                           const RouterOptions& options,
                                           const std::optional<mx::array>& correction_bias,
                                           mx::StreamOrDevice s = {});
mx::array moe_combine(const mx::array& y, const mx::array& weights, Accumulate accumulate,
                      mx::StreamOrDevice s = {});
mx::array swiglu(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s = {});
mx::array gather_qmm_swiglu(const mx::array& x, const QuantizedExperts& gate,
                            const QuantizedExperts& up, const std::optional<mx::array>& lhs_indices,
                            const std::optional<mx::array>& rhs_indices, bool transpose,
                            int group_size, int bits, const std::string& mode,
                            mx::StreamOrDevice s = {});
mx::array moe_experts(const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
                      const QuantizedExperts& down, const mx::array& indices,
                      const mx::array& weights, Accumulate accumulate, int group_size, int bits,
                      const std::string& mode = "affine", mx::StreamOrDevice s = {});

}  // namespace moefuse::stock
