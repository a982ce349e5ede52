// Every kernel table that this build holds; kernels() in kernels.h picks one.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace moefuse::cpu {

extern const Kernels kPlain, kAvx2, kAvx512, kNeon;

// The tables that this processor can run, the best first. The tests compare them bit for bit.
std::vector<const Kernels*> available_kernels();

}  // namespace moefuse::cpu
