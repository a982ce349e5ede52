#include "metal/kernel_table.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/kernels/tensor_signatures.h"
#include "kernels/signatures.h"
#include "metal/kernel_texts.h"

namespace moefuse::metal {

namespace {

// The helpers that a text is built on, in order.
const std::string kMath = text::lanes_h;
const std::string kRouter = kMath + text::moe_router_h;
const std::string kCombine = kMath + text::moe_combine_h;
const std::string kAffine = kMath + text::affine_h;
const std::string kExperts = kAffine + text::moe_experts_h;
const std::string kSampling =  // and folding
    kExperts + text::moe_router_h + text::tensor_dialect_h + text::sample_h;
const std::string kDown = kExperts + text::moe_combine_h;
const std::string kNorm = kMath + text::norm_h;
const std::string kNormAffine = kNorm + text::affine_h + text::moe_experts_h;
const std::string kNormRouter = kNorm + text::affine_h + text::moe_router_h;
const std::string kAttention = kNorm + text::attention_h;
const std::string kAttentionAffine = kAttention + text::affine_h + text::moe_experts_h;

#define TYPE(name) k.template_names.push_back(#name);
#define INT(name) TYPE(name)
#define BOOL(name) TYPE(name)
#define IN(type, name, count) k.input_names.push_back(#name);
#define OUT(type, name, count) k.output_names.push_back(#name);
#define KERNEL(stem, signature, helpers)                                    \
  {                                                                         \
    KernelText k;                                                           \
    k.name = "moefuse_" #stem;                                              \
    k.metal_header = text::dialect_metal_h + (helpers);                     \
    k.metal_body = std::string(text::prologue_metal_h) + text::stem##_body; \
    k.cuda_header = text::dialect_cuda_h + (helpers);                       \
    k.cuda_body = text::stem##_body;                                        \
    signature table.push_back(k);                                           \
  }

std::vector<KernelText> build_table() {
  std::vector<KernelText> table;
  KERNEL(moe_router_softmax, MOE_ROUTER_SOFTMAX_SIGNATURE, kRouter)
  KERNEL(moe_router_sigmoid, MOE_ROUTER_SIGMOID_SIGNATURE, kRouter)
  KERNEL(moe_combine, MOE_COMBINE_SIGNATURE, kCombine)
  KERNEL(moe_experts_gate_up, MOE_EXPERTS_GATE_UP_SIGNATURE, kExperts)
  KERNEL(moe_experts_down, MOE_EXPERTS_DOWN_SIGNATURE, kDown)
  KERNEL(embed, EMBED_SIGNATURE, kMath)
  KERNEL(norm_gate_up, NORM_GATE_UP_SIGNATURE, kNormAffine)
  KERNEL(gather_qmm_swiglu, GATHER_QMM_SWIGLU_SIGNATURE, kExperts)
  KERNEL(norm_qkv, NORM_QKV_SIGNATURE, kNormAffine)
  KERNEL(attention_gqa, ATTENTION_GQA_SIGNATURE, kAttention)
  KERNEL(attention_out, ATTENTION_OUT_SIGNATURE, kAttentionAffine)
  KERNEL(linear_residual, LINEAR_RESIDUAL_SIGNATURE, kAffine)
  KERNEL(attention_mla, ATTENTION_MLA_SIGNATURE, kAttentionAffine)
  KERNEL(mla_unembed, MLA_UNEMBED_SIGNATURE, kAttentionAffine)
  KERNEL(norm_router_softmax, NORM_ROUTER_SOFTMAX_SIGNATURE, kNormRouter)
  KERNEL(norm_router_sigmoid, NORM_ROUTER_SIGMOID_SIGNATURE, kNormRouter)
  KERNEL(moe_experts_gate_up_shared, MOE_EXPERTS_GATE_UP_SHARED_SIGNATURE, kExperts)
  KERNEL(moe_experts_down_residual, MOE_EXPERTS_DOWN_RESIDUAL_SIGNATURE, kDown)
  KERNEL(moe_experts_down_shared, MOE_EXPERTS_DOWN_SHARED_SIGNATURE, kDown)
#define CUDA_KERNEL(stem, signature)                                 \
  {                                                                  \
    KernelText k;                                                    \
    k.name = "moefuse_" #stem;                                       \
    k.cuda_header = text::dialect_cuda_h + kSampling;                \
    k.cuda_body = text::stem##_body;                                 \
    if (k.name.starts_with("moefuse_cluster")) k.cluster = kCluster; \
    signature table.push_back(k);                                    \
  }
  MOEFUSE_GRID_KERNELS(CUDA_KERNEL)
  MOEFUSE_CLUSTER_KERNELS(CUDA_KERNEL)
  return table;
}

const std::vector<KernelText>& table() {
  static const std::vector<KernelText> kernels = build_table();
  return kernels;
}

}  // namespace

const KernelText& kernel_text(const std::string& name) {
  auto found = std::find_if(table().begin(), table().end(),
                            [&](const KernelText& k) { return k.name == "moefuse_" + name; });
  if (found == table().end()) {
    throw std::invalid_argument("[metal] kernel: expected a name of the table, got '" + name + "'");
  }
  return *found;
}

std::string cuda_header() {
  return std::string(text::dialect_cuda_h) + text::lanes_h + text::norm_h + text::attention_h +
         text::affine_h + text::moe_combine_h + text::moe_experts_h + text::moe_router_h +
         text::tensor_dialect_h + text::grid_h + text::route_h + text::select_h +
         text::stretches_h + text::attend_h + text::attend_grouped_h + text::warpgroup_h +
         text::attend_latent_h + text::sample_h + text::head_h;
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& k : table())
    if (!k.metal_body.empty()) names.push_back(k.name.substr(sizeof("moefuse_") - 1));
  return names;
}

}  // namespace moefuse::metal
