// The threads of a step: every index once, by whichever thread, and nobody ahead of the others.
#include <gtest/gtest.h>

#include <vector>

#include "cpu/parallel.h"
#include "decode/team.h"

namespace moefuse {
namespace {

TEST(Team, EveryIndexOnceInEveryStage) {
  for (int threads : {1, 2, 3, 8}) {
    Team team(threads);
    const std::vector<int> sizes = {0, 1, 2, 7, 64, 1000, 3};
    std::vector<std::vector<int>> seen;
    for (int n : sizes) seen.emplace_back(n, 0);
    cpu::on_threads(threads, [&](int thread) {
      for (size_t stage = 0; stage < sizes.size(); ++stage)
        team.share(thread, sizes[stage], [&](int i) {
          ++seen[stage][i];  // a data race if two threads had it: ThreadSanitizer's to see
          if (stage > 0)     // and this one if a thread were ahead of another
            for (int before : seen[stage - 1]) EXPECT_EQ(before, 1);
        });
    });
    for (size_t stage = 0; stage < sizes.size(); ++stage)
      EXPECT_EQ(seen[stage], std::vector<int>(sizes[stage], 1)) << threads << ", stage " << stage;
  }
}

TEST(Team, AThreadThatIsDoneTakesTheOthersWork) {
  Team team(2);
  std::vector<int> by(64, -1);
  std::atomic<bool> begun{false}, first_waits{true};
  cpu::on_threads(2, [&](int thread) {
    team.share(thread, 64, [&](int i) {
      by[i] = thread;
      begun = begun || thread == 0;
      while (!begun) std::this_thread::yield();
      // Thread 0 sits on its first block until the other has taken the last of its run.
      if (i == 1) first_waits = false;
      while (thread == 0 && i == 0 && first_waits) std::this_thread::yield();
    });
  });
  EXPECT_EQ(by[0], 0);
  for (int i = 1; i < 64; ++i) EXPECT_EQ(by[i], 1) << i;
}

}  // namespace
}  // namespace moefuse
