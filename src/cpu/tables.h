// Every kernel table that this build holds; kernels() in kernels.h picks one.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace moefuse::cpu {

extern const Kernels kKernels_plain, kKernels_avx2, kKernels_avx512, kKernels_neon;

// The tables that this processor can run, the best first. The tests compare them bit for bit.
std::vector<const Kernels*> available_kernels();

}  // namespace moefuse::cpu
