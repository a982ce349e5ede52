// The Metal executor of a plan: every stage is one dispatch in MLX's graph, through
// fast::metal_kernel. Emulated, never run on Apple hardware.
//
// Activations are of the model's dtype T in every mode, each stage's result rounded to T as the
// stock graph rounds it; dot products, norms and softmax are fp32 inside. `accumulate` decides the
// weighted sum over the experts: exact is T's own sum (fp32 where the weights are fp32), as in
// metal_ops.h, and does not promise stock's bits on this device.
#pragma once

#include <string>
#include <vector>

#include "decode/plan.h"
#include "metal/walk.h"

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

  // Logits [rows, vocab_size] in T, evaluated: the caches are inputs that the kernels write to, so
  // the graph does not order a later step behind this one. Rows and caches are checked by the
  // caller; two rows of one sequence throw std::invalid_argument.
  mx::array run(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches);

  std::vector<Dispatch> dispatches(int context) const;
  int64_t calls() const { return calls_; }

 private:
  Plan plan_;
  Accumulate accumulate_;
  Constants constants_;
  int64_t calls_ = 0;
};

}  // namespace moefuse::metal
