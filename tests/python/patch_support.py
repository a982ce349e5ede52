"""Tiny random models of every family, and what the patch tests compare."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import glm4_moe_lite, qwen3_5_moe, qwen3_moe, qwen3_next

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
FAMILIES = ("qwen", "glm")  # those with a decode step of their own
NEXT_FAMILIES = ("qwen3_next", "qwen3_5_moe")  # those whose MoE block alone is fused
VOCAB = 64

QWEN = dict(
    model_type="qwen3_moe", hidden_size=64, num_hidden_layers=3, intermediate_size=64,
    num_attention_heads=2, num_experts=16, num_experts_per_tok=8, decoder_sparse_step=1,
    mlp_only_layers=[1], moe_intermediate_size=32, rms_norm_eps=1e-6, vocab_size=VOCAB,
    num_key_value_heads=1, head_dim=32, rope_theta=1e4, tie_word_embeddings=False,
    max_position_embeddings=512, norm_topk_prob=True,
)  # fmt: skip
GLM = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
    num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1,
    n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=32, q_lora_rank=32,
    qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
)  # fmt: skip
NEXT = {
    **QWEN, "model_type": "qwen3_next", "mlp_only_layers": [], "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 64, "linear_num_value_heads": 2,
    "linear_num_key_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5, "full_attention_interval": 2,
}  # fmt: skip


def tiny(family: str, dtype=mx.bfloat16, *, quantize: dict | None = None, **changes):
    """A random 2-MoE-layer model, in eval mode; quantize={} leaves it unquantised."""
    mx.random.seed(7)
    if family == "qwen":
        model = qwen3_moe.Model(qwen3_moe.ModelArgs(**{**QWEN, **changes}))
    elif family == "qwen3_next":
        model = qwen3_next.Model(qwen3_next.ModelArgs(**{**NEXT, **changes}))
    elif family == "qwen3_5_moe":
        config = {**NEXT, "model_type": family, **changes}
        model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(config))
    else:
        model = glm4_moe_lite.Model(glm4_moe_lite.ModelArgs(**{**GLM, **changes}))
        for layer in model.layers[1:]:
            layer.mlp.gate.weight = mx.random.normal(layer.mlp.gate.weight.shape) * 0.3
            layer.mlp.gate.e_score_correction_bias = mx.random.normal((16,)) * 0.01
    keep = getattr(model, "cast_predicate", lambda name: True)
    model.set_dtype(dtype)
    if family == "glm":  # the loader leaves this one in float32
        for layer in model.layers[1:]:
            gate = layer.mlp.gate
            assert not keep("e_score_correction_bias")
            gate.e_score_correction_bias = gate.e_score_correction_bias.astype(mx.float32)
    if quantize is None:
        quantize = {"group_size": 32, "bits": 4}
    if quantize:
        predicate = getattr(model, "quant_predicate", None)

        def choose(path, module):
            if not hasattr(module, "to_quantized"):
                return False
            return predicate(path, module) if predicate else True

        nn.quantize(model, **quantize, class_predicate=choose)
    model.eval()
    mx.eval(model.parameters())
    return model


def tiny_with_experts(family: str, dtype=mx.bfloat16, **quantize):
    """A tiny model whose experts alone are quantised."""
    model = tiny(family, dtype, quantize={})
    for block in blocks(model):
        nn.quantize(block.switch_mlp, **quantize)
    return model


def blocks(model) -> list:
    """The MoE blocks of a model."""
    return [layer.mlp for layer in model.layers if "switch_mlp" in layer.mlp]


def prompt(length: int, rows: int = 1, seed: int = 3) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)))


def bits(array: mx.array) -> np.ndarray:
    """The very bits of an array, for comparisons that nothing rounds away."""
    as_bits = {2: mx.uint16, 4: mx.uint32}[array.itemsize]
    return np.array(array.view(as_bits))


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def decode(model, length: int = 4, count: int = 64) -> list[tuple[int, np.ndarray]]:
    """Greedy tokens and the bits of their log-probabilities, through mlx-lm's generate_step."""
    steps = generate_step(prompt(length)[0], model, max_tokens=count)
    return [(int(token), bits(logprobs)) for token, logprobs in steps]


def same_decode(a, b) -> bool:
    return len(a) == len(b) and all(
        s == t and (p == q).all() for (s, p), (t, q) in zip(a, b, strict=True)
    )
