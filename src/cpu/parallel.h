// Threads. What is computed for an index never depends on how the work is split.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <system_error>

#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace moefuse::cpu {

// Runs f(0) to f(threads - 1) at the same time and waits for all of them: inside another such call,
// or beside another caller's, by threads of its own. f must not throw. Throws std::system_error if
// the system gives no threads.
template <class F>
void on_threads(int threads, F&& f) {
  if (threads <= 1) return f(0);
  if (Pool::of_process().run(threads, f)) return;
  if (!Pool().run(threads, f))
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again),
                            "[moefuse] threads: expected " + std::to_string(threads));
}

// Calls f(begin, end) on disjoint ranges that cover [0, n), on the caller's own thread where others
// have the pool's. f must not throw.
template <class F>
void parallel_for(int64_t n, F&& f) {
  if (n <= 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), n));
  const auto slice = [&](int t) { f(n * t / threads, n * (t + 1) / threads); };
  if (threads == 1 || !Pool::of_process().run(threads, slice)) f(0, n);
}

}  // namespace moefuse::cpu
