"""A whole token of the decode step on this CPU: ms, bytes and share of the read ceiling.

    python benchmarks/cpu/whole_token.py MODEL [--threads N] [--point ACCUMULATE:ROWS:CONTEXT ...]

A point decodes ROWS sequences whose caches hold CONTEXT tokens of random keys and values, through
a patched mlx-lm model, as a user would; ACCUMULATE `stock` is mlx-lm as it is. ROWS may end in `s`:
all rows are fed the same token, so they choose the same experts. The points take turns in rounds,
and beside each stands the machine's own read rate: a plain read of as many bytes by as many
threads. Prints the medians over the rounds.

Bytes: the plan's weights of one token (rows that choose other experts read more) and the caches'.
Peak memory is the process's own, taken after the first decode.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

WARMUP = 2


def caches(model, decoder, rows: int, context: int) -> list:
    """mlx-lm's caches with room for what comes, filled with random keys and values."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    heads, *dims = decoder.cache_shape
    made = make_prompt_cache(model)
    for number, cache in enumerate(made):
        parts = []
        for part, dim in enumerate(dims):
            key = mx.random.key(2 * number + part)
            shape = (rows, heads, context + 256, dim)
            parts.append(mx.random.normal(shape, decoder.dtype, key=key))
        mx.eval(parts)
        cache.keys, cache.values = parts
        cache.offset = context
    return made


def decode(model, cache, rows: int, same: bool, tokens: int) -> float:
    """ms a step, the median; the caches are left as they were."""
    import mlx.core as mx
    from mlx_lm.models.cache import trim_prompt_cache

    token = mx.array([[7 if same else 7 + 13 * i] for i in range(rows)])
    times = []
    warmup = WARMUP if tokens > 1 else 0
    for _ in range(warmup + tokens):
        start = time.perf_counter()
        token = mx.argmax(model(token, cache=cache)[:, -1], -1, keepdims=True)
        mx.eval(token)
        times.append(time.perf_counter() - start)
    trim_prompt_cache(cache, warmup + tokens)
    return statistics.median(times[warmup:]) * 1e3


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def cache_bytes(cache, rows: int, context: int) -> int:
    slot = sum(a.shape[1] * a.shape[3] * a.itemsize for c in cache for a in (c.keys, c.values))
    return rows * context * slot


def measure(folder: Path, points: list[tuple], arguments) -> dict:
    import mlx.core as mx
    import mlx_lm
    import moefuse
    from mlx.utils import tree_flatten
    from moefuse import _core

    model, _ = mlx_lm.load(str(folder))
    if arguments.float32:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    weights = sum(a.nbytes for _, a in tree_flatten(model.parameters()))

    def choose(accumulate: str):
        """Patch the model, or leave it stock; the report of a patch."""
        moefuse.unpatch(model)
        if accumulate == "stock":
            return None
        return moefuse.patch(model, [], step=True, accumulate=accumulate)

    decoder = choose("fp32_no_fma")._step.decoder
    weight_bytes = sum(s["weight_bytes"] for s in decoder.stages())
    found = {"checkpoint_bytes": weights, "float32": arguments.float32, "points": []}
    prepared = {}
    for accumulate, rows, same, context in points:
        cache = caches(model, decoder, rows, context)
        prepared[accumulate, rows, same, context] = cache
        held = cache_bytes(cache, rows, context)
        found["points"].append(
            {"accumulate": accumulate, "rows": rows, "same_tokens": same, "context": context,
             "weight_bytes": weight_bytes, "cache_bytes": held, "ms": [], "read_bytes_per_s": []}
        )  # fmt: skip
        report = choose(accumulate)
        decode(model, cache, rows, same, 1)
        if report and (report.fallbacks or not report.calls.get("step")):
            raise SystemExit(f"the step did not run: {report.calls} {report.fallbacks}")
        if "peak_bytes" not in found:
            room = cache_bytes(cache, rows, context + 256)
            found |= {"peak_bytes": peak_bytes(), "weights_and_cache_bytes": weights + room}
    for number in range(arguments.rounds):
        both = list(zip(points, found["points"], strict=True))
        for point, entry in both if number % 2 == 0 else both[::-1]:
            accumulate, rows, same, _ = point
            report = choose(accumulate)
            tokens = 1 if accumulate in ("stock", "exact") else arguments.tokens
            reads = [_core.read_bandwidth(weight_bytes)]
            entry["ms"].append(decode(model, prepared[point], rows, same, tokens))
            reads.append(_core.read_bandwidth(weight_bytes))
            entry["read_bytes_per_s"].append(max(reads))
            if report:
                entry["stages"] = stages(report._step.decoder)
    for entry in found["points"]:
        summarise(entry)
    found |= {"threads": _core.cpu_threads(), "isa": _core.cpu_isa()}
    return found


