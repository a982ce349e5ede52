// The CPU executor of a plan. A is the activations' type: bfloat16 or float16 keeps stock MLX's
// bits, float is the fp32 modes. Every thread runs the whole list of stages; cheap per-vector work
// (norms, the choice of experts) is repeated by each of them, which costs less than a meeting.
#pragma once

#include <memory>
#include <vector>

#include "cpu/slots.h"
#include "decode/inputs.h"
#include "decode/plan.h"
#include "decode/rope.h"
#include "decode/team.h"

namespace moefuse {

// A layer's cache as rows of heads.
struct CacheView {
  char *keys, *values;
  int64_t slots;  // allocated
};

struct StageTime {
  int64_t calls = 0;
  double seconds = 0;
};

template <class A>
class CpuStep {
 public:
  CpuStep(const Plan& plan, Accumulate accumulate);
  ~CpuStep();

  // logits [rows, vocab_size]. Everything is checked by now: nothing here throws.
  void run(const std::vector<StepRow>& rows, const std::vector<CacheView>& caches, A* logits);
  const std::vector<StageTime>& times() const { return times_; }

 private:
  class Worker;
  struct Shared;

  void put_a_cache_in_huge_pages();

  Plan plan_;  // its norms converted to A
  std::unique_ptr<Shared> shared_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<StageTime> times_;
  std::vector<CacheView> in_huge_pages_;  // of each layer: the caches that were put there
};

}  // namespace moefuse
