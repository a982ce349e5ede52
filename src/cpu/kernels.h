// The CPU kernels behind the ops and the decode step, one table for each instruction set.
#pragma once

#include <cstdint>

namespace moefuse::cpu {

enum class Dtype : uint8_t { float32, float16, bfloat16 };
// Bytes of an element. Of this file's own in each of its users: they are compiled for different
// instruction sets.
[[maybe_unused]] static constexpr int itemsize(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

// What the codes q and the scales of a matrix W [rows, cols] stand for, with g = k / group_size.
enum class Format : uint8_t {
  affine,  // W[n, k] = scales[n, g] * q[n, k] + biases[n, g]
  mxfp4,   // 2^(scales[n, g] - 127) * e2m1(q[n, k]): groups of 32, a byte a scale
  nvfp4    // e4m3(scales[n, g]) * e2m1(q[n, k]): groups of 16, a byte a scale
};

// As MLX lays it out: row n is cols * bits / 32 words; code i of a word sits at bit i * bits.
struct QuantizedMatrix {
  const uint32_t* weight;
  const void* scales;
  const void* biases;  // null unless affine
  Dtype dtype;         // of the activations beside it, and of affine scales and biases
  int rows, cols;
  int group_size, bits;
  Format format = Format::affine;
};

// What will be read next: qmv asks for its first kilobytes while it reads its own last rows. With
// no weight, it asks for the rows that follow its last.
struct Ahead {
  const void *weight = nullptr, *scales = nullptr, *biases = nullptr;
};

// How an fp32 mode multiplies. grid: activations on a 15-bit integer grid for each group, exact
// integer dots (for bfloat16 and float16 models). fma, separate: fp32 activations, products fused
// or rounded apart (for float32 models). src/cpu/grid.inl has the error bounds.
enum class Dot : uint8_t { grid, fma, separate };

enum class CombineSteps : uint8_t {
  dtype,        // products rounded to y's dtype, summed in fp32, one cast: stock's bits
  fp32_no_fma,  // product and sum rounded to fp32, one cast at the end
  fp32          // fused multiply-add in fp32, one cast at the end
};

struct CombineArgs {
  const void* const* y;  // k rows, one for each expert
  const float* weights;  // [k]
  void* out;
  Dtype y_dtype, out_dtype;
  CombineSteps steps;
  int k;
};

// Rows [rows, dim], `stride` elements from one to the next.
struct RowsArgs {
  const void* data;
  Dtype dtype;
  int64_t stride;
  int rows, dim;
};

struct Kernels {
  const char* isa;

  // y[row_begin, row_end) = W x as stock MLX's x86 CPU computes it: every product and every sum
  // rounded to W.dtype, k ascending. x [cols] and y [rows] are of W.dtype.
  void (*exact_qmv)(const QuantizedMatrix& w, const void* x, void* y, int row_begin, int row_end);

  // out = silu(gate) * up over n values of dtype, in stock MLX's steps of dtype. May be in place.
  void (*exact_swiglu)(Dtype dtype, const void* gate, const void* up, void* out, int n);

  // out[d] = sum over i < k of y[i][d] * weights[i], i ascending, for d in [begin, end).
  void (*combine)(const CombineArgs& args, int begin, int end);

  // Bytes of one activation vector as qmv wants it, a multiple of 64. bits is 4 or 8.
  int64_t (*prepared_bytes)(Dot dot, int cols, int group_size, int bits);
  // Lays x [cols] of any dtype out for qmv with matrices of that group_size and bits.
  void (*prepare)(Dot dot, const void* x, Dtype dtype, int cols, int group_size, int bits,
                  void* prepared);
  // y[v * y_stride + n] = (W x_v)[n] in fp32 for n in [row_begin, row_end) and v in [0, vectors),
  // one pass over the weights. x: `vectors` prepared vectors, one after the other. The bits depend
  // on nothing but W's row and x_v: not on the instruction set, the row range or the neighbours.
  void (*qmv)(Dot dot, const QuantizedMatrix& w, const void* x, int vectors, float* y,
              int64_t y_stride, int row_begin, int row_end, const Ahead& next);
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i] in fp32, within 4 units in the last place.
  // out may be gate or up.
  void (*swiglu)(const float* gate, const float* up, float* out, int n);

  // The rest serves the decode step; src/cpu/attention.inl has the error bounds.
  // out[h * out_stride + j] = q [heads, dim] of head h . row j. exact: k ascending, product and sum
  // rounded apart in fp32, as stock MLX multiplies halves; otherwise fused, in lanes.
  void (*dots)(bool exact, const RowsArgs& rows, const float* q, int heads, float* out,
               int64_t out_stride);
  // out[h, d] = sum over j of weights[h * weights_stride + j] * row j [d], j ascending; exact:
  // nothing fused.
  void (*weighted_sum)(bool exact, const RowsArgs& rows, const float* weights, int heads,
                       int64_t weights_stride, float* out);
  // *top = the largest score, scores[j] = exp(scores[j] - *top); returns their sum.
  float (*exponentials)(float* scores, int n, float* top);
  // out = x / sqrt(mean(x^2) + eps) * weight over n values. out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);

  // Loads all but the last bytes % 256; the result only keeps the loads alive.
  uint32_t (*read)(const void* data, int64_t bytes);
};

// The table for the best instruction set that this processor has; MOEFUSE_ISA names another one
// (plain, avx2, avx512, neon). Throws std::invalid_argument on a name that is not available.
const Kernels& kernels();

// Threads used by the ops: MOEFUSE_NUM_THREADS, else one for each processor of the process.
int num_threads();

// Throws what the two above would: called before there are threads or a stream to throw in.
void check_settings();

}  // namespace moefuse::cpu
