#include "cpu/huge_pages.h"
#include "moefuse/ops.h"

namespace moefuse {

void use_huge_pages(const mx::array& a) {
  if (a.is_available()) cpu::use_huge_pages(a.data<char>(), a.nbytes());
}

}  // namespace moefuse
