"""Decode rate through mlx-lm on a GPU, stock and with the step, at true geometry.

Random weights in the model's own layout, a filled cache, greedy, A B B A for each context and
batch; one row through mlx-lm's generate_step, several through its model and caches.
  python benchmarks/cuda/mlx_lm_decode.py qwen|glm --contexts 128,1024,16384 --batches 1,2,4
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import moefuse
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models import glm4_moe_lite, qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from moefuse.lab import environment, measure
from moefuse.lab.synth import LIKE

NAMES = {"qwen": "qwen3-30b-a3b", "glm": "glm-4.7-flash"}
SKIPPED = 8  # tokens in front of the timed ones


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


def cache_at(model, context: int, rows: int):
    cache = make_prompt_cache(model)
    model(mx.ones((rows, 1), mx.int32), cache=cache)
    for c in cache:
        shapes = [(*a.shape[:2], context + 256, a.shape[3]) for a in (c.keys, c.values)]
        c.keys, c.values = (mx.random.normal(s).astype(mx.bfloat16) for s in shapes)
        c.offset = context
        mx.eval(c.keys, c.values)
    return cache


def one_row(model, cache, tokens: int):
    yield from generate_step(mx.array([1]), model, max_tokens=tokens, prompt_cache=cache)


def several_rows(model, cache, tokens: int, rows: int):
    """The next step is queued before the last one is waited for, as mlx-lm does."""
    token, before = mx.arange(1, rows + 1), None
    for _ in range(tokens):
        token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(token)
        if before is not None:
            mx.eval(before)
        yield token
        before = token
    mx.eval(token)


def rate(model, context: int, rows: int, tokens: int) -> tuple[float, float]:
    """(tokens a second of all rows together, peak memory in GB)."""
    cache, stamps = cache_at(model, context, rows), []
    mx.reset_peak_memory()
    steps = one_row(model, cache, tokens) if rows == 1 else several_rows(model, cache, tokens, rows)
    for _ in steps:
        stamps.append(time.perf_counter())
    end = time.perf_counter()
    return rows * (tokens - SKIPPED) / (end - stamps[SKIPPED - 1]), mx.get_peak_memory() / 1e9


def cell(model, context: int, rows: int, tokens: int) -> dict:
    """Stock and step in A B B A; the step's counters show that it ran."""
    rates, peaks = {"A": [], "B": []}, {"A": 0.0, "B": 0.0}
    found = {"context": context, "batch": rows, "tokens": tokens, "calls": 0, "fallbacks": {}}
    for side in "ABBA":
        if side == "B":
            report = moefuse.patch(model, [], step=True, accumulate="fp32_no_fma")
        try:
            value, peak = rate(model, context, rows, tokens)
        finally:
            if side == "B":
                found["calls"] += report.calls.get("step", 0)
                found["fallbacks"].update(report.fallbacks)
                moefuse.unpatch(model)
        rates[side].append(value)
        peaks[side] = max(peaks[side], peak)
        print(f"  context {context} rows {rows} {side}: {value:.1f} tok/s", flush=True)
    found |= {"stock_tok_s": rates["A"], "step_tok_s": rates["B"]}
    found |= {"peak_mem_gb": {"stock": peaks["A"], "step": peaks["B"]}}
    found["ratio"] = statistics.median(rates["B"]) / statistics.median(rates["A"])
    return found


def prefill(model, length: int) -> dict:
    """Stock's prefill, which is the step's too; the first call compiles and is not counted."""
    ids = [1 + i % 1000 for i in range(length)]
    seconds = [measure.prefill(model, ids)[1] for _ in range(3)][1:]
    return {"tokens": length - 1, "tok_s": [(length - 1) / s for s in seconds]}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=NAMES)
    parser.add_argument("--contexts", type=numbers, default=[1024])
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--prefill", type=numbers, default=[], help="prompt lengths")
    parser.add_argument("--tokens", type=int, default=72, help="of which 8 are not timed")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--vocab", type=int, help="default: the real one")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    chosen = arguments(words)
    config = dict(LIKE[NAMES[chosen.family]])
    config["num_hidden_layers"] = chosen.layers or config["num_hidden_layers"]
    config["vocab_size"] = chosen.vocab or config["vocab_size"]
    model = build(config)
    found = {
        "model": NAMES[chosen.family],
        "layers": config["num_hidden_layers"],
        "vocab": config["vocab_size"],
        "weights_gb": mx.get_active_memory() / 1e9,
        "device": environment.device_name(),
        "gpu": environment.gpu(),
        "versions": {n: environment.version_of(n) for n in ("mlx", "mlx-lm")},
        "moefuse": moefuse.__version__,
        "git_commit": environment.commit(environment.repository_root()),
        "date": environment.now(),
        "cells": [],
        "prefill": [],
    }
    print(f"{found['model']}: {found['weights_gb']:.2f} GB on {found['device']}", flush=True)
    jobs = [("cells", cell, (c, b, chosen.tokens)) for b in chosen.batches for c in chosen.contexts]
    jobs += [("prefill", prefill, (length,)) for length in chosen.prefill]
    for where, job, values in jobs:
        try:
            found[where].append(job(model, *values))
        except RuntimeError as error:  # what the machine cannot run is told in its place
            found[where].append({"void": str(error)[:300], "of": list(values)})
        print(json.dumps(found[where][-1]), flush=True)
        if chosen.json:  # whole after every cell
            chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
