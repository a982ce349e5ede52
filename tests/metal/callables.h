// Every kernel text as a callable: `Kernel<Params>` has one pointer for each buffer of its
// signature, and calling it runs one thread. Params holds the template parameters as members. Who
// includes this has included a dialect and defines IN and OUT (a buffer each) and DEVICE_FUNCTION.
#pragma once

#include "lanes.h"
#include "norm.h"
// The texts above come first: the others build on them and include nothing themselves.
#include "affine.h"
#include "attention.h"
#include "moe_combine.h"
#include "moe_experts.h"
#include "moe_router.h"
#include "signatures.h"

#define TYPE(name) using name = typename Params::name;
#define INT(name) static constexpr int name = Params::name;
#define BOOL(name) static constexpr bool name = Params::name;

namespace kernels {

#define KERNEL_BEGIN(name, signature) \
  template <class Params>             \
  struct name {                       \
    signature DEVICE_FUNCTION void operator()() const {
#define KERNEL_END \
  }                \
  }                \
  ;

KERNEL_BEGIN(attention_gqa, ATTENTION_GQA_SIGNATURE)
#include "attention_gqa.body"
KERNEL_END
KERNEL_BEGIN(attention_mla, ATTENTION_MLA_SIGNATURE)
#include "attention_mla.body"
KERNEL_END
KERNEL_BEGIN(attention_out, ATTENTION_OUT_SIGNATURE)
#include "attention_out.body"
KERNEL_END
KERNEL_BEGIN(embed, EMBED_SIGNATURE)
#include "embed.body"
KERNEL_END
KERNEL_BEGIN(gather_qmm_swiglu, GATHER_QMM_SWIGLU_SIGNATURE)
#include "gather_qmm_swiglu.body"
KERNEL_END
KERNEL_BEGIN(linear_residual, LINEAR_RESIDUAL_SIGNATURE)
#include "linear_residual.body"
KERNEL_END
KERNEL_BEGIN(mla_unembed, MLA_UNEMBED_SIGNATURE)
#include "mla_unembed.body"
KERNEL_END
KERNEL_BEGIN(moe_combine, MOE_COMBINE_SIGNATURE)
#include "moe_combine.body"
KERNEL_END
KERNEL_BEGIN(moe_experts_down, MOE_EXPERTS_DOWN_SIGNATURE)
#include "moe_experts_down.body"
KERNEL_END
KERNEL_BEGIN(moe_experts_down_residual, MOE_EXPERTS_DOWN_RESIDUAL_SIGNATURE)
#include "moe_experts_down_residual.body"
KERNEL_END
KERNEL_BEGIN(moe_experts_down_shared, MOE_EXPERTS_DOWN_SHARED_SIGNATURE)
#include "moe_experts_down_shared.body"
KERNEL_END
KERNEL_BEGIN(moe_experts_gate_up, MOE_EXPERTS_GATE_UP_SIGNATURE)
#include "moe_experts_gate_up.body"
KERNEL_END
KERNEL_BEGIN(moe_experts_gate_up_shared, MOE_EXPERTS_GATE_UP_SHARED_SIGNATURE)
#include "moe_experts_gate_up_shared.body"
KERNEL_END
KERNEL_BEGIN(moe_router_sigmoid, MOE_ROUTER_SIGMOID_SIGNATURE)
#include "moe_router_sigmoid.body"
KERNEL_END
KERNEL_BEGIN(moe_router_softmax, MOE_ROUTER_SOFTMAX_SIGNATURE)
#include "moe_router_softmax.body"
KERNEL_END
KERNEL_BEGIN(norm_gate_up, NORM_GATE_UP_SIGNATURE)
#include "norm_gate_up.body"
KERNEL_END
KERNEL_BEGIN(norm_qkv, NORM_QKV_SIGNATURE)
#include "norm_qkv.body"
KERNEL_END
KERNEL_BEGIN(norm_router_sigmoid, NORM_ROUTER_SIGMOID_SIGNATURE)
#include "norm_router_sigmoid.body"
KERNEL_END
KERNEL_BEGIN(norm_router_softmax, NORM_ROUTER_SOFTMAX_SIGNATURE)
#include "norm_router_softmax.body"
KERNEL_END

#undef KERNEL_BEGIN
#undef KERNEL_END
#undef TYPE
#undef INT
#undef BOOL

}  // namespace kernels
