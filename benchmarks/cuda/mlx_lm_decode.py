"""Decode rate through mlx-lm on a GPU, stock and with the step, at true geometry.

Random weights in the model's own layout, a filled cache, greedy, A B B A; the prompt is one token,
so that only decoding is timed.  python benchmarks/cuda/mlx_lm_decode.py qwen|glm [context] [tokens]
"""

from __future__ import annotations

import math
import statistics
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import moefuse
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models import glm4_moe_lite, qwen3_moe
from mlx_lm.models.cache import make_prompt_cache

QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936,
    "max_position_embeddings": 40960, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
GLM = {
    "model_type": "glm4_moe_lite", "hidden_size": 2048, "num_hidden_layers": 47,
    "vocab_size": 154880, "max_position_embeddings": 202752, "num_attention_heads": 20,
    "num_key_value_heads": 20, "intermediate_size": 10240, "moe_intermediate_size": 1536,
    "n_routed_experts": 64, "num_experts_per_tok": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "norm_topk_prob": True, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
    "attention_bias": False,
}  # fmt: skip


def filled(name: str, value: mx.array, bits: dict[str, int]) -> mx.array:
    if value.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, value.shape, dtype=mx.uint32)
    root, _, kind = name.rpartition(".")
    if kind in ("scales", "biases"):
        top = 2 ** bits[root] - 1
        scale = 1.0 / (top / math.sqrt(12) * math.sqrt(value.shape[-1] * 64))
        return mx.full(value.shape, scale if kind == "scales" else -scale * top / 2, mx.bfloat16)
    if value.ndim == 1 and kind == "weight":
        return mx.ones(value.shape, mx.bfloat16)
    if kind == "e_score_correction_bias":
        return mx.random.uniform(-0.1, 0.1, value.shape)
    return (mx.random.normal(value.shape) * 0.05).astype(mx.bfloat16)


def build(config: dict):
    module = qwen3_moe if config["model_type"] == "qwen3_moe" else glm4_moe_lite
    model = module.Model(module.ModelArgs.from_dict(config))

    def wanted(path, m):
        if not hasattr(m, "to_quantized"):
            return False
        return {"bits": 8, "group_size": 64} if path.endswith("mlp.gate") else True

    nn.quantize(model, group_size=64, bits=4, class_predicate=wanted)
    bits = {path: m.bits for path, m in model.named_modules() if hasattr(m, "bits")}
    weights = []
    for name, value in tree_flatten(model.parameters()):
        weights.append((name, filled(name, value, bits)))
        mx.eval(weights[-1][1])
    model.update(tree_unflatten(weights))
    model.eval()
    return model


def cache_at(model, context: int):
    cache = make_prompt_cache(model)
    warm = mx.array([[1]])
    model(warm, cache=cache)
    for c in cache:
        shapes = [(*a.shape[:2], context + 256, a.shape[3]) for a in (c.keys, c.values)]
        c.keys, c.values = (mx.random.normal(s).astype(mx.bfloat16) for s in shapes)
        c.offset = context
        mx.eval(c.keys, c.values)
    return cache


def rate(model, context: int, tokens: int) -> float:
    cache, stamps = cache_at(model, context), []
    for _ in generate_step(mx.array([1]), model, max_tokens=tokens, prompt_cache=cache):
        stamps.append(time.perf_counter())
    return (len(stamps) - 9) / (stamps[-1] - stamps[8])


def main() -> None:
    family, *rest = sys.argv[1:]
    context, tokens = (int(v) for v in (*rest, *("1024", "128")[len(rest) :]))
    model = build(QWEN if family == "qwen" else GLM)
    print(f"{family}: {mx.get_active_memory() / 1e9:.2f} GB", flush=True)
    stock, step = [], []
    for side in "ABBA":
        if side == "B":
            report = moefuse.patch(model, [], step=True, accumulate="fp32_no_fma")
        began = time.perf_counter()
        (stock if side == "A" else step).append(rate(model, context, tokens))
        latest = (stock if side == "A" else step)[-1]
        print(f"{side} {latest:.1f} tok/s ({time.perf_counter() - began:.1f} s)", flush=True)
        if side == "B":
            print(dict(report.calls), dict(report.fallbacks), flush=True)
            moefuse.unpatch(model)
    ratio = statistics.median(step) / statistics.median(stock)
    print(f"{family} context {context}: stock {stock}, step {step}, {ratio:.1f}x", flush=True)


if __name__ == "__main__":
    main()
