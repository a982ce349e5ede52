// The threads of one step: they enter together, share out the blocks of each stage and meet at its
// end. Which thread computes a block never changes what is computed.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/pool.h"

namespace moefuse {

class Team {
 public:
  explicit Team(int threads) : threads_(threads), taken_(threads) {}
  int threads() const { return threads_; }

  // Calls f(i) for each i in [0, n), then waits for all of them. Every thread of the team calls
  // this with the same n and its own number. A thread has its own run of neighbours, in ascending
  // order, so that what it reads lies together; it takes from the others' ends once that is done.
  template <class F>
  void share(int thread, int n, F&& f) {
    for (int i; (i = claim(n, thread, true)) >= 0;) f(i);
    for (int other = 1; other < threads_; ++other)
      for (int i; (i = claim(n, (thread + other) % threads_, false)) >= 0;) f(i);
    meet();
  }

 private:
  // How many of a thread's run are taken, from its front (the low half) and from its end.
  struct alignas(64) Taken {
    std::atomic<uint64_t> counts{0};
  };

  int claim(int n, int owner, bool front) {
    const int first = static_cast<int>(int64_t(n) * owner / threads_);
    const int last = static_cast<int>(int64_t(n) * (owner + 1) / threads_);
    std::atomic<uint64_t>& counts = taken_[owner].counts;
    uint64_t now = counts.load(std::memory_order_relaxed);
    for (;;) {
      const int in_front = static_cast<int>(now & 0xffffffff), behind = static_cast<int>(now >> 32);
      if (first + in_front >= last - behind) return -1;
      const uint64_t one = front ? 1 : uint64_t{1} << 32;
      if (counts.compare_exchange_weak(now, now + one, std::memory_order_relaxed))
        return front ? first + in_front : last - 1 - behind;
    }
  }

  static constexpr int kSpins = 256;  // some ten microseconds; then somebody else needs the core

  void meet() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      for (Taken& t : taken_) t.counts.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
      cpu::relax();
    }
  }

  const int threads_;
  std::vector<Taken> taken_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace moefuse
