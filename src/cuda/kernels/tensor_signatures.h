// The signatures of the kernel texts that only CUDA has, as in kernels/signatures.h. The matrices
// are of 4 bits in groups of 64; GRID_IN is an affine matrix of them. T is the weights' and the
// caches' type; what one kernel hands to the next is fp32.
#pragma once

// clang-format off

#define GRID_IN(name, matrices, n, k)                          \
  IN(uint, name##weight, size_t(matrices) * (n) * (k) / 8)     \
  IN(T, name##scales, size_t(matrices) * (n) * (k) / 64)       \
  IN(T, name##biases, size_t(matrices) * (n) * (k) / 64)

#define GRID_PROJECT_SIGNATURE \
  TYPE(T) INT(ROWS) INT(WARPS) INT(TILES) INT(H) INT(STRIDE) INT(NQ) INT(NK) INT(NV) \
  IN(float, x, ROWS * STRIDE) IN(T, norm_weight, H) IN(float, eps, 16) \
  GRID_IN(q_, 1, NQ, H) GRID_IN(k_, 1, NK ? NK : NQ, H) GRID_IN(v_, 1, NV ? NV : NQ, H) \
  OUT(float, out, ROWS * (NQ + NK + NV))

#define GRID_HEAD_SIGNATURE \
  TYPE(T) INT(ROWS) INT(DEPTH) INT(H) INT(N) \
  IN(float, x, ROWS * H) IN(T, norm_weight, H) IN(float, eps, 16) GRID_IN(, 1, N, H) \
  OUT(float, out, ROWS * N)

// BLOCKS: of the grid.
#define GRID_HEAD_GREEDY_SIGNATURE \
  TYPE(T) INT(ROWS) INT(DEPTH) INT(H) INT(N) INT(BLOCKS) \
  IN(float, x, ROWS * H) IN(T, norm_weight, H) IN(float, eps, 16) GRID_IN(, 1, N, H) \
  OUT(uint, tops, ROWS * BLOCKS) OUT(uint, places, ROWS * BLOCKS)

// router: [E, columns + N] as fold_router makes it, something else where E is 0. logits lack the
// norm's scale, whose parts are in squares.
#define GRID_LINEAR_RESIDUAL_SIGNATURE \
  TYPE(T) INT(ROWS) INT(WARPS) INT(COLS) INT(N) INT(E) \
  IN(float, x, rows * COLS) GRID_IN(, 1, N, COLS) IN(float, router, E ? E * (COLS + N) : 16) \
  IN(float, residual, rows * N) \
  OUT(float, out, rows * N) OUT(float, logits, E ? rows * E : 1) \
  OUT(float, squares, E ? rows * square_parts(N) : 1)

#define GRID_HEADS_SIGNATURE \
  TYPE(T) INT(TILES) INT(HEADS) INT(X_HEAD) INT(PART) INT(N) \
  IN(float, x, rows * HEADS * X_HEAD) GRID_IN(, HEADS, N, PART) \
  OUT(T, out, rows * HEADS * N)

// bias: of the sigmoid router only, as scaling below. Without a shared expert gate and up stand in.
#define GRID_GATE_UP_SIGNATURE \
  TYPE(T) INT(TILES) INT(DEPTH) INT(E) INT(K) INT(H) INT(I) BOOL(SOFTMAX) BOOL(SHARED) \
  IN(float, x, rows * H) IN(T, norm_weight, H) IN(float, eps, 16) \
  IN(float, logits, rows * E) IN(float, squares, rows * square_parts(H)) \
  IN(float, bias, SOFTMAX ? 16 : E) \
  GRID_IN(gate_, E, I, H) GRID_IN(up_, E, I, H) \
  GRID_IN(shared_gate_, SHARED ? 1 : E, I, H) GRID_IN(shared_up_, SHARED ? 1 : E, I, H) \
  OUT(float, hidden, rows * (K + (SHARED ? 1 : 0)) * I)

#define GRID_DOWN_SIGNATURE \
  TYPE(T) INT(TILES) INT(WARPS) INT(DEPTH) INT(E) INT(K) INT(I) INT(D) INT(COMBINE) BOOL(NORM) \
  BOOL(SOFTMAX) BOOL(SHARED) \
  IN(float, hidden, rows * (K + (SHARED ? 1 : 0)) * I) IN(float, logits, rows * E) \
  IN(float, squares, rows * square_parts(D)) IN(float, eps, 16) \
  IN(float, bias, SOFTMAX ? 16 : E) IN(float, scaling, 16) GRID_IN(down_, E, D, I) \
  GRID_IN(shared_down_, SHARED ? 1 : E, D, I) IN(float, residual, rows * D) \
  OUT(float, out, rows * D)

#define GRID_GATE_UP_DENSE_SIGNATURE \
  TYPE(T) INT(ROWS) INT(H) INT(I) \
  IN(float, x, ROWS * H) IN(T, norm_weight, H) IN(float, eps, 16) GRID_IN(gate_, 1, I, H) \
  GRID_IN(up_, 1, I, H) \
  OUT(float, hidden, ROWS * I)

#define GRID_ATTENTION_OUT_SIGNATURE \
  TYPE(T) INT(ROWS) INT(WARPS) INT(HEADS) INT(D) INT(SPLITS) INT(N) INT(E) \
  IN(float, partial, ROWS * HEADS * SPLITS * D) IN(float, stats, ROWS * HEADS * SPLITS * 2) \
  IN(uint, places, ROWS * 4) GRID_IN(, 1, N, HEADS * D) \
  IN(float, router, E ? E * (HEADS * D + N) : 16) IN(float, residual, ROWS * N) \
  OUT(float, out, ROWS * N) OUT(float, logits, E ? ROWS * E : 1) \
  OUT(float, squares, E ? ROWS * square_parts(N) : 1)

#define FOLD_ROUTER_SIGNATURE \
  TYPE(T) INT(E) INT(H) INT(K) \
  IN(float, gate, E * H) IN(T, norm_weight, H) GRID_IN(, 1, H, K) \
  OUT(float, out, E * (K + H))

#define GRID_UNEMBED_SIGNATURE \
  TYPE(T) INT(TILES) INT(HEADS) INT(LORA) INT(V) INT(SPLITS) \
  IN(float, partial, rows * HEADS * SPLITS * LORA) IN(float, stats, rows * HEADS * SPLITS * 2) \
  IN(uint, places, rows * 4) GRID_IN(, HEADS, V, LORA) \
  OUT(float, out, rows * HEADS * V)

#define CLUSTER_ATTENTION_GQA_SIGNATURE \
  TYPE(T) INT(WARPS) INT(HEADS) INT(KV_HEADS) INT(D) INT(SPLITS) \
  IN(float, qkv, rows * (HEADS + 2 * KV_HEADS) * D) IN(T, q_norm, D) IN(T, k_norm, D) \
  IN(float, eps, 16) IN(float, scale, 16) IN(float, rope, rows * D) IN(uint, places, rows * 4) \
  IN(T, k_cache, sequences * KV_HEADS * capacity * D) \
  IN(T, v_cache, sequences * KV_HEADS * capacity * D) \
  OUT(float, partial, rows * HEADS * SPLITS * D) OUT(float, stats, rows * HEADS * SPLITS * 2)

#define CLUSTER_ATTENTION_MLA_SIGNATURE \
  TYPE(T) INT(N) INT(HEADS) INT(NOPE) INT(ROPE) INT(LORA) INT(SPLITS) \
  INT(KV_STRIDE) INT(KV_OFFSET) \
  IN(T, q_latent, rows * HEADS * LORA) IN(float, q, rows * HEADS * (NOPE + ROPE)) \
  IN(float, kv, rows * KV_STRIDE) IN(T, kv_norm, LORA) IN(float, eps, 16) IN(float, scale, 16) \
  IN(float, rope, rows * ROPE) IN(uint, places, rows * 4) \
  IN(T, latent_cache, sequences * capacity * LORA) IN(T, rope_cache, sequences * capacity * ROPE) \
  OUT(float, partial, rows * HEADS * SPLITS * LORA) OUT(float, stats, rows * HEADS * SPLITS * 2)

#define SAMPLE_GREEDY_PARTS_SIGNATURE \
  TYPE(T) INT(N) IN(T, x, rows * N) \
  OUT(uint, tops, rows * ((N + 2047) / 2048)) OUT(uint, places, rows * ((N + 2047) / 2048))

#define SAMPLE_GREEDY_SIGNATURE \
  INT(PARTS) IN(uint, tops, rows * PARTS) IN(uint, places, rows * PARTS) OUT(uint, token, rows)

// Those that meet in nothing but threads, warps and barriers: the emulator runs them.
#define MOEFUSE_GRID_KERNELS(KERNEL) \
  KERNEL(fold_router, FOLD_ROUTER_SIGNATURE) \
  KERNEL(grid_attention_out, GRID_ATTENTION_OUT_SIGNATURE) \
  KERNEL(grid_down, GRID_DOWN_SIGNATURE) \
  KERNEL(grid_gate_up, GRID_GATE_UP_SIGNATURE) \
  KERNEL(grid_gate_up_dense, GRID_GATE_UP_DENSE_SIGNATURE) \
  KERNEL(grid_head, GRID_HEAD_SIGNATURE) \
  KERNEL(grid_head_greedy, GRID_HEAD_GREEDY_SIGNATURE) \
  KERNEL(grid_heads, GRID_HEADS_SIGNATURE) \
  KERNEL(grid_linear_residual, GRID_LINEAR_RESIDUAL_SIGNATURE) \
  KERNEL(grid_project, GRID_PROJECT_SIGNATURE) \
  KERNEL(grid_unembed, GRID_UNEMBED_SIGNATURE) \
  KERNEL(sample_greedy, SAMPLE_GREEDY_SIGNATURE) \
  KERNEL(sample_greedy_parts, SAMPLE_GREEDY_PARTS_SIGNATURE)
#define MOEFUSE_CLUSTER_KERNELS(KERNEL) \
  KERNEL(cluster_attention_gqa, CLUSTER_ATTENTION_GQA_SIGNATURE) \
  KERNEL(cluster_attention_mla, CLUSTER_ATTENTION_MLA_SIGNATURE)
// clang-format on
