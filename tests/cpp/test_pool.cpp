// The process's threads: one job at a time for whoever asks, and every slice of it at once.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <numeric>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace moefuse::cpu {
namespace {

// The slices wait for each other: this returns only where they run at the same time. Unatomic sums
// of them, made by their threads and read by the caller, are ThreadSanitizer's to judge.
int meet(int threads) {
  std::vector<int> out(threads, 0);
  std::atomic<int> here{0};
  on_threads(threads, [&](int t) {
    ++here;
    while (here < threads) std::this_thread::yield();
    out[t] += t + 1;
  });
  return std::accumulate(out.begin(), out.end(), 0);
}

int64_t sum(int64_t n) {
  std::vector<int64_t> out(n, 0);
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] += i;
  });
  return std::accumulate(out.begin(), out.end(), int64_t{0});
}

TEST(Pool, EverySliceOnceAndAtTheSameTimeWhateverTheCount) {
  for (int round = 0; round < 50; ++round)
    for (int threads : {8, 1, 2, 3, 8, 2}) EXPECT_EQ(meet(threads), threads * (threads + 1) / 2);
}

TEST(Pool, AJobAfterItsThreadsFellAsleep) {
  for (int round = 0; round < 5; ++round) {
    EXPECT_EQ(meet(3), 6);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

TEST(Pool, CallersFromAnyThread) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) {
        EXPECT_EQ(sum(1000), 499500);
        if (round % 20 == 0) EXPECT_EQ(meet(3), 6);
      }
    });
  for (std::thread& caller : callers) caller.join();
}

TEST(Pool, OneThatAsksWhileAnotherHasItWaitsForNobody) {
  on_threads(2, [](int thread) {
    if (thread == 0) std::thread([] { EXPECT_EQ(meet(2) + sum(100), 3 + 4950); }).join();
  });
}

TEST(Pool, ACallInsideACall) {
  std::vector<int64_t> inner(3, 0), met(3, 0);
  on_threads(3, [&](int t) { inner[t] = sum(100), met[t] = meet(2); });
  EXPECT_EQ(inner, std::vector<int64_t>(3, 4950));
  EXPECT_EQ(met, std::vector<int64_t>(3, 3));
}

TEST(Pool, AForkedChildHasThreadsOfItsOwn) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer starts no threads after a fork";
#endif
  EXPECT_EQ(meet(3), 6);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(meet(3) == 6 && sum(1000) == 499500 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(meet(3), 6);
}

}  // namespace
}  // namespace moefuse::cpu
