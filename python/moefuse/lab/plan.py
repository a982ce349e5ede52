"""The plan of a model's decode step, and what each of its stages takes on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .. import _core, step
from .roofline import read_rate

TOKENS = 32
WARMUP_TOKENS = 4  # the first touch of weights and buffers is not the stages' time


def examine(model, accumulate: str, tokens: int = TOKENS) -> dict:
    """Stages in order, equal ones of several layers as one; bytes and seconds are of one token.

    Decodes `tokens` greedy tokens where the default device has an executor. Times are None
    where stages are not timed. Raises ValueError naming what the step cannot take.
    """
    attached = step.attach(model, accumulate)
    try:
        decoder = attached.decoder
        stages = _fold(decoder.stages())
        weight_bytes = sum(stage["weight_bytes"] for stage in stages)
        ran = _core.has_executor()
        ceilings = []
        if ran:
            ceilings.append(read_rate(weight_bytes))
            token, cache = _decode(model, 0, make_prompt_cache(model), WARMUP_TOKENS)
            before = _fold(decoder.stages())
            _decode(model, token, cache, tokens)
            for stage, old, new in zip(stages, before, _fold(decoder.stages()), strict=True):
                stage["seconds"] = (new["seconds"] - old["seconds"]) / tokens
            ceilings.append(read_rate(weight_bytes))
    finally:
        attached.detach()
    seconds = sum(stage["seconds"] for stage in stages) or None
    ceiling = max(ceilings) if seconds else None
    for stage in stages:
        _rate(stage, stage["seconds"] if seconds else None, ceiling)
    found = {
        "accumulate": accumulate,
        "dtype": str(decoder.dtype).removeprefix("mlx.core."),
        "threads": _core.cpu_threads(),
        "isa": _core.cpu_isa(),
        "tokens": tokens if ran else 0,
        "weight_bytes": weight_bytes,
        "read_bytes_per_s": ceiling,
        "stages": stages,
    }
    _rate(found, seconds, ceiling)
    return found


def _decode(model, token: int, cache, count: int):
    for _ in range(count):
        logits = model(mx.array([[token]]), cache=cache)
        token = int(mx.argmax(logits[0, -1]))
    return token, cache


def _fold(stages: list[dict]) -> list[dict]:
    """One entry for the stages of one name, shape and size; bytes and seconds are their sums."""
    folded: dict[tuple, dict] = {}
    for stage in stages:
        key = stage["name"], stage["shape"], stage["weight_bytes"]
        entry = folded.setdefault(
            key,
            {"name": key[0], "shape": key[1], "layers": [], "weight_bytes": 0, "seconds": 0.0},
        )
        entry["layers"] += [stage["layer"]] if stage["layer"] >= 0 else []
        entry["weight_bytes"] += stage["weight_bytes"]
        entry["seconds"] += stage["seconds"]
    return list(folded.values())


def _rate(entry: dict, seconds: float | None, ceiling: float | None) -> None:
    entry["seconds"] = seconds
    entry["bytes_per_s"] = entry["weight_bytes"] / seconds if seconds else None
    entry["read_share"] = entry["bytes_per_s"] / ceiling if seconds else None


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def lines(plan: dict) -> Iterator[str]:
    """The same for people."""
    yield (
        f"decode step, {plan['accumulate']}, {plan['dtype']} weights, "
        f"{plan['threads']} threads, {plan['isa']}"
    )
    if plan["seconds"] is None:
        yield "stages are not timed on this device"
    else:
        yield (
            f"mean of {plan['tokens']} tokens; a plain read of as many bytes: "
            f"{plan['read_bytes_per_s'] / 1e9:.1f} GB/s"
        )
    wide = max(len(stage["shape"]) for stage in plan["stages"])
    yield (
        f"{'stage':<20}{'layers':<10}{'count':>5}  {'shape':<{wide}}"
        f"{'MB/token':>10}{'us/token':>10}{'GB/s':>7}{'of read':>9}"
    )
    total = {**plan, "name": "total", "layers": None, "shape": ""}
    for entry in (*plan["stages"], total):
        layers = entry["layers"]
        count = "" if layers is None else max(1, len(layers))
        yield (
            f"{entry['name']:<20}{_ranges(layers or []):<10}{count:>5}  {entry['shape']:<{wide}}"
            f"{entry['weight_bytes'] / 1e6:>10.3f}{_times(entry)}"
        )


def _times(entry: dict) -> str:
    if entry["seconds"] is None:
        return f"{'-':>10}{'-':>7}{'-':>9}"
    time = f"{entry['seconds'] * 1e6:>10.1f}"
    if not entry["weight_bytes"]:  # attention reads the cache, no weights
        return f"{time}{'-':>7}{'-':>9}"
    return f"{time}{entry['bytes_per_s'] / 1e9:>7.2f}{entry['read_share'] * 100:>8.1f}%"
