// The Python face of include/moefuse/ops.h: names, defaults and docstrings, nothing that computes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>

#include <tuple>

#include "moefuse/ops.h"

namespace nb = nanobind;
using namespace nb::literals;
namespace mx = mlx::core;

void bind_decoder(nb::module_& m);  // _decoder.cpp

namespace {

using Optional = std::optional<mx::array>;
// weight, scales and, if affine, biases: what mx.quantize gives.
using Experts =
    std::variant<std::tuple<mx::array, mx::array, Optional>, std::tuple<mx::array, mx::array>>;

moefuse::QuantizedExperts experts(const Experts& w) {
  if (auto* pair = std::get_if<1>(&w)) return {std::get<0>(*pair), std::get<1>(*pair)};
  auto& [weight, scales, biases] = std::get<0>(w);
  return {weight, scales, biases};
}

void bind_router(nb::module_& m) {
  m.def(
      "moe_router_argpartition_logits_topk",
      [](const mx::array& logits, int k, const std::string& scoring, bool norm_topk_prob,
         const std::optional<mx::array>& correction_bias, float scaling_factor, int n_group,
         int topk_group, const std::string& mode, mx::StreamOrDevice stream) {
        moefuse::RouterOptions options = {.scoring = moefuse::scoring_from(scoring),
                                          .norm_topk_prob = norm_topk_prob,
                                          .scaling_factor = scaling_factor,
                                          .n_group = n_group,
                                          .topk_group = topk_group,
                                          .mode = moefuse::router_mode_from(mode)};
        return moefuse::moe_router_argpartition_logits_topk(logits, k, options, correction_bias,
                                                            stream);
      },
      "logits"_a, "k"_a, nb::kw_only(), "scoring"_a = "softmax", "norm_topk_prob"_a = true,
      "correction_bias"_a = nb::none(), "scaling_factor"_a = 1.0f, "n_group"_a = 1,
      "topk_group"_a = 1, "mode"_a = "exact", "stream"_a = nb::none(),
      R"(Top-k experts of each row of router logits, and their weights.

Args:
    logits: [..., E], float32, float16 or bfloat16.
    k: experts a row, 1 to 16 and at most E.
    scoring: "softmax" (Qwen3-MoE) or "sigmoid" (GLM-lite).
    norm_topk_prob: divide the weights by their sum.
    correction_bias: [E], added to the sigmoid scores for the choice only.
    mode: "exact" keeps the stock graph's bits and order; "logits" (softmax only) selects on the
        logits and normalises over the selected.
Returns:
    (indices uint32, weights), both [..., k]; weights have logits' dtype for softmax and are
    float32 for sigmoid.
Raises:
    ValueError: names the argument, what was expected and what came.)");
}

void bind_combine(nb::module_& m) {
  m.def(
      "moe_combine_weighted_sum_fp32_no_fma",
      [](const mx::array& y, const mx::array& weights, const std::string& accumulate,
         mx::StreamOrDevice stream) {
        return moefuse::moe_combine_weighted_sum_fp32_no_fma(
            y, weights, moefuse::accumulate_from(accumulate), stream);
      },
      "y"_a, "weights"_a, nb::kw_only(), "accumulate"_a = "fp32_no_fma", "stream"_a = nb::none(),
      R"(Weighted sum of the experts' outputs: y [..., k, D], weights [..., k] -> [..., D].

accumulate: "fp32_no_fma" rounds product and sum apart in fp32 and casts once; "fp32" fuses them;
"exact" computes in the promoted dtype of y and weights, as (y * weights[..., None]).sum(-2) does.
The result has y's dtype. Raises ValueError on a wrong dtype or shape.)");
}

void bind_sample(nb::module_& m) {
  m.def("sample_greedy", &moefuse::sample_greedy, "logits"_a, nb::kw_only(),
        "stream"_a = nb::none(),
        R"(The token of each row of logits [..., V]: where the largest stands -> uint32 [...].

The tokens of mx.argmax(logits, axis=-1), the first of equal ones. On CUDA, where MLX reads a row
with one block of threads, by many; MLX's argmax elsewhere. logits: float32, float16 or bfloat16.
Raises ValueError on another dtype or an empty array.)");
}

void bind_experts(nb::module_& m) {
  m.def(
      "moe_gather_qmm_swiglu_downproj_combine",
      [](const mx::array& x, const Experts& gate, const Experts& up, const Experts& down,
         const mx::array& indices, const mx::array& weights, const std::string& accumulate,
         int group_size, int bits, const std::string& mode, mx::StreamOrDevice stream) {
        return moefuse::moe_gather_qmm_swiglu_downproj_combine(
            x, experts(gate), experts(up), experts(down), indices, weights,
            moefuse::accumulate_from(accumulate), group_size, bits, mode, stream);
      },
      "x"_a, "gate"_a, "up"_a, "down"_a, "indices"_a, "weights"_a, nb::kw_only(),
      "accumulate"_a = "fp32_no_fma", "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine",
      "stream"_a = nb::none(),
      R"(The routed experts of a MoE block in one primitive.

Args:
    x: [..., H], float32, float16 or bfloat16.
    gate, up: (weight, scales, biases) of [E, I, H], as mx.quantize gives them; fp4 modes have
        no biases.
    down: the same of [E, D, I].
    indices: integers [..., k], k at most 16; weights: [..., k].
    accumulate: "exact", "fp32_no_fma" or "fp32".
    mode: "affine" (group_size 32, 64 or 128, bits 4 or 8), "mxfp4" (32, 4) or "nvfp4" (16, 4).
Returns:
    [..., D] of x's dtype.
Raises:
    ValueError: names the tensor, what was expected and what came. An index out of range raises
    when the result is evaluated.)");
}

void bind_prefill(nb::module_& m) {
  m.def(
      "moe_prefill",
      [](const mx::array& x, const Experts& gate, const Experts& up, const Experts& down,
         const mx::array& indices, const mx::array& weights, const std::string& accumulate,
         int group_size, int bits, const std::string& mode, const std::string& form,
         mx::StreamOrDevice stream) {
        return moefuse::moe_prefill(x, experts(gate), experts(up), experts(down), indices, weights,
                                    moefuse::accumulate_from(accumulate), group_size, bits, mode,
                                    moefuse::prefill_form_from(form), stream);
      },
      "x"_a, "gate"_a, "up"_a, "down"_a, "indices"_a, "weights"_a, nb::kw_only(),
      "accumulate"_a = "exact", "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine",
      "form"_a = "device", "stream"_a = nb::none(),
      R"(The routed experts of a MoE block for the many rows of a prompt.

The arguments, their dtypes and the result [..., D] are moe_gather_qmm_swiglu_downproj_combine's.

Args:
    form: "kernels" is a CPU's: that op's own primitive. "blocks" runs everywhere: rows sorted by
        expert in blocks of 16 that share one, a gather_qmm a projection, a stock combine in
        `accumulate`; padding is at most 15 rows an expert. "device" takes kernels on the CPU and
        blocks on a GPU.
Raises:
    ValueError: names the tensor, what was expected and what came. In blocks an index out of range
    is only seen where its value is known at the call.)");
}

void bind_prefill_linear(nb::module_& m) {
  m.def(
      "prefill_linear",
      [](const mx::array& x, const mx::array& w, const mx::array& scales, const Optional& biases,
         const std::string& accumulate, int group_size, int bits, const std::string& mode,
         mx::StreamOrDevice stream) {
        return moefuse::prefill_linear(x, {w, scales, biases}, moefuse::accumulate_from(accumulate),
                                       group_size, bits, mode, stream);
      },
      "x"_a, "w"_a, "scales"_a, "biases"_a.none(), nb::kw_only(), "accumulate"_a = "exact",
      "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine", "stream"_a = nb::none(),
      R"(mx.quantized_matmul(x, w, scales, biases, transpose=True) for the many rows of a prompt.

Args:
    x: [..., K], float32, float16 or bfloat16.
    w, scales, biases: one matrix [N, K], as mx.quantize gives it; biases None in fp4 modes.
    accumulate: "exact" (stock's bits on the CPU), "fp32_no_fma" or "fp32".
    mode: "affine" (group_size 32, 64 or 128, bits 4 or 8), "mxfp4" (32, 4) or "nvfp4" (16, 4).
Returns:
    [..., N] of x's dtype. On a GPU it is mx.quantized_matmul's own.
Raises:
    ValueError: names the tensor, what was expected and what came.)");
}

void bind_gather_qmm_swiglu(nb::module_& m) {
  m.def(
      "gather_qmm_swiglu",
      [](const mx::array& x, const mx::array& gate_w, const mx::array& gate_scales,
         const Optional& gate_biases, const mx::array& up_w, const mx::array& up_scales,
         const Optional& up_biases, const std::optional<mx::array>& lhs_indices,
         const std::optional<mx::array>& rhs_indices, bool transpose, int group_size, int bits,
         const std::string& mode, const std::string& accumulate, mx::StreamOrDevice stream) {
        return moefuse::gather_qmm_swiglu(x, {gate_w, gate_scales, gate_biases},
                                          {up_w, up_scales, up_biases}, lhs_indices, rhs_indices,
                                          transpose, group_size, bits, mode,
                                          moefuse::accumulate_from(accumulate), stream);
      },
      "x"_a, "gate_w"_a, "gate_scales"_a, "gate_biases"_a.none(), "up_w"_a, "up_scales"_a,
      "up_biases"_a.none(), "lhs_indices"_a = nb::none(), "rhs_indices"_a = nb::none(),
      "transpose"_a = true, "group_size"_a = 64, "bits"_a = 4, "mode"_a = "affine", nb::kw_only(),
      "accumulate"_a = "exact", "stream"_a = nb::none(),
      R"(silu(gather_qmm(x, gate)) * gather_qmm(x, up), batched as mx.gather_qmm is.

x is [..., M, K]; the weights are quantised [E, N, K], mode is "affine", "mxfp4" or "nvfp4" (biases
None in the last two); the result has the broadcast shape of the indices plus [M, N] and x's dtype.
Raises ValueError on transpose=False, on another mode and on tensors that contradict each other.)");
}

}  // namespace

NB_MODULE(_core, m) {
  nb::module_::import_("mlx.core");  // registers mx.array with nanobind before we name it
  m.doc() = "Fused Mixture-of-Experts operations on MLX arrays.";
  bind_router(m);
  bind_combine(m);
  bind_sample(m);
  bind_experts(m);
  bind_prefill(m);
  bind_prefill_linear(m);
  bind_gather_qmm_swiglu(m);
  bind_decoder(m);
  m.def("op_counters", &moefuse::op_counters,
        "How often each op was evaluated since the process began, keyed 'op/arithmetic'.");
  m.def("use_huge_pages", &moefuse::use_huge_pages, "array"_a,
        "Hold an evaluated array's buffer in huge pages where the system can (Linux); its values "
        "stay. The array has to be in the host's memory.");
  m.def("cpu_isa", &moefuse::cpu_isa, "The CPU instruction set in use, for example 'avx512'.");
}