def stages(decoder) -> dict:
    """ms and MB of a step in the stages of each name, over all layers."""
    found: dict[str, dict] = {}
    for stage in decoder.stages():
        entry = found.setdefault(stage["name"], {"ms": 0.0, "MB": 0.0})
        entry["ms"] += stage["seconds"] / stage["calls"] * 1e3
        entry["MB"] += stage["weight_bytes"] / 1e6
    return found


def summarise(entry: dict) -> None:
    entry["median_ms"] = statistics.median(entry["ms"])
    moved = entry["weight_bytes"] + entry["cache_bytes"]
    entry["bytes_per_s"] = moved / entry["median_ms"] * 1e3
    entry["read_share"] = statistics.median(
        moved / ms * 1e3 / read
        for ms, read in zip(entry["ms"], entry["read_bytes_per_s"], strict=True)
    )


def show(found: dict) -> None:
    peak, over = found["peak_bytes"] / 1e9, found["peak_bytes"] / found["weights_and_cache_bytes"]
    print(f"{found['threads']} threads, {found['isa']}, {found['checkpoint_bytes'] / 1e9:.3f} GB")
    print(f"peak memory {peak:.3f} GB, {over:.3f} of weights and cache")
    print("accumulate | rows | context | ms | MB | GB/s | read GB/s | share | tokens/s")
    for e in found["points"]:
        rows = f"{e['rows']}{' same' if e['same_tokens'] else ''}"
        moved = (e["weight_bytes"] + e["cache_bytes"]) / 1e6
        read = statistics.median(e["read_bytes_per_s"]) / 1e9
        cells = [e["accumulate"], rows, e["context"], f"{e['median_ms']:.2f}", f"{moved:.1f}"]
        cells += [f"{e['bytes_per_s'] / 1e9:.2f}", f"{read:.2f}", f"{e['read_share']:.1%}"]
        print(*cells, f"{e['rows'] / e['median_ms'] * 1e3:.2f}", sep=" | ")
    for e in found["points"]:
        if "stages" in e:
            each = (f"{name} {s['ms']:.2f}" for name, s in e["stages"].items())
            print(f"{e['accumulate']}, {e['rows']} rows, {e['context']}, ms:", ", ".join(each))


def point(text: str) -> tuple:
    match = re.fullmatch(r"(stock|exact|fp32|fp32_no_fma):([1-8])(s?):(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected ACCUMULATE:ROWS[s]:CONTEXT, got {text!r}")
    return match[1], int(match[2]), bool(match[3]), int(match[4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--point", type=point, action="append")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--float32", action="store_true", help="convert scales and norms first")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads and os.environ.get("MOEFUSE_NUM_THREADS") != str(arguments.threads):
        environment = {**os.environ, "MOEFUSE_NUM_THREADS": str(arguments.threads)}
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    points = arguments.point or [("fp32_no_fma", 1, False, 1024)]
    found = measure(arguments.model, points, arguments)
    config = json.loads((arguments.model / "config.json").read_text())
    found |= {"model_type": config["model_type"], "layers": config["num_hidden_layers"],
              "cpu": processor()}  # fmt: skip
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def processor() -> str:
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        return f"{name}, {os.cpu_count()} cores"
    except (OSError, TypeError):
        return platform.processor()


if __name__ == "__main__":
    main()
