// The routed experts of a MoE block on CPU: gather, gate and up, SwiGLU, down, combine. And, on the
// same kernels, a linear layer for the many rows of a prompt.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace moefuse::cpu {

// One quantised matrix [rows, cols] for each of `experts` experts, one after the other.
struct ExpertStack {
  QuantizedMatrix first;
  int experts;
  QuantizedMatrix expert(int64_t e) const;
};

// exact: stock MLX's bits; otherwise the fp32 kernels with this kind of dot product.
struct Arithmetic {
  bool exact;
  Dot dot;
};

struct ExpertsArgs {
  ExpertStack gate, up, down;
  Arithmetic arithmetic;
  CombineSteps combine;
  Dtype dtype;              // of x and out
  const void* x;            // [rows, gate.cols]
  const uint32_t* indices;  // [rows, k], each below experts
  const float* weights;     // [rows, k]
  void* out;                // [rows, down.rows]
  int rows, k;
};
void moe_experts(const ExpertsArgs& args);

struct GatherSwigluArgs {
  ExpertStack gate, up;
  Arithmetic arithmetic;
  Dtype dtype;             // of x and out
  const void* x;           // [matrices, m, gate.cols]
  const uint32_t* matrix;  // [batches], which matrix of x
  const uint32_t* expert;  // [batches]
  void* out;               // [batches, m, gate.rows]
  int batches, m;
};
void gather_qmm_swiglu(const GatherSwigluArgs& args);

struct LinearArgs {
  QuantizedMatrix w;
  Arithmetic arithmetic;
  Dtype dtype;    // of x and out
  const void* x;  // [rows, w.cols]
  void* out;      // [rows, w.rows]
  int rows;
};
void prefill_linear(const LinearArgs& args);

}  // namespace moefuse::cpu
