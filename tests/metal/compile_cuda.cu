// Every kernel text with the CUDA dialect, at the geometry of Qwen3-30B-A3B and GLM-4.7-Flash:
//   nvcc -std=c++20 -arch=sm_90 -I src/kernels -Xptxas -v -c tests/metal/compile_cuda.cu
// It shows that the texts compile there and what they need of registers; nothing runs them.
#include "dialect_cuda.h"

#define DEVICE_FUNCTION __device__
#define IN(type, name, count) const type* name;
#define OUT(type, name, count) type* name;
#include "callables.h"

template <class K>
__global__ void run(K k) {
  k();
}
struct P {
  using T = __nv_bfloat16;
  using U = T;
  using W = T;
  enum {
    BITS = 4,
    GROUP = 64,
    E = 128,
    K = 8,
    H = 2048,
    I = 768,
    D = 128,
    COMBINE = 0,
    HEADS = 32,
    KV_HEADS = 4,
    SPLITS = 4,
    ROWS = 2048,
    NQ = 4096,
    NK = 512,
    NV = 512,
    STRIDE = 2048,
    COLS = 4096,
    NOPE = 192,
    ROPE = 64,
    LORA = 512,
    V = 256,
    KV_STRIDE = 1344,
    KV_OFFSET = 768,
    M = 1,
    MATRICES = 1
  };
  static constexpr bool NORM = true, LOGITS = false, STEPS = true;
};

#define INSTANTIATE(name, signature) template __global__ void run(kernels::name<P>);
MOEFUSE_KERNELS(INSTANTIATE)
