// What the Metal texts of the decode step take, checked before anything is launched.
#pragma once

#include "decode/plan.h"

namespace moefuse::metal {

// Throws std::invalid_argument naming the first stage and field that the kernels do not take.
void check_limits(const Plan& plan);

}  // namespace moefuse::metal
