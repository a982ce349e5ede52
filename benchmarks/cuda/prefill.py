"""The prompt's rate, stock mlx-lm against patch(["prefill"]), at true geometry, random weights.

Each length in A B B A behind a warm run of each side; then, with --parts, what one layer is made
of, stock and patched. What fails is told in its place and the rest goes on.
  python benchmarks/cuda/prefill.py qwen|glm --lengths 1024,4096 --parts --json prefill.json
  python benchmarks/cuda/prefill.py qwen --toy --parts          # a rehearsal on any machine
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import moefuse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm_decode import NAMES, build, numbers
from moefuse import prefill
from moefuse.lab import environment
from moefuse.lab.synth import LIKE

TOY = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "num_hidden_layers": 3,
    "vocab_size": 256,
}  # fmt: skip


def told(name: str, found: dict) -> dict:
    print(f"  {name}: {json.dumps(found)}", flush=True)
    return found


def void(error: Exception) -> dict:
    return {"void": f"{type(error).__name__}: {error}"[:300]}


def side(model, name: str, accumulate: str):
    """The patch's report, None for stock."""
    moefuse.unpatch(model)
    return None if name == "stock" else moefuse.patch(model, ["prefill"], accumulate=accumulate)


def once(model, ids: mx.array, chunk: int) -> float:
    """Seconds to fill a cache, as mlx-lm does it."""
    cache = make_prompt_cache(model)
    begin = time.perf_counter()
    for at in range(0, ids.size, chunk):
        model(ids[at : at + chunk][None], cache=cache)
        mx.eval([c.state for c in cache])
    return time.perf_counter() - begin


def rates(model, length: int, chosen: argparse.Namespace) -> dict:
    """tok/s of both sides, their ratio, peak memory, and whether the last logits are stock's."""
    ids = 1 + mx.arange(length) % min(1000, model.args.vocab_size - 1)
    found = {"length": length, "tok_s": {"stock": [], "prefill": []}, "peak_gb": {}}
    try:
        logits = {}
        for turn, name in enumerate(("stock", "prefill", "stock", "prefill", "prefill", "stock")):
            report = side(model, name, chosen.accumulate)
            mx.clear_cache()
            mx.reset_peak_memory()
            rate = length / once(model, ids, chosen.chunk)
            if turn > 1:
                found["tok_s"][name].append(rate)
                found["peak_gb"][name] = mx.get_peak_memory() / 1e9
            else:
                logits[name] = model(ids[None, : chosen.chunk])[0, -1].astype(mx.float32)
                mx.eval(logits[name])
            if report:
                found |= {"calls": report.calls, "fallbacks": report.fallbacks}
        off = mx.abs(logits["prefill"] - logits["stock"]).max()
        found["logits_off"] = (off / mx.abs(logits["stock"]).max()).item()
    except Exception as error:  # what the machine cannot run is told in its place
        return told(str(length), found | void(error))
    medians = {name: statistics.median(values) for name, values in found["tok_s"].items()}
    return told(str(length), found | {"ratio": medians["prefill"] / medians["stock"]})


def micros(job: Callable[[], mx.array], repeats: int = 10) -> dict:
    """us a call, queued one behind the other, after two calls that compile."""
    try:
        for _ in range(2):
            mx.eval(job())
        begin = time.perf_counter()
        for _ in range(repeats):
            mx.async_eval(job())
        mx.synchronize()
        return {"us": round((time.perf_counter() - begin) / repeats * 1e6, 1)}
    except Exception as error:
        return void(error)


def parts(model, config: dict, length: int, chosen: argparse.Namespace) -> dict:
    """us of the last layer and of what it is made of, on each side."""
    layer = model.layers[-1]
    x = mx.random.normal((1, length, config["hidden_size"])).astype(mx.bfloat16)
    k = config["num_experts_per_tok"]
    switch = layer.mlp.switch_mlp
    scores = mx.random.normal((1, length, switch.gate_proj.num_experts))
    indices = mx.argpartition(scores, kth=-k, axis=-1)[..., -k:].astype(mx.uint32)
    mx.eval(x, indices)
    # GLM's layer makes its scores from a mask of positions, Qwen's takes the word.
    mask = "causal"
    if "kv_lora_rank" in config:
        mask = mx.tril(mx.ones((length, length), mx.bool_))
    jobs = {
        "layer": lambda: layer(x, mask=mask),
        "attention": lambda: layer.self_attn(x, mask=mask),
        "mlp": lambda: layer.mlp(x),
        "mlp, router": lambda: layer.mlp.gate(x)[0],
        "norm": lambda: layer.input_layernorm(x),
        **linears(layer, length),
    }
    found = {}
    for name in ("stock", "prefill"):
        side(model, name, chosen.accumulate)
        found[name] = {part: micros(job) for part, job in jobs.items()}
    moefuse.unpatch(model)
    found["stock"]["mlp, experts"] = micros(lambda: switch(x, indices))
    for name in found["stock"]:
        both = {s: cells[name] for s, cells in found.items() if name in cells}
        told(name, both)
    return {"length": length, "us": found}


def linears(layer, length: int) -> dict[str, Callable[[], mx.array]]:
    """Each quantised linear layer outside the experts on rows of its own."""
    jobs = {}
    for name, linear in layer.named_modules():
        if type(linear).__name__ == "QuantizedLinear":
            columns = linear["scales"].shape[-1] * linear.group_size
            rows = mx.random.normal((1, length, columns)).astype(mx.bfloat16)
            mx.eval(rows)
            jobs[name] = lambda linear=linear, rows=rows: linear(rows)
    return jobs


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=NAMES)
    parser.add_argument("--lengths", type=numbers, default=[1024])
    parser.add_argument("--chunk", type=int, default=2048, help="rows a call, as mlx-lm's")
    parser.add_argument("--accumulate", default="exact", choices=moefuse.ACCUMULATE)
    parser.add_argument("--parts", action="store_true", help="also what a layer is made of")
    parser.add_argument(
        "--dense", action="store_true", help="on CUDA linear layers dequantised too"
    )
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--toy", action="store_true", help="a small geometry, for a rehearsal")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    chosen = arguments(words)
    prefill.DENSE_ON_CUDA = chosen.dense
    config = dict(LIKE[NAMES[chosen.family]])
    config["num_hidden_layers"] = chosen.layers or config["num_hidden_layers"]
    if chosen.toy:
        config |= {name: value for name, value in TOY.items() if name in config}
    model = build(config)
    found = {
        "model": NAMES[chosen.family],
        "toy": chosen.toy,
        "layers": config["num_hidden_layers"],
        "accumulate": chosen.accumulate,
        "dense": chosen.dense,
        "weights_gb": mx.get_active_memory() / 1e9,
        "device": environment.device_name(),
        "gpu": environment.gpu(),
        "versions": {n: environment.version_of(n) for n in ("mlx", "mlx-lm")},
        "git_commit": environment.commit(environment.repository_root()),
        "date": environment.now(),
        "rates": [],
        "parts": [],
    }
    print(f"{found['model']}: {found['weights_gb']:.2f} GB on {found['device']}", flush=True)

    def keep(part: str, cell: dict) -> None:
        found[part].append(cell)
        if chosen.json:  # whole after every cell: a time limit leaves what there is
            chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for length in chosen.lengths:
        keep("rates", rates(model, length, chosen))
    for length in chosen.lengths if chosen.parts else ():
        keep("parts", parts(model, config, length, chosen))


if __name__ == "__main__":
    main()
