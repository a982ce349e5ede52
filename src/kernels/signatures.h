// The signature of every kernel text, once for all devices. Each NAME_SIGNATURE lists the template
// parameters and the buffers in the order in which fast::metal_kernel takes them:
//   TYPE(name) INT(name) BOOL(name)            template parameters
//   IN(type, name, count) OUT(type, name, count)   buffers, and how many elements they hold
// Counts are arithmetic on the template parameters, `rows` (rows of the batch), `batches`,
// `sequences` and `capacity` (of a cache: sequences, and the slots that each has room for). Weights
// [E, N, K] hold N * K * BITS / 32 words an expert, scales and biases N * K / GROUP.
#pragma once

// clang-format off

#define AFFINE_IN(name, matrices, n, k)                          \
  IN(uint, name##weight, size_t(matrices) * (n) * (k) * BITS / 32) \
  IN(T, name##scales, size_t(matrices) * (n) * (k) / GROUP)      \
  IN(T, name##biases, size_t(matrices) * (n) * (k) / GROUP)

#define MOE_ROUTER_SOFTMAX_SIGNATURE \
  TYPE(T) INT(E) INT(K) BOOL(NORM) BOOL(LOGITS) \
  IN(T, logits, rows * E) \
  OUT(uint, indices, rows * K) OUT(T, weights, rows * K)

#define MOE_ROUTER_SIGMOID_SIGNATURE \
  TYPE(T) INT(E) INT(K) BOOL(NORM) \
  IN(T, logits, rows * E) IN(float, bias, E) IN(float, scaling, 1) \
  OUT(uint, indices, rows * K) OUT(float, weights, rows * K)

#define MOE_COMBINE_SIGNATURE \
  TYPE(T) INT(K) INT(D) INT(COMBINE) \
  IN(T, y, rows * K * D) IN(float, weights, rows * K) \
  OUT(T, out, rows * D)

// U: the dtype of hidden, T when the stages are rounded to T, else float.
#define MOE_EXPERTS_GATE_UP_SIGNATURE \
  TYPE(T) TYPE(U) INT(BITS) INT(GROUP) INT(E) INT(K) INT(H) INT(I) BOOL(STEPS) \
  IN(T, x, rows * H) IN(uint, indices, rows * K) AFFINE_IN(gate_, E, I, H) \
  AFFINE_IN(up_, E, I, H) \
  OUT(U, hidden, rows * K * I)

#define MOE_EXPERTS_DOWN_SIGNATURE \
  TYPE(T) TYPE(U) INT(BITS) INT(GROUP) INT(E) INT(K) INT(I) INT(D) INT(COMBINE) BOOL(STEPS) \
  IN(U, hidden, rows * K * I) IN(uint, indices, rows * K) IN(float, weights, rows * K) \
  AFFINE_IN(down_, E, D, I) \
  OUT(T, out, rows * D)

#define GATHER_QMM_SWIGLU_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(E) INT(MATRICES) INT(M) INT(H) INT(I) BOOL(STEPS) \
  IN(T, x, MATRICES * M * H) IN(uint, matrices, batches) IN(uint, experts, batches) \
  AFFINE_IN(gate_, E, I, H) AFFINE_IN(up_, E, I, H) \
  OUT(T, out, batches * M * I)

// x: rows STRIDE apart. Where NK or NV is 0, q's arrays stand in for the matrix that is not there.
#define NORM_QKV_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(H) INT(STRIDE) INT(NQ) INT(NK) INT(NV) \
  IN(T, x, rows * STRIDE) IN(T, norm_weight, H) IN(float, eps, 1) \
  AFFINE_IN(q_, 1, NQ, H) AFFINE_IN(k_, 1, NK ? NK : NQ, H) AFFINE_IN(v_, 1, NV ? NV : NQ, H) \
  OUT(T, out, rows*(NQ + NK + NV))

// places: for each row its sequence, the first slot it attends to, the newest's slot, and capacity.
// rope: (cos, sin) of the newest position for each pair, a row of its own for each row.
#define ATTENTION_GQA_SIGNATURE \
  TYPE(T) INT(HEADS) INT(KV_HEADS) INT(D) INT(SPLITS) \
  IN(T, qkv, rows*(HEADS + 2 * KV_HEADS) * D) IN(T, q_norm, D) IN(T, k_norm, D) \
  IN(float, eps, 1) IN(float, scale, 1) IN(float, rope, rows * D) IN(uint, places, rows * 4) \
  IN(T, k_cache, sequences * KV_HEADS * capacity * D) \
  IN(T, v_cache, sequences * KV_HEADS * capacity * D) \
  OUT(float, partial, rows * HEADS * SPLITS * D) OUT(float, stats, rows * HEADS * SPLITS * 2)

#define ATTENTION_OUT_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(HEADS) INT(D) INT(SPLITS) INT(ROWS) \
  IN(float, partial, rows * HEADS * SPLITS * D) IN(float, stats, rows * HEADS * SPLITS * 2) \
  AFFINE_IN(, 1, ROWS, HEADS * D) IN(T, residual, rows * ROWS) \
  OUT(T, out, rows * ROWS)

#define LINEAR_RESIDUAL_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(COLS) INT(ROWS) \
  IN(T, x, rows * COLS) AFFINE_IN(, 1, ROWS, COLS) IN(T, residual, rows * ROWS) \
  OUT(T, out, rows * ROWS)

// kv: rows KV_STRIDE apart, the latent at KV_OFFSET, the rotated part after it.
#define ATTENTION_MLA_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(HEADS) INT(NOPE) INT(ROPE) INT(LORA) INT(SPLITS) \
  INT(KV_STRIDE) INT(KV_OFFSET) \
  IN(T, q, rows * HEADS*(NOPE + ROPE)) IN(T, kv, rows * KV_STRIDE) IN(T, kv_norm, LORA) \
  IN(float, eps, 1) IN(float, scale, 1) IN(float, rope, rows * ROPE) IN(uint, places, rows * 4) \
  AFFINE_IN(embed_, HEADS, LORA, NOPE) IN(T, latent_cache, sequences * capacity * LORA) \
  IN(T, rope_cache, sequences * capacity * ROPE) \
  OUT(float, partial, rows * HEADS * SPLITS * LORA) OUT(float, stats, rows * HEADS * SPLITS * 2)

#define MLA_UNEMBED_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(HEADS) INT(LORA) INT(V) INT(SPLITS) \
  IN(float, partial, rows * HEADS * SPLITS * LORA) IN(float, stats, rows * HEADS * SPLITS * 2) \
  AFFINE_IN(, HEADS, V, LORA) \
  OUT(T, out, rows * HEADS * V)

#define NORM_GATE_UP_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(H) INT(I) \
  IN(T, x, rows * H) IN(T, norm_weight, H) IN(float, eps, 1) AFFINE_IN(gate_, 1, I, H) \
  AFFINE_IN(up_, 1, I, H) \
  OUT(T, hidden, rows * I)

// V rows; a token outside gives NaN.
#define EMBED_SIGNATURE \
  TYPE(T) TYPE(A) INT(BITS) INT(GROUP) INT(V) INT(H) \
  IN(uint, tokens, rows) AFFINE_IN(, 1, V, H) \
  OUT(A, out, rows * H)

#define NORM_ROUTER_SOFTMAX_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(H) INT(E) INT(K) BOOL(NORM) \
  IN(T, x, rows * H) IN(T, norm_weight, H) IN(float, eps, 1) AFFINE_IN(gate_, 1, E, H) \
  OUT(T, out, rows * H) OUT(uint, indices, rows * K) OUT(T, weights, rows * K)

#define NORM_ROUTER_SIGMOID_SIGNATURE \
  TYPE(T) INT(H) INT(E) INT(K) BOOL(NORM) \
  IN(T, x, rows * H) IN(T, norm_weight, H) IN(float, eps, 1) IN(T, gate, E * H) \
  IN(float, bias, E) IN(float, scaling, 1) \
  OUT(T, out, rows * H) OUT(uint, indices, rows * K) OUT(float, weights, rows * K)

#define MOE_EXPERTS_GATE_UP_SHARED_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(E) INT(K) INT(H) INT(I) \
  IN(T, x, rows * H) IN(uint, indices, rows * K) AFFINE_IN(gate_, E, I, H) \
  AFFINE_IN(up_, E, I, H) AFFINE_IN(shared_gate_, 1, I, H) AFFINE_IN(shared_up_, 1, I, H) \
  OUT(T, hidden, rows*(K + 1) * I)

// W: the dtype of the weights.
#define MOE_EXPERTS_DOWN_RESIDUAL_SIGNATURE \
  TYPE(T) TYPE(W) INT(BITS) INT(GROUP) INT(E) INT(K) INT(I) INT(D) INT(COMBINE) \
  IN(T, hidden, rows * K * I) IN(uint, indices, rows * K) IN(W, weights, rows * K) \
  AFFINE_IN(down_, E, D, I) IN(T, residual, rows * D) \
  OUT(T, out, rows * D)

#define MOE_EXPERTS_DOWN_SHARED_SIGNATURE \
  TYPE(T) INT(BITS) INT(GROUP) INT(E) INT(K) INT(I) INT(D) INT(COMBINE) \
  IN(T, hidden, rows*(K + 1) * I) IN(uint, indices, rows * K) IN(float, weights, rows * K) \
  AFFINE_IN(down_, E, D, I) AFFINE_IN(shared_down_, 1, D, I) IN(T, residual, rows * D) \
  OUT(T, out, rows * D)

// Every kernel text: KERNEL(stem, signature).
#define MOEFUSE_KERNELS(KERNEL) \
  KERNEL(attention_gqa, ATTENTION_GQA_SIGNATURE) \
  KERNEL(attention_mla, ATTENTION_MLA_SIGNATURE) \
  KERNEL(attention_out, ATTENTION_OUT_SIGNATURE) \
  KERNEL(embed, EMBED_SIGNATURE) \
  KERNEL(gather_qmm_swiglu, GATHER_QMM_SWIGLU_SIGNATURE) \
  KERNEL(linear_residual, LINEAR_RESIDUAL_SIGNATURE) \
  KERNEL(mla_unembed, MLA_UNEMBED_SIGNATURE) \
  KERNEL(moe_combine, MOE_COMBINE_SIGNATURE) \
  KERNEL(moe_experts_down, MOE_EXPERTS_DOWN_SIGNATURE) \
  KERNEL(moe_experts_down_residual, MOE_EXPERTS_DOWN_RESIDUAL_SIGNATURE) \
  KERNEL(moe_experts_down_shared, MOE_EXPERTS_DOWN_SHARED_SIGNATURE) \
  KERNEL(moe_experts_gate_up, MOE_EXPERTS_GATE_UP_SIGNATURE) \
  KERNEL(moe_experts_gate_up_shared, MOE_EXPERTS_GATE_UP_SHARED_SIGNATURE) \
  KERNEL(moe_router_sigmoid, MOE_ROUTER_SIGMOID_SIGNATURE) \
  KERNEL(moe_router_softmax, MOE_ROUTER_SOFTMAX_SIGNATURE) \
  KERNEL(norm_gate_up, NORM_GATE_UP_SIGNATURE) \
  KERNEL(norm_qkv, NORM_QKV_SIGNATURE) \
  KERNEL(norm_router_sigmoid, NORM_ROUTER_SIGMOID_SIGNATURE) \
  KERNEL(norm_router_softmax, NORM_ROUTER_SOFTMAX_SIGNATURE)
// clang-format on
