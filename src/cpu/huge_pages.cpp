#include "cpu/huge_pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace moefuse::cpu {

void use_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
#ifndef MADV_COLLAPSE
  constexpr int MADV_COLLAPSE = 25;  // Linux 6.1; older C libraries do not name it
#endif
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first >= last) return;
  char* pages = static_cast<char*>(const_cast<void*>(data)) + (first - begin);
  madvise(pages, last - first, MADV_HUGEPAGE);
  madvise(pages, last - first, MADV_COLLAPSE);
#endif
}

}  // namespace moefuse::cpu
