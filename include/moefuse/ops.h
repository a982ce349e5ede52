// Fused Mixture-of-Experts operations on MLX arrays.
//
// Every op that rounds takes the arithmetic as a named choice:
//   exact        the bits of the stock MLX graph on the CPU; on a Metal device its rounding steps,
//                the order inside a dot product and the last bit of exp being our own;
//   fp32_no_fma  dot products in fp32, the combine's product and sum rounded separately in fp32,
//                one cast to the activation dtype at the end;
//   fp32         as fp32_no_fma, with fused multiply-adds where the hardware has them.
// The two fp32 forms on CPU carry bfloat16 and float16 activations on a per-group integer grid;
// its error bound stands in src/cpu/grid.inl. All three give the same bits on every instruction
// set and for every number of threads.
//
// Bad input throws std::invalid_argument "[op] tensor: expected ..., got ..."; an expert index that
// is out of range is found when the array is evaluated and throws from there.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace moefuse {

namespace mx = mlx::core;

enum class Accumulate : uint8_t { exact, fp32_no_fma, fp32 };
enum class Scoring : uint8_t { softmax, sigmoid };
enum class RouterMode : uint8_t { exact, logits };
enum class PrefillForm : uint8_t { device, kernels, blocks };  // device: what it takes by itself

// Throw std::invalid_argument with the list of names on an unknown one.
Accumulate accumulate_from(const std::string& name);
Scoring scoring_from(const std::string& name);
RouterMode router_mode_from(const std::string& name);
PrefillForm prefill_form_from(const std::string& name);
std::string to_string(Accumulate accumulate);

// A quantised stack of expert matrices: weight uint32 [E, N, K * bits / 32], scales [E, N, K /
// group_size]. What `mode` names decides the rest:
//   affine  4 or 8 bits, groups of 32, 64 or 128, scales and biases of the activation dtype;
//   mxfp4   4 bits, groups of 32, uint8 scales and no biases;
//   nvfp4   4 bits, groups of 16, uint8 scales and no biases.
struct QuantizedExperts {
  mx::array weight;
  mx::array scales;
  std::optional<mx::array> biases = std::nullopt;
};

struct RouterOptions {
  Scoring scoring = Scoring::softmax;
  bool norm_topk_prob = true;
  float scaling_factor = 1.0f;
  int n_group = 1;
  int topk_group = 1;
  RouterMode mode = RouterMode::exact;
};

// Top-k experts of each row of logits [..., E] and their weights: (indices uint32, weights), both
// [..., k], k <= 16. Weights have the dtype of logits for softmax and float32 for sigmoid.
//
// mode exact reproduces the stock graphs of mlx-lm (softmax then argpartition for Qwen3-MoE,
// sigmoid with correction_bias and group selection for GLM), the order inside the top k included.
// mode logits, softmax only, selects on the logits and normalises over the selected in fp32.
std::pair<mx::array, mx::array> moe_router_argpartition_logits_topk(
    const mx::array& logits, int k, const RouterOptions& options = {},
    const std::optional<mx::array>& correction_bias = std::nullopt, mx::StreamOrDevice s = {});

// sum_i y[..., i, :] * weights[..., i]: y [..., k, D], weights [..., k] -> [..., D] of y's dtype.
// exact takes the products in the promoted dtype of y and weights and sums them as the device's
// stock graph does: in fp32 on the CPU, in that dtype on Metal.
mx::array moe_combine_weighted_sum_fp32_no_fma(const mx::array& y, const mx::array& weights,
                                               Accumulate accumulate = Accumulate::fp32_no_fma,
                                               mx::StreamOrDevice s = {});

// The token of each row of logits [..., V], float32, float16 or bfloat16: where the largest stands,
// the first of equal ones, NaN above all -> uint32 [...]. MLX's argmax everywhere but on CUDA,
// where that reads a row with one block of threads; the same tokens there by many.
mx::array sample_greedy(const mx::array& logits, mx::StreamOrDevice s = {});

// The experts of a MoE block in one primitive: for every row of x [..., H] and each of its k
// experts, silu(gate x) * (up x), then down, then the weighted sum over the k -> [..., D].
// gate and up are [E, I, H], down is [E, D, I]; indices integer [..., k], weights [..., k], k
// <= 16.
mx::array moe_gather_qmm_swiglu_downproj_combine(
    const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
    const QuantizedExperts& down, const mx::array& indices, const mx::array& weights,
    Accumulate accumulate = Accumulate::fp32_no_fma, int group_size = 64, int bits = 4,
    const std::string& mode = "affine", mx::StreamOrDevice s = {});

// The same for the many rows of a prompt. kernels is what a CPU takes: the primitive above, whose
// loops share an expert's weights among its rows. blocks is what a GPU takes: the rows sorted by
// expert in blocks of 16 that share one, a gather_qmm a projection, and the combine as a stock
// graph; each of its products is rounded as stock's, and `accumulate` says how the combine is. An
// index out of range that is not known at the call goes unseen in blocks, as in gather_qmm.
mx::array moe_prefill(const mx::array& x, const QuantizedExperts& gate, const QuantizedExperts& up,
                      const QuantizedExperts& down, const mx::array& indices,
                      const mx::array& weights, Accumulate accumulate = Accumulate::exact,
                      int group_size = 64, int bits = 4, const std::string& mode = "affine",
                      PrefillForm form = PrefillForm::device, mx::StreamOrDevice s = {});

// A quantised linear layer for the many rows of a prompt: x [..., K], w one matrix [N, K] with no
// axis of experts -> [..., N] of x's dtype. exact has the bits of stock's quantized_matmul on the
// CPU; on a GPU it is stock's.
mx::array prefill_linear(const mx::array& x, const QuantizedExperts& w,
                         Accumulate accumulate = Accumulate::exact, int group_size = 64,
                         int bits = 4, const std::string& mode = "affine",
                         mx::StreamOrDevice s = {});

// silu(gather_qmm(x, gate)) * gather_qmm(x, up), with gather_qmm's batching: x [..., M, K], indices
// broadcast against each other -> indices.shape + [M, N].
mx::array gather_qmm_swiglu(const mx::array& x, const QuantizedExperts& gate,
                            const QuantizedExperts& up,
                            const std::optional<mx::array>& lhs_indices = std::nullopt,
                            const std::optional<mx::array>& rhs_indices = std::nullopt,
                            bool transpose = true, int group_size = 64, int bits = 4,
                            const std::string& mode = "affine",
                            Accumulate accumulate = Accumulate::exact, mx::StreamOrDevice s = {});

// How often each op was evaluated by a fused kernel, keyed "op/arithmetic", and how often a stock
// graph stood in for it, keyed "op/stock: reason". Counted over the life of the process.
std::map<std::string, int64_t> op_counters();

// Asks the system to hold an evaluated array's buffer in huge pages, in place: the experts'
// matrices lie far apart, and on a CPU a part of their reading is address translation. Where the
// system cannot, and for an array that was never evaluated, nothing changes. The array has to be in
// the host's memory: asking a GPU's for its data would move it.
void use_huge_pages(const mx::array& a);

// Name of the CPU instruction set in use, for example "avx512".
std::string cpu_isa();

}  // namespace moefuse
