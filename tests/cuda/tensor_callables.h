// As callables.h, for the texts in cuda/kernels.
#pragma once

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

KERNEL_BEGIN(fold_router, FOLD_ROUTER_SIGNATURE)
#include "fold_router.body"
KERNEL_END
KERNEL_BEGIN(grid_attention_out, GRID_ATTENTION_OUT_SIGNATURE)
#include "grid_attention_out.body"
KERNEL_END
KERNEL_BEGIN(grid_down, GRID_DOWN_SIGNATURE)
#include "grid_down.body"
KERNEL_END
KERNEL_BEGIN(grid_gate_up, GRID_GATE_UP_SIGNATURE)
#include "grid_gate_up.body"
KERNEL_END
KERNEL_BEGIN(grid_gate_up_dense, GRID_GATE_UP_DENSE_SIGNATURE)
#include "grid_gate_up_dense.body"
KERNEL_END
KERNEL_BEGIN(grid_head, GRID_HEAD_SIGNATURE)
#include "grid_head.body"
KERNEL_END
KERNEL_BEGIN(grid_head_greedy, GRID_HEAD_GREEDY_SIGNATURE)
#include "grid_head_greedy.body"
KERNEL_END
KERNEL_BEGIN(grid_heads, GRID_HEADS_SIGNATURE)
#include "grid_heads.body"
KERNEL_END
KERNEL_BEGIN(grid_linear_residual, GRID_LINEAR_RESIDUAL_SIGNATURE)
#include "grid_linear_residual.body"
KERNEL_END
KERNEL_BEGIN(grid_project, GRID_PROJECT_SIGNATURE)
#include "grid_project.body"
KERNEL_END
KERNEL_BEGIN(grid_unembed, GRID_UNEMBED_SIGNATURE)
#include "grid_unembed.body"
KERNEL_END
KERNEL_BEGIN(sample_greedy, SAMPLE_GREEDY_SIGNATURE)
#include "sample_greedy.body"
KERNEL_END
KERNEL_BEGIN(sample_greedy_parts, SAMPLE_GREEDY_PARTS_SIGNATURE)
#include "sample_greedy_parts.body"
KERNEL_END
KERNEL_BEGIN(cluster_attention_gqa, CLUSTER_ATTENTION_GQA_SIGNATURE)
#include "cluster_attention_gqa.body"
KERNEL_END
KERNEL_BEGIN(cluster_attention_mla, CLUSTER_ATTENTION_MLA_SIGNATURE)
#include "cluster_attention_mla.body"
KERNEL_END

#undef KERNEL_BEGIN
#undef KERNEL_END
#undef TYPE
#undef INT
#undef BOOL

}  // namespace kernels
