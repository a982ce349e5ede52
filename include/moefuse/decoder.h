// The decode step: one token for each of up to kMaxRows sequences, as a plan of fused stages.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moefuse/model.h"
#include "moefuse/ops.h"

namespace moefuse {

constexpr int kMaxRows = 8;

// One token of one sequence. `sequence` is its row in the caches; the token's keys and values go to
// `slot`, and it attends to the slots [first, slot]. `position` is its place for the rotary
// embedding; without left padding it equals slot, and first is 0.
struct StepRow {
  uint32_t token;
  int sequence, position, first, slot;
};

// What one layer remembers, [sequences, kv_heads, slots, dim] each, in the model's dtype and row
// contiguous: keys and values for grouped attention, the latent and the rotary key for MLA. A step
// writes into these very buffers.
struct LayerCache {
  mx::array keys, values;
};

// The widths of a layer's cache, for whoever allocates it.
struct CacheShape {
  int kv_heads, key_dim, value_dim;
};

struct StageInfo {
  std::string name, shape;
  int layer;             // -1 outside the layers
  int64_t weight_bytes;  // read for one token
  int64_t calls;
  double seconds;  // over all calls; 0 on Metal, where stages are not timed
};

// True where the default device has an executor: a CPU, or a GPU of Metal's or CUDA's.
bool has_executor();

class Decoder {
 public:
  // For the default device. On a CPU, exact: the bits of stock MLX on x86, for bfloat16 and float16
  // models; fp32_no_fma and fp32: activations in float32 from the embedding to the logits. On
  // Metal (emulated, never run on Apple hardware) activations are of the model's dtype; on CUDA
  // they are float32 where the matrices are of 4 bits in groups of 64. On both, accumulate is the
  // experts' weighted sum, and a step takes one row of each sequence. Refers to the model's arrays,
  // copies none. Throws std::invalid_argument naming the tensor or field that it cannot take.
  Decoder(const Model& model, Accumulate accumulate);
  ~Decoder();
  Decoder(Decoder&&) noexcept;

  // Logits [rows, vocab_size], of the activations' dtype: on a CPU the model's (exact) or float32.
  // One row's bits depend on no other row. Throws std::invalid_argument, before anything is
  // written, on a row or a cache that does not fit the model.
  //
  // tokens: [rows], in the place of the rows' own; on CUDA they may still be on their way, and the
  // step is enqueued behind them on MLX's default GPU stream. wait() ends when the steps so far
  // have.
  mx::array step(const std::vector<StepRow>& rows, std::vector<LayerCache>& caches,
                 const std::optional<mx::array>& tokens = {});
  // The token after each row's, [rows] uint32: sample_greedy of the step's logits. On CUDA both are
  // one launch, and the tokens can be given to the next call as they are: nothing but the GPU's
  // memory lies between one token and the next.
  mx::array greedy(const std::vector<StepRow>& rows, std::vector<LayerCache>& caches,
                   const std::optional<mx::array>& tokens = {});
  void wait();

  // On CUDA, after a step of as many rows: {calls, microseconds each} of each kernel on its own.
  std::map<std::string, std::pair<int, double>> kernel_times(int rows);

  const ModelConfig& config() const;
  mx::Dtype dtype() const;  // of the model's activations and of the caches
  CacheShape cache_shape() const;
  std::vector<StageInfo> stages() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moefuse
