// Threads. What is computed for an index never depends on how the work is split.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace moefuse::cpu {

// Runs f(0) to f(threads - 1) at the same time and waits for all of them. f must not throw.
template <class F>
void on_threads(int threads, F&& f) {
  if (threads <= 1) return f(0);
#ifdef _OPENMP
  bool ran = false;  // OpenMP may give fewer threads than it is asked for, as in a nested region
#pragma omp parallel num_threads(threads)
  if (omp_get_num_threads() == threads) {
    f(omp_get_thread_num());
    if (omp_get_thread_num() == 0) ran = true;
  }
  if (ran) return;
#endif
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back([&f, t] { f(t); });
  f(0);
  for (std::thread& other : others) other.join();
}

// Calls f(begin, end) on disjoint ranges that cover [0, n). f must not throw.
template <class F>
void parallel_for(int64_t n, F&& f) {
  if (n <= 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), n));
  on_threads(threads, [&](int t) { f(n * t / threads, n * (t + 1) / threads); });
}

}  // namespace moefuse::cpu
