#pragma once

#include <cstdint>

namespace moefuse {

// Bytes a second at which the ops' threads read a buffer of that many bytes and do nothing else:
// the best of several passes, in huge pages as the weights are. Throws std::invalid_argument
// unless bytes is positive.
double read_bandwidth(int64_t bytes);

}  // namespace moefuse
