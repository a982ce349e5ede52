// The Metal executor of a plan: every stage is one dispatch in MLX's graph, through
// fast::metal_kernel. Emulated, never run on Apple hardware.
//
// Activations are of the model's dtype T in every mode, each stage's result rounded to T as the
// stock graph rounds it; dot products, norms and softmax are fp32 inside. `accumulate` decides the
// weighted sum over the experts: exact is T's own sum (fp32 where the weights are fp32), as in
// metal_ops.h, and does not promise stock's bits on this device.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/replay.h"
#include "decode/plan.h"
#include "metal/launch.h"

namespace moefuse::metal {

// One dispatch and what it reads for one row: weights, and the cache at `context` slots.
struct Dispatch {
  std::string kernel;
  int layer;  // -1 outside the layers
  int64_t weight_bytes, cache_bytes;
};

class MetalStep {
 public:
  // Refers to the plan's arrays. Throws std::invalid_argument naming the tensor or field that the
  // kernels do not take.
  MetalStep(const Plan& plan, Accumulate accumulate);
  ~MetalStep();

  // Logits [rows, vocab_size] in T. On Metal they are evaluated: the caches are inputs that the
  // kernels write to, so the graph does not order a later step behind this one. On CUDA they are on
  // their way on MLX's default GPU stream; what uses the caches outside of that stream calls wait()
  // first. Rows and caches are checked by the caller; two rows of one sequence throw
  // std::invalid_argument. tokens: [rows] uint32 in place of the rows' own, not yet known to the
  // host.
  mx::array run(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches,
                const std::optional<mx::array>& tokens = {});
  void wait();

  // On CUDA, after a step of as many rows: {calls, microseconds each} of each kernel, alone.
  std::map<std::string, std::pair<int, double>> kernel_times(int rows);

  std::vector<Dispatch> dispatches(int context) const;
  int64_t calls() const { return calls_; }

 private:
  struct Walk;
  struct Recorded {
    std::unique_ptr<cuda::Replay> replay;
    std::vector<const void*> buffers;  // of the caches
  };
  Recorded& recorded(int rows, const std::vector<LayerCache>& caches);
  mx::array replay(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches,
                   const std::optional<mx::array>& tokens);

  Plan plan_;
  Accumulate accumulate_;
  std::map<float, mx::array> constants_;  // as arrays of one element
  std::map<int, Recorded> recorded_;      // by the number of rows
  std::optional<mx::Stream> stream_;      // of the last step on CUDA
  int64_t calls_ = 0;
};

}  // namespace moefuse::metal
