// Every kernel text with the CUDA dialect, at the geometries of Qwen3-30B-A3B and GLM-4.7-Flash:
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
struct Qwen {
  using T = __nv_bfloat16;
  using A = T;
  using U = T;
  using W = T;
  enum { BITS = 4, GROUP = 64, SPLITS = 8, COMBINE = 0, M = 1, MATRICES = 1 };
  enum { E = 128, K = 8, H = 2048, I = 768, D = 128, HEADS = 32, KV_HEADS = 4 };
  enum { NQ = 4096, NK = 512, NV = 512, STRIDE = 2048, ROWS = 2048, COLS = 4096, V = 151936 };
  static constexpr bool NORM = true, LOGITS = false, STEPS = true;
};
// The down kernels call the hidden size D.
struct QwenDown : Qwen {
  enum { D = 2048 };
};
struct Glm {
  using T = __nv_bfloat16;
  using A = T;
  using U = T;
  enum { BITS = 4, GROUP = 64, SPLITS = 8, COMBINE = 1 };
  enum { E = 64, K = 4, H = 2048, I = 1536, D = 2048, HEADS = 20 };
  enum { NQ = 768, NK = 576, NV = 0, STRIDE = 2048, ROWS = 2048, COLS = 5120, V = 256 };
  enum { NOPE = 192, ROPE = 64, LORA = 512, KV_STRIDE = 1344, KV_OFFSET = 768 };
  static constexpr bool NORM = true, LOGITS = false, STEPS = true;
};
struct GlmDense : Glm {
  enum { I = 10240, COLS = 10240 };
};

#define COUNT(name, signature) +1
static_assert(MOEFUSE_KERNELS(COUNT) == 19, "another text: list it below");

#define KERNEL(geometry, name) template __global__ void run(kernels::name<geometry>);
KERNEL(Qwen, embed)
KERNEL(Qwen, norm_qkv)
KERNEL(Qwen, attention_gqa)
KERNEL(Qwen, attention_out)
KERNEL(Qwen, norm_router_softmax)
KERNEL(Qwen, moe_router_softmax)
KERNEL(Qwen, moe_experts_gate_up)
KERNEL(Qwen, gather_qmm_swiglu)
KERNEL(QwenDown, moe_experts_down)
KERNEL(QwenDown, moe_experts_down_residual)
KERNEL(QwenDown, moe_combine)
KERNEL(Glm, norm_qkv)
KERNEL(Glm, attention_mla)
KERNEL(Glm, mla_unembed)
KERNEL(Glm, linear_residual)
KERNEL(GlmDense, norm_gate_up)
KERNEL(GlmDense, linear_residual)
KERNEL(Glm, norm_router_sigmoid)
KERNEL(Glm, moe_router_sigmoid)
KERNEL(Glm, moe_experts_gate_up_shared)
KERNEL(Glm, moe_experts_down_shared)
