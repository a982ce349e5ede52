// The CUDA executor of a plan: the walk's kernels as one graph, on MLX's stream.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/replay.h"
#include "cuda/tensor_walk.h"
#include "metal/walk.h"

namespace moefuse::cuda {

// Between the kernels activations are fp32 where TensorWalk takes the plan, else of the model's
// dtype; sums are fp32 or exact. `accumulate` decides the weighted sum over the experts, as on
// Metal.
class CudaStep {
 public:
  // Refers to the plan's arrays. Throws std::invalid_argument naming the tensor or field that the
  // kernels do not take.
  CudaStep(const Plan& plan, Accumulate accumulate);
  ~CudaStep();

  // Logits [rows, vocab_size] in T, on their way on MLX's default GPU stream: what uses the caches
  // outside of that stream calls wait() first. Rows and caches are checked by the caller; two rows
  // of one sequence throw std::invalid_argument. tokens: [rows] uint32 in place of the rows' own,
  // not yet known to the host.
  // greedy: the next tokens instead, [rows] uint32, chosen in the graph.
  mx::array run(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches,
                const std::optional<mx::array>& tokens = {}, bool greedy = false);
  void wait();

  // After a step of as many rows: {calls, microseconds each} of each kernel, alone.
  std::map<std::string, std::pair<int, double>> kernel_times(int rows);
  int64_t calls() const { return calls_; }

 private:
  // longest: positions before the newest in the longest row.
  Replay& recorded(int rows, int longest, bool greedy, const std::vector<LayerCache>& caches);

  Plan plan_;
  Accumulate accumulate_;
  metal::Constants constants_;
  FoldedRouters routers_;
  bool tensor_;  // the walk of CUDA's own kernels takes the plan
  // By rows, stretches of the longest, and whether the tokens are chosen too.
  std::map<std::tuple<int, int, bool>, std::unique_ptr<Replay>> recorded_;
  std::optional<mx::Stream> stream_;  // of the last step
  int64_t calls_ = 0;
};

}  // namespace moefuse::cuda
