// Weights are read once a token, front to back: on 4 kB pages a part of that time goes into address
// translation.
#pragma once

#include <cstddef>

namespace moefuse::cpu {

// Asks the kernel to hold a buffer in huge pages, in place. Where it cannot (an old kernel, no
// memory that lies together, another system), nothing changes.
void use_huge_pages(const void* data, size_t bytes);

}  // namespace moefuse::cpu
