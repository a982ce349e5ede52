// Vectors that begin on a cache line, so that no load of sixteen floats crosses one.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace moefuse {

template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <class Other>
  LineAllocator(const LineAllocator<Other>&) {}

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  template <class Other>
  bool operator==(const LineAllocator<Other>&) const {
    return true;
  }
};

template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

}  // namespace moefuse
