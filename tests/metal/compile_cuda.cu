// Every kernel text with the CUDA dialect, at the geometry of Qwen3-30B-A3B and GLM-4.7-Flash:
//   nvcc -std=c++20 -arch=sm_90 -I src/kernels -Xptxas -v -c tests/metal/compile_cuda.cu
// It shows that the texts compile there and what they need of registers; nothing runs them.
#include "affine.h"
#include "attention.h"
#include "dialect_cuda.h"
#include "lanes.h"
#include "moe_combine.h"
#include "moe_experts.h"
#include "moe_router.h"
#include "norm.h"
#include "signatures.h"
#define TYPE(name) using name = typename Params::name;
#define INT(name) static constexpr int name = Params::name;
#define BOOL(name) static constexpr bool name = Params::name;
#define IN(type, name, count) const type* name;
#define OUT(type, name, count) type* name;
template <class Params>
struct attention_gqa {
  ATTENTION_GQA_SIGNATURE __device__ void operator()() const {
#include "attention_gqa.body"
  }
};
template <class Params>
struct attention_mla {
  ATTENTION_MLA_SIGNATURE __device__ void operator()() const {
#include "attention_mla.body"
  }
};
template <class Params>
struct attention_out {
  ATTENTION_OUT_SIGNATURE __device__ void operator()() const {
#include "attention_out.body"
  }
};
template <class Params>
struct gather_qmm_swiglu {
  GATHER_QMM_SWIGLU_SIGNATURE __device__ void operator()() const {
#include "gather_qmm_swiglu.body"
  }
};
template <class Params>
struct linear_residual {
  LINEAR_RESIDUAL_SIGNATURE __device__ void operator()() const {
#include "linear_residual.body"
  }
};
template <class Params>
struct mla_unembed {
  MLA_UNEMBED_SIGNATURE __device__ void operator()() const {
#include "mla_unembed.body"
  }
};
template <class Params>
struct moe_combine {
  MOE_COMBINE_SIGNATURE __device__ void operator()() const {
#include "moe_combine.body"
  }
};
template <class Params>
struct moe_experts_down {
  MOE_EXPERTS_DOWN_SIGNATURE __device__ void operator()() const {
#include "moe_experts_down.body"
  }
};
template <class Params>
struct moe_experts_down_residual {
  MOE_EXPERTS_DOWN_RESIDUAL_SIGNATURE __device__ void operator()() const {
#include "moe_experts_down_residual.body"
  }
};
template <class Params>
struct moe_experts_down_shared {
  MOE_EXPERTS_DOWN_SHARED_SIGNATURE __device__ void operator()() const {
#include "moe_experts_down_shared.body"
  }
};
template <class Params>
struct moe_experts_gate_up {
  MOE_EXPERTS_GATE_UP_SIGNATURE __device__ void operator()() const {
#include "moe_experts_gate_up.body"
  }
};
template <class Params>
struct moe_experts_gate_up_shared {
  MOE_EXPERTS_GATE_UP_SHARED_SIGNATURE __device__ void operator()() const {
#include "moe_experts_gate_up_shared.body"
  }
};
template <class Params>
struct moe_router_sigmoid {
  MOE_ROUTER_SIGMOID_SIGNATURE __device__ void operator()() const {
#include "moe_router_sigmoid.body"
  }
};
template <class Params>
struct moe_router_softmax {
  MOE_ROUTER_SOFTMAX_SIGNATURE __device__ void operator()() const {
#include "moe_router_softmax.body"
  }
};
template <class Params>
struct norm_qkv {
  NORM_QKV_SIGNATURE __device__ void operator()() const {
#include "norm_qkv.body"
  }
};
template <class Params>
struct norm_router_sigmoid {
  NORM_ROUTER_SIGMOID_SIGNATURE __device__ void operator()() const {
#include "norm_router_sigmoid.body"
  }
};
template <class Params>
struct norm_router_softmax {
  NORM_ROUTER_SOFTMAX_SIGNATURE __device__ void operator()() const {
#include "norm_router_softmax.body"
  }
};
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
template __global__ void run(attention_gqa<P>);
template __global__ void run(attention_mla<P>);
template __global__ void run(attention_out<P>);
template __global__ void run(gather_qmm_swiglu<P>);
template __global__ void run(linear_residual<P>);
template __global__ void run(mla_unembed<P>);
template __global__ void run(moe_combine<P>);
template __global__ void run(moe_experts_down<P>);
template __global__ void run(moe_experts_down_residual<P>);
template __global__ void run(moe_experts_down_shared<P>);
template __global__ void run(moe_experts_gate_up<P>);
template __global__ void run(moe_experts_gate_up_shared<P>);
template __global__ void run(moe_router_sigmoid<P>);
template __global__ void run(moe_router_softmax<P>);
template __global__ void run(norm_qkv<P>);
template __global__ void run(norm_router_sigmoid<P>);
template __global__ void run(norm_router_softmax<P>);
