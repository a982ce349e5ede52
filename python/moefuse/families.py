"""The model families that patch() knows: how each routes, and where its experts are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from . import _core

MAX_TOP_K = 16


@dataclass(frozen=True)
class Family:
    """One model_type. Blocks are matched by their very class, so a stranger's subclass is left be.

    route_stock(block, x) and route_fused(block, x, mode) give (indices, weights), both
    [..., top_k]; add_shared(block, x, y) gives y plus the shared experts' output, if any.
    """

    model_type: str
    flags: str
    module: str
    block: str
    top_k: Callable[[Any], int]
    route_stock: Callable[[Any, mx.array], tuple[mx.array, mx.array]]
    route_fused: Callable[[Any, mx.array, str], tuple[mx.array, mx.array]]
    router_reason: Callable[[Any], str | None]
    add_shared: Callable[[Any, mx.array, mx.array], mx.array]

    def block_class(self) -> type:
        """mlx-lm's class; imported here because mlx_lm takes seconds to import."""
        return getattr(importlib.import_module(self.module), self.block)


def _qwen_stock(block, x: mx.array) -> tuple[mx.array, mx.array]:
    probabilities = mx.softmax(block["gate"](x), axis=-1, precise=True)
    k = block.top_k
    order = mx.argpartition(probabilities, kth=-k, axis=-1)
    indices = mx.stop_gradient(order[..., -k:])
    weights = mx.take_along_axis(probabilities, indices, axis=-1)
    if block.norm_topk_prob:
        weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    return indices, weights


def _qwen_fused(block, x: mx.array, mode: str) -> tuple[mx.array, mx.array]:
    return _core.moe_router_argpartition_logits_topk(
        block["gate"](x), block.top_k, norm_topk_prob=bool(block.norm_topk_prob), mode=mode
    )


def _qwen_next_shared(block, x: mx.array, y: mx.array) -> mx.array:
    return y + mx.sigmoid(block["shared_expert_gate"](x)) * block["shared_expert"](x)


def _glm_stock(block, x: mx.array) -> tuple[mx.array, mx.array]:
    return block["gate"](x)


def _glm_fused(block, x: mx.array, mode: str) -> tuple[mx.array, mx.array]:
    gate = block["gate"]
    return _core.moe_router_argpartition_logits_topk(
        x @ gate["weight"].T,
        gate.top_k,
        scoring="sigmoid",
        norm_topk_prob=bool(gate.norm_topk_prob),
        correction_bias=gate["e_score_correction_bias"],
        scaling_factor=gate.routed_scaling_factor,
        n_group=gate.n_group,
        topk_group=gate.topk_group,
        mode=mode,
    )


def _glm_router_reason(block) -> str | None:
    """The fused router stands for MoEGate's own arithmetic, and for no one else's."""
    kind = type(block["gate"])
    known = importlib.import_module("mlx_lm.models.glm4_moe_lite").MoEGate
    return None if kind is known else f"gate is a {kind.__name__}"


def _glm_shared(block, x: mx.array, y: mx.array) -> mx.array:
    return y + block["shared_experts"](x) if "shared_experts" in block else y


_QWEN = Family(
    model_type="qwen3_moe",
    flags="QWEN",
    module="mlx_lm.models.qwen3_moe",
    block="Qwen3MoeSparseMoeBlock",
    top_k=lambda block: block.top_k,
    route_stock=_qwen_stock,
    route_fused=_qwen_fused,
    router_reason=lambda block: None,
    add_shared=lambda block, x, y: y,
)
# Its block has a gated shared expert beside the routed ones; Qwen3.5's MoE is the same class.
_QWEN_NEXT = replace(
    _QWEN,
    model_type="qwen3_next",
    flags="QWEN_NEXT",
    module="mlx_lm.models.qwen3_next",
    block="Qwen3NextSparseMoeBlock",
    add_shared=_qwen_next_shared,
)
FAMILIES = {
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5_moe": replace(_QWEN_NEXT, model_type="qwen3_5_moe"),
    "glm4_moe_lite": Family(
        model_type="glm4_moe_lite",
        flags="GLM",
        module="mlx_lm.models.glm4_moe_lite",
        block="Glm4MoeLiteMoE",
        top_k=lambda block: block.num_experts_per_tok,
        route_stock=_glm_stock,
        route_fused=_glm_fused,
        router_reason=_glm_router_reason,
        add_shared=_glm_shared,
    ),
}


def family_of(model) -> Family:
    """The model's family, or ValueError naming its model_type and the supported ones."""
    kind = getattr(model, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"[patch] model_type: expected one of {sorted(FAMILIES)}, got {kind!r}")
    return FAMILIES[kind]
