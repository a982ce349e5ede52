// Kernel dialect for CUDA: one warp is one simdgroup.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using uint = unsigned int;
using bfloat16_t = __nv_bfloat16;
using float16_t = __half;

#define FUNC __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define SHARED_ARRAY(type, name, size)                                      \
  __shared__ alignas(16) unsigned char name##_bytes[(size) * sizeof(type)]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define group_x blockIdx.x
#define group_y blockIdx.y
#define group_z blockIdx.z
#define lane_id (threadIdx.x & 31u)
#define simd_id (threadIdx.x >> 5)
#define thread_id threadIdx.x

FUNC void group_barrier() {
  __syncthreads();
}

FUNC uint as_uint(float v) {
  return __float_as_uint(v);
}
FUNC float as_float(uint v) {
  return __uint_as_float(v);
}

FUNC uint shuffle(uint v, uint lane) {
  return __shfl_sync(~0u, v, lane);
}
FUNC float shuffle(float v, uint lane) {
  return __shfl_sync(~0u, v, lane);
}
FUNC uint shuffle_xor(uint v, uint mask) {
  return __shfl_xor_sync(~0u, v, mask);
}
FUNC float shuffle_xor(float v, uint mask) {
  return __shfl_xor_sync(~0u, v, mask);
}

FUNC float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
FUNC float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
FUNC float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
FUNC float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
FUNC float sqrt_rn(float a) {
  return __fsqrt_rn(a);
}
FUNC float round_even(float a) {
  return rintf(a);
}

template <int N>
struct alignas(4 * N) Words {
  uint w[N];
};
template <int N>
FUNC Words<N> load_words(const uint* p, uint at) {
  return *reinterpret_cast<const Words<N>*>(p + at);
}

// An input that the kernel updates in place (the KV cache).
template <typename T>
FUNC T* writable(const T* p) {
  return const_cast<T*>(p);
}
