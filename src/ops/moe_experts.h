// What the two ops of the routed experts share: one stem for a decode step, one for a prompt.
#pragma once

#include "ops/checks.h"

namespace moefuse {

// Throws where a tensor contradicts the others.
void check_moe_experts(const std::string& op, const mx::array& x, const QuantizedExperts& gate,
                       const QuantizedExperts& up, const QuantizedExperts& down,
                       const mx::array& indices, const mx::array& weights,
                       const Quantization& quantization);

// The CPU primitive, for checked arguments. Evaluations are counted under `op`, which has to live.
mx::array moe_experts_on_cpu(const char* op, const mx::array& x, const QuantizedExperts& gate,
                             const QuantizedExperts& up, const QuantizedExperts& down,
                             const mx::array& indices, const mx::array& weights,
                             Accumulate accumulate, const Quantization& quantization,
                             mx::StreamOrDevice s);

}  // namespace moefuse
