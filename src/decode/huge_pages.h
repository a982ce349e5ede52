// Weights are read once a token, front to back: on 4 kB pages a part of that time goes into address
// translation.
#pragma once

#include "model/weights.h"

namespace moefuse {

// Asks the kernel to hold a buffer, or those of a model's arrays, in huge pages, in place. Where it
// cannot (an old kernel, no memory that lies together), nothing changes.
void use_huge_pages(const void* data, size_t bytes);
void use_huge_pages(const Model& model);

}  // namespace moefuse
