// A static split of [0, n) over threads. What is computed for an index never depends on the split.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace moefuse::cpu {

// Calls f(begin, end) on disjoint ranges that cover [0, n). f must not throw.
template <class F>
void parallel_for(int64_t n, F&& f) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), n));
  if (threads <= 1) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) f(n * t / threads, n * (t + 1) / threads);
}

}  // namespace moefuse::cpu
