// The CUDA decode step as a host object. Everything it points to stays the caller's: MLX's own
// device arrays, for instance. Errors are std::runtime_error "[cuda stage] what CUDA said".
#pragma once
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "step.h"

namespace moefuse::cuda {

// Device pointers of a model. layers: host array, copied. rope: [max_context, head_dim / 2, 2]
// fp32.
struct ModelPointers {
  std::vector<Layer> layers;
  Matrix embed, lm_head;
  const uint16_t* final_norm;
  const float* rope;
  int cache_stride;  // tokens that k_cache and v_cache hold per head
  float eps;
};

// Throws if `status` is not success; `what` is a stage's name.
void check(cudaError_t status, const std::string& what);

template <class G>
class DecodeStep {
 public:
  // blocks: SMs to use, 0 for all. Throws std::invalid_argument where the geometry does not fit.
  explicit DecodeStep(const ModelPointers& model, int blocks = 0);
  ~DecodeStep();
  DecodeStep(const DecodeStep&) = delete;
  DecodeStep& operator=(const DecodeStep&) = delete;

  // The next run starts with `token` at `position`: so many tokens are in the cache.
  void seek(int position, int token, cudaStream_t stream);
  // Runs `tokens` greedy steps without the host; asynchronous. At most kMaxTokens.
  void run(int tokens, cudaStream_t stream);
  // The last run's greedy tokens; waits for the stream and names the stage that failed.
  std::vector<int> sampled(cudaStream_t stream);

  const StepParams& params() const { return params_; }
  float* logits() const { return params_.logits; }  // [vocab] fp32 on the device, the last token's
  // Cycles of block 0 in each part of each stage, [kStages][kParts], since the last call; the first
  // call only switches it on.
  std::vector<long long> timeline();

  static constexpr int kMaxTokens = 256;

 private:
  void* device(size_t bytes, int fill);

  StepParams params_{};
  std::vector<void*> owned_;
  unsigned* fault_ = nullptr;
  int max_tokens_ = 0, host_position_ = 0;
};

}  // namespace moefuse::cuda
