// The threads of one step: they enter together, share out the blocks of each stage and meet at its
// end. Which thread computes a block never changes what is computed.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moefuse {

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}
  int threads() const { return threads_; }

  // Calls f(i) for each i in [0, n) on whichever thread is free, then waits for all of them. Every
  // thread of the team calls this with the same n.
  template <class F>
  void share(int n, F&& f) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
    meet();
  }

 private:
  static constexpr int kSpins = 256;  // some ten microseconds; then somebody else needs the core

  void meet() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

  const int threads_;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace moefuse
