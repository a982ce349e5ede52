// Greedy sampling by many blocks, for whoever launches the calls: MLX's graph or the step's.
#pragma once

#include "metal/walk.h"

namespace moefuse {

// The place of each row's largest in logits [..., V], row contiguous -> uint32 [...].
mx::array sample_by_parts(const mx::array& logits, const metal::Walk::Launcher& launcher);

}  // namespace moefuse
