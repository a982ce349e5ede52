"""How decided a model is: activations, routing and margins over its own greedy text.

A gate on tokens proves something only on a model that behaves like a trained one, so these are
measured alike on the trained checkpoints in models/ and on synthetic ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import faults, measure
from .prompts import Prompt

NEAR = 0.25  # a margin below this, in logits, is one that a small error can turn


class _Rms(nn.Module):
    """Stands in for a decoder layer and notes the rms of what leaves it."""

    def __init__(self, inner, seen: list):
        super().__init__()
        self.inner, self.seen = inner, seen

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __call__(self, x, *args, **kwargs):
        y = self.inner(x, *args, **kwargs)
        self.seen.append(float(mx.sqrt(mx.mean(mx.square(y.astype(mx.float32))))))
        return y


@contextmanager
def _watched(model) -> Iterator[tuple[list, list]]:
    """Record rms per layer call and expert indices per MoE layer for the block."""
    layers, rms = model.model.layers, []
    blocks = [layer.mlp for layer in faults.moe_layers(model)]
    recorders = [faults.Recorder(block.switch_mlp) for block in blocks]
    plain = list(layers)
    for block, recorder in zip(blocks, recorders, strict=True):
        block.switch_mlp = recorder
    layers[:] = [_Rms(layer, rms) for layer in plain]
    try:
        yield rms, recorders
    finally:
        layers[:] = plain
        for block, recorder in zip(blocks, recorders, strict=True):
            block.switch_mlp = recorder.inner


def _routing(recorders: Sequence) -> dict:
    """Shares of the experts' calls, the least even layer counting."""
    largest, entropy, unused = [], [], []
    for recorder in recorders:
        experts = recorder.inner.gate_proj["weight"].shape[0]
        counts = np.bincount(np.concatenate(recorder.seen), minlength=experts)
        share = counts / counts.sum()
        used = share[share > 0]
        largest.append(float(share.max() * experts))
        entropy.append(float(-(used * np.log(used)).sum() / np.log(experts)))
        unused.append(int((counts == 0).sum()))
    return {
        "busiest_over_even_share": [min(largest), max(largest)],
        "entropy_of_even": [min(entropy), max(entropy)],
        "unused_experts": [min(unused), max(unused)],
    }


def _margins(logits: mx.array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(top-1 minus top-2, probability of the top token, deviation of the logits) per row."""
    logits = logits.astype(mx.float32)
    best = mx.sort(logits, axis=-1)[:, -2:]
    probability = mx.exp(best[:, 1] - mx.logsumexp(logits, axis=-1))
    return tuple(np.array(a) for a in (best[:, 1] - best[:, 0], probability, logits.std(axis=-1)))


def loop_start(tokens: Sequence[int], window: int = 20) -> int:
    """Tokens before a window of `window` tokens comes back; all of them if none does."""
    seen = set()
    for i in range(len(tokens) - window + 1):
        key = tuple(tokens[i : i + window])
        if key in seen:
            return i
        seen.add(key)
    return len(tokens)


def examine(model, prompts: Sequence[Prompt], tokens: int) -> dict:
    """Greedy text of every prompt, then one forced pass over it that is watched."""
    texts = [measure.generate(model, prompt.ids, tokens).tokens for prompt in prompts]
    rows = []
    with _watched(model) as (rms, recorders):
        for prompt, text in zip(prompts, texts, strict=True):
            logits = model(mx.array([[*prompt.ids, *text]]))
            rows.append(_margins(logits[0, len(prompt.ids) - 1 : -1]))
    margin, probability, spread = (np.concatenate(part) for part in zip(*rows, strict=True))
    layers = np.mean(np.reshape(rms, (len(prompts), -1)), axis=0)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "margin_quantiles": _quantiles(margin),
        "margin_below_near": float((margin < NEAR).mean()),
        "top_probability_quantiles": _quantiles(probability),
        "logit_deviation": float(np.median(spread)),
        "rms_of_layers": [float(layers[0]), float(layers.max()), float(layers[-1])],
        "routing": _routing(recorders),
        "different_tokens": [len(set(text)) for text in texts],
        "tokens_before_a_loop": [loop_start(text) for text in texts],
    }


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(q) for q in np.quantile(values, (0.1, 0.25, 0.5, 0.75, 0.9))]


def lines(found: dict) -> Iterator[str]:
    """The same for people."""

    def numbers(values, digits=2):
        return " ".join(f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in values)

    routing = found["routing"]
    yield f"greedy text of {found['prompts']} prompts, {found['tokens']} tokens each"
    yield "quantiles are 10 25 50 75 90 %"
    yield f"margin of the best token, logits: {numbers(found['margin_quantiles'])}"
    yield f"margins below {NEAR}: {found['margin_below_near']:.1%}"
    yield f"its probability: {numbers(found['top_probability_quantiles'])}"
    yield f"deviation of the logits: {found['logit_deviation']:.2f}"
    yield f"rms after the first layer, largest, last: {numbers(found['rms_of_layers'])}"
    yield (
        "experts, least and most of any layer: busiest over even share "
        f"{numbers(routing['busiest_over_even_share'])}; entropy over even "
        f"{numbers(routing['entropy_of_even'])}; unused {numbers(routing['unused_experts'])}"
    )
    yield f"different tokens per prompt: {numbers(found['different_tokens'])}"
    yield f"tokens before a window of 20 comes back: {numbers(found['tokens_before_a_loop'])}"
