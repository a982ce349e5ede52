"""Planted faults: damage that the fidelity gate must catch, put in and taken out again.

The damage is done to the model before a variant is applied, so it passes through whatever code
the variant runs; the gate itself knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import LabError
from .measure import prefill


def moe_layers(model) -> list:
    """Decoder layers whose MLP routes to experts."""
    found = [layer for layer in model.layers if hasattr(layer.mlp, "switch_mlp")]
    if not found:
        raise LabError("[faults] model: expected at least one MoE layer, got none")
    return found


class Recorder(nn.Module):
    """Stands in for switch_mlp and notes which experts are asked for."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.seen: list = []

    def __call__(self, x, indices):
        self.seen.append(np.array(indices).ravel())
        return self.inner(x, indices)


def busiest_experts(model, layer, prompt: Sequence[int]) -> list[int]:
    """Expert numbers of one layer, most used first, over a prompt."""
    inner = layer.mlp.switch_mlp
    recorder = layer.mlp.switch_mlp = Recorder(inner)
    try:
        prefill(model, prompt)
    finally:
        layer.mlp.switch_mlp = inner
    experts = inner.gate_proj["weight"].shape[0]
    counts = np.bincount(np.concatenate(recorder.seen), minlength=experts)
    return np.argsort(-counts, kind="stable").tolist()


def _exchange(module, name: str, rows: tuple[int, int], both: bool = True):
    """Copy of a parameter with one row overwritten by another, or the two exchanged."""
    first, second = rows
    original = module[name]
    changed = mx.array(original)
    changed[first] = original[second]
    if both:
        changed[second] = original[first]
    mx.eval(changed)
    setattr(module, name, changed)
    return lambda: setattr(module, name, original)


def _wrong_weight(model, prompt):
    """The busiest expert of the middle MoE layer has another expert's gate projection."""
    layer = moe_layers(model)[len(moe_layers(model)) // 2]
    rows = tuple(busiest_experts(model, layer, prompt)[:2])
    projection = layer.mlp.switch_mlp.gate_proj
    names = [n for n in ("weight", "scales", "biases") if n in projection]
    return [_exchange(projection, n, rows, both=False) for n in names]


def _swapped_pair(model, prompt):
    """In the middle MoE layer the busiest and the least used index stand for each other."""
    layer = moe_layers(model)[len(moe_layers(model)) // 2]
    order = busiest_experts(model, layer, prompt)
    rows = (order[0], order[-1])
    gate = layer.mlp.gate
    names = ("weight", "scales", "biases", "e_score_correction_bias")
    return [_exchange(gate, n, rows) for n in names if n in gate]


def _fewer_experts(model, prompt):
    """Every MoE layer uses k - 1 experts."""
    undo = []
    for layer in moe_layers(model):
        owner = layer.mlp if hasattr(layer.mlp, "top_k") else layer.mlp.gate
        k = owner.top_k
        owner.top_k = k - 1
        undo.append(lambda owner=owner, k=k: setattr(owner, "top_k", k))
    return undo


def _truncate_bf16(x: mx.array) -> mx.array:
    """float32 cut to bfloat16's bits without rounding."""
    bits = x.astype(mx.float32).view(mx.uint32)
    return (bits & 0xFFFF0000).view(mx.float32)


class _Bf16Accumulation(nn.Module):
    """A MoE block whose experts are summed in a bfloat16 accumulator that drops low bits."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def _route(self, x):
        if not hasattr(self.block, "top_k"):
            return self.block.gate(x)
        gates = mx.softmax(self.block.gate(x), axis=-1, precise=True)
        indices = mx.argpartition(gates, kth=-self.block.top_k)[..., -self.block.top_k :]
        scores = mx.take_along_axis(gates, indices, axis=-1)
        if self.block.norm_topk_prob:
            scores = scores / scores.sum(axis=-1, keepdims=True)
        return indices, scores

    def __call__(self, x):
        indices, scores = self._route(x)
        y = self.block.switch_mlp(x, indices)
        total = mx.zeros(x.shape, mx.float32)
        for i in range(indices.shape[-1]):
            product = _truncate_bf16(y[..., i, :] * scores[..., i, None])
            total = _truncate_bf16(total + product)
        total = total.astype(y.dtype)
        shared = getattr(self.block, "shared_experts", None)
        return total if shared is None else total + shared(x)


def _bf16_accumulation(model, prompt):
    """Every MoE layer sums its experts in a truncating bfloat16 accumulator."""
    undo = []
    for layer in moe_layers(model):
        block = layer.mlp
        layer.mlp = _Bf16Accumulation(block)
        undo.append(lambda layer=layer, block=block: setattr(layer, "mlp", block))
    return undo


def _scaled(projection, error: float, expert: int | None):
    """One expert's projection, or all of them (None), with every weight times 1 + error."""
    names = [n for n in ("scales", "biases") if n in projection] or ["weight"]
    kept = {n: projection[n] for n in names}
    for name, original in kept.items():
        grown = original.astype(mx.float32) * (1 + error)  # in bfloat16 1 + 2^-8 is 1
        if expert is not None:
            chosen = mx.arange(original.shape[0]) == expert
            grown = mx.where(chosen[:, None, None], grown, original)
        projection[name] = grown.astype(original.dtype)
    mx.eval([projection[n] for n in names])
    return lambda: [setattr(projection, n, a) for n, a in kept.items()]


def _expert_error(model, prompt, error: float):
    """Relative error of the down projection of the middle MoE layer's busiest expert."""
    layer = moe_layers(model)[len(moe_layers(model)) // 2]
    busiest = busiest_experts(model, layer, prompt)[0]
    return [_scaled(layer.mlp.switch_mlp.down_proj, error, busiest)]


def _every_expert_error(model, prompt, error: float):
    """Relative error of the down projection of every expert of every layer."""
    return [_scaled(layer.mlp.switch_mlp.down_proj, error, None) for layer in moe_layers(model)]


FAULTS = {
    "wrong-weight": _wrong_weight,
    "k-minus-1": _fewer_experts,
    "swapped-pair": _swapped_pair,
    "bf16-accumulation": _bf16_accumulation,
}
NONE = "none"  # no damage: what the gate says of it tells what its catches are worth
IN_WEIGHTS = ("wrong-weight", "swapped-pair")  # what a fused step reads, and so can show
GRADED = {"expert-error": _expert_error, "every-expert-error": _every_expert_error}


@contextmanager
def planted(model, name: str, prompt: Sequence[int]) -> Iterator[None]:
    """Damage `model` for the block. `prompt` tells which experts are worth damaging.

    name: one of FAULTS, or one of GRADED with a relative weight error, `expert-error:0.25`.
    """
    base, _, size = name.partition(":")
    if name == NONE:
        undo = []
    elif name in FAULTS:
        undo = FAULTS[name](model, prompt)
    elif base in GRADED:
        undo = GRADED[base](model, prompt, float(size))
    else:
        raise LabError(f"[faults] {name!r}: expected one of {sorted([*FAULTS, *GRADED])}")
    try:
        yield
    finally:
        for restore in undo:
            restore()
