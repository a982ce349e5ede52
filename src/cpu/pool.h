// One pool of threads for the whole process: whichever of MLX's streams, each a thread, asks for
// work, no more threads compute than one caller wants. They start with the first job.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moefuse::cpu {

// What a thread does between two looks at what another one writes.
inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Processors that this process may run on.
int processors();

class Pool {
 public:
  // The process's own, also in a forked child, which has none of its parent's threads. It is never
  // destroyed: what sleeps in it ends with the process.
  static Pool& of_process();

  Pool() = default;
  ~Pool();

  // Runs f(0), by the caller itself, to f(threads - 1) at the same time and waits for all of them.
  // False if nothing ran: there is a job already, which may be the one that calls, or the system
  // gives no threads. f must not throw.
  template <class F>
  bool run(int threads, F& f) {
    return run(
        threads,
        [](const void* f, int thread) { (*static_cast<F*>(const_cast<void*>(f)))(thread); }, &f);
  }

 private:
  using Slice = void (*)(const void* f, int thread);
  struct alignas(64) Worker {
    std::atomic<int> call{0};
    std::thread thread;
  };

  bool run(int threads, Slice slice, const void* f);
  void grow(int workers);
  void work(std::atomic<int>& call, int thread);

  std::atomic<bool> taken_{false};  // the rest is its holder's
  std::vector<std::unique_ptr<Worker>> workers_;
  Slice slice_ = nullptr;
  const void* f_ = nullptr;
  bool spin_ = false;
  alignas(64) std::atomic<int> left_{0};
};

}  // namespace moefuse::cpu
