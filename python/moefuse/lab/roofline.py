"""What a decoded token must read, and how fast this device reads: the ceiling of a decode rate."""

from __future__ import annotations

import time

import mlx.core as mx

from .. import _core, step

PASSES, REPEATS = 5, 8
MOST_BYTES = 4 << 30


def measure(model) -> dict | None:
    """Weight bytes of one token at batch 1 and bytes per second of a plain read of as many.

    None where the step does not take the model: it is what knows the bytes.
    """
    try:
        attached = step.attach(model, "fp32_no_fma")
    except ValueError:
        return None
    try:
        weight_bytes = sum(stage["weight_bytes"] for stage in attached.decoder.stages())
    finally:
        attached.detach()
    return {"weight_bytes": weight_bytes, "read_bytes_per_s": read_rate(weight_bytes)}


def read_rate(size: int) -> float:
    """Bytes per second of reading `size` bytes on the default device, the best of a few passes."""
    if mx.default_device().type == mx.cpu:
        return _core.read_bandwidth(size)
    words = mx.zeros((min(size, MOST_BYTES) // 4,), mx.uint32)
    mx.eval(words)
    return max(_reduction_rate(words, reduce) for reduce in (mx.max, mx.sum))


def _reduction_rate(words: mx.array, reduce) -> float:
    """Several passes in one evaluation, so that the call's own time is a small part."""
    mx.eval(reduce(words))  # compiles
    best = float("inf")
    for _ in range(PASSES):
        begin = time.perf_counter()
        mx.eval([reduce(words) for _ in range(REPEATS)])
        best = min(best, time.perf_counter() - begin)
    return REPEATS * words.nbytes / best


def share(found: dict, side: str) -> float | None:
    """Part of the read ceiling that a side's median decode rate reaches; None if not measured."""
    ceiling = found.get("roofline")
    if not ceiling:
        return None
    rate = found[side]["median_decode_tok_s"]
    return rate * ceiling["weight_bytes"] / ceiling["read_bytes_per_s"]
