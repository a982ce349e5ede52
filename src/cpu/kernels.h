// The CPU kernels behind the ops and the decode step, one table for each instruction set.
#pragma once

#include <cstdint>

namespace moefuse::cpu {

enum class Dtype : uint8_t { float32, float16, bfloat16 };

// A matrix W [rows, cols] in MLX's affine layout: W[n, k] = scales[n, g] * q[n, k] + biases[n, g]
// with g = k / group_size. Row n is cols * bits / 32 words; value i of a word sits at bit i * bits.
struct QuantizedMatrix {
  const uint32_t* weight;
  const void* scales;
  const void* biases;
  Dtype dtype;  // of scales and biases
  int rows, cols;
  int group_size, bits;
};

struct Kernels {
  const char* isa;

  // y[row_begin, row_end) = W x as stock MLX's x86 CPU computes it: every product and every sum
  // rounded to W.dtype, k ascending. x [cols] and y [rows] are of W.dtype. bits is 2, 4 or 8.
  void (*exact_qmv)(const QuantizedMatrix& w, const void* x, void* y, int row_begin, int row_end);
};

// The table for the best instruction set that this processor has; MOEFUSE_ISA names another one
// (plain, avx2, avx512, neon). Throws std::invalid_argument on a name that is not available.
const Kernels& kernels();

// Threads used by the ops: MOEFUSE_NUM_THREADS, else OpenMP's own choice.
int num_threads();

}  // namespace moefuse::cpu
