#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <system_error>

#if defined(__linux__)
#include <sched.h>
#endif

namespace moefuse::cpu {

namespace {

enum Call : int { kNone, kJob, kEnd };

Pool* process = [] {
  pthread_atfork(nullptr, nullptr, [] { process = new Pool; });
  return new Pool;
}();

// What lies between two of a model's fused ops; a woken thread begins later, and may begin on the
// core of the one that woke it. Between looks it yields, so that it holds up nobody who has work.
constexpr std::chrono::milliseconds kAwake{5};

// Waits until done(word), for a while awake, and returns the word.
template <class Done>
int await(const std::atomic<int>& word, bool spin, Done done) {
  using Clock = std::chrono::steady_clock;
  int now = word.load(std::memory_order_acquire);
  const auto until = spin ? Clock::now() + kAwake : Clock::time_point::min();
  for (; !done(now) && spin && Clock::now() < until; std::this_thread::yield())
    for (int i = 0; i < 64 && !done(now); ++i) {
      relax();
      now = word.load(std::memory_order_acquire);
    }
  while (!done(now)) {
    word.wait(now, std::memory_order_acquire);
    now = word.load(std::memory_order_acquire);
  }
  return now;
}

}  // namespace

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

Pool& Pool::of_process() {
  return *process;
}

Pool::~Pool() {
  for (auto& worker : workers_) {
    worker->call.store(kEnd, std::memory_order_release);
    worker->call.notify_one();
    worker->thread.join();
  }
}

void Pool::grow(int workers) {
  while (static_cast<int>(workers_.size()) < workers) {
    auto worker = std::make_unique<Worker>();
    const int thread = static_cast<int>(workers_.size()) + 1;
    workers_.reserve(thread);
    worker->thread = std::thread(&Pool::work, this, std::ref(worker->call), thread);
    workers_.push_back(std::move(worker));
  }
}

void Pool::work(std::atomic<int>& call, int thread) {
  for (bool spin = false;;) {
    if (await(call, spin, [](int now) { return now != kNone; }) == kEnd) return;
    call.store(kNone, std::memory_order_relaxed);
    slice_(f_, thread);
    spin = spin_;
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
  }
}

bool Pool::run(int threads, Slice slice, const void* f) {
  if (taken_.exchange(true, std::memory_order_acquire)) return false;
  try {
    grow(threads - 1);
  } catch (const std::system_error&) {
    taken_.store(false, std::memory_order_release);
    return false;
  }
  static const int cores = processors();
  slice_ = slice, f_ = f, spin_ = threads <= cores;
  left_.store(threads - 1, std::memory_order_relaxed);
  for (int t = 0; t < threads - 1; ++t) {
    workers_[t]->call.store(kJob, std::memory_order_release);
    workers_[t]->call.notify_one();
  }
  slice(f, 0);
  await(left_, spin_, [](int now) { return now == 0; });
  taken_.store(false, std::memory_order_release);
  return true;
}

}  // namespace moefuse::cpu
