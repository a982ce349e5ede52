"""The passes of campaign.sh, in one process: MLX loads and compiles its kernels anew in each.

What matters most comes first. `full`: the step beside the control on whole models, contexts and
batches, then isolated kernels while time is left. `isolated`: the same control and
step on a few layers, then each kernel alone and their combinations, by importance; the first model
leaves the second its share of the time and goes on behind it. `cells`: contexts and batches alone.
  python benchmarks/cuda/campaign.py WEIGHTS OUT SECONDS full|isolated|cells --models MODEL...
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from pathlib import Path

import mlx.core as mx
from moefuse import cli

STEP = "step:fp32_no_fma"
EXTRAS = ("concat_gate_up", "experts:fp32_no_fma", "router", "combine:fp32_no_fma")
ISOLATED = (
    "concat_gate_up", "experts:fp32_no_fma", "router+experts:fp32_no_fma", "router",
    "swiglu:fp32_no_fma", "combine:fp32_no_fma", "prefill", "step+prefill:fp32_no_fma",
    "router+combine+concat_gate_up:fp32_no_fma",
)  # fmt: skip
# Seconds on an H200, from stock's 94 and 34 tok/s: one more variant; contexts and batches. With a
# few layers one more variant costs both models about as much.
ONE_MORE = {"qwen3-30b-a3b": 75, "glm-4.7-flash": 190}
CELLS = {"qwen3-30b-a3b": 80, "glm-4.7-flash": 110}
ONE_ISOLATED = 20
ONE_CELL = 35  # the last that was started, with its context's prompt of up to 32,768 tokens
PLAN = """predicted on an H200: compilation 75 to 150 s, once, if nothing was compiled ahead; of
whole models control, step and faults 130 s for Qwen, 250 s for GLM; then, while time is left,
contexts and batches 80 and 110 s, each further variant 75 and 190 s. Of four layers: control, step
and faults 60 s, each further variant 15 s. Stock's own rate is measured first and told."""


class Passes:
    """Runs the moefuse command in this process until the time is over or it was interrupted."""

    def __init__(self, chosen: argparse.Namespace):
        self.weights, self.out, self.rehearse = chosen.weights, chosen.out, chosen.rehearse
        self.suffix = f"-{chosen.layers}-layers" if chosen.layers else ""
        self.end = time.monotonic() + chosen.seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def folder(self, name: str) -> Path:
        return self.weights / (name + self.suffix)

    def bench(self, name: str, extras: tuple[str, ...], seconds: float) -> int:
        """The control beside the step, then no variant that would start after `seconds`."""
        words = ["bench", str(self.folder(name)), "--variants", ",".join((STEP, *extras))]
        words += ["--shared-control", "--resume", "--out", str(self.out)]
        words += ["--minutes", f"{max(0.0, seconds) / 60:.3f}"]
        words += ["--quick", "--short", "33x2", "--long", "34x1"] if self.rehearse else []
        return self.run(words)

    def run(self, words: list[str]) -> int:
        print(f"[{self.left:.0f} s left] moefuse {' '.join(words)}", flush=True)
        try:
            code = cli.app(words, standalone_mode=False) or 0
        except SystemExit as stop:
            code = stop.code
        except Exception:  # one pass less; what it finished is on disk
            traceback.print_exc()
            code = 1
        gc.collect()
        mx.clear_cache()
        print(f"[{self.left:.0f} s left] exit code {code}", flush=True)
        if code == 130:
            raise SystemExit(130)
        return code

    def cells(self, name: str, contexts: str, batches: str, seconds: float) -> int:
        """Contexts and batches, no cell that would start after `seconds`."""
        size = ["--runs", "3"]
        if self.rehearse:
            contexts, batches, size = "32,48", "1,2", ["--tokens", "8", "--runs", "2"]
        words = ["cells", str(self.folder(name)), "--variants", STEP, *size]
        words += ["--context", contexts, "--batch", batches, "--out", str(self.out)]
        return self.run([*words, "--minutes", f"{max(0.0, seconds) / 60:.3f}"])


def full(passes: Passes, models: list[str]) -> None:
    for name in models:
        passes.bench(name, EXTRAS, 0.0)
    for name in models:
        if passes.left > CELLS[name]:
            passes.cells(name, "1024,128,16384", "1,4", CELLS[name])
    for name in models:
        if passes.left > ONE_MORE[name] + 20:
            passes.bench(name, EXTRAS, passes.left - ONE_MORE[name])


def isolated(passes: Passes, models: list[str]) -> None:
    cut = []  # models whose time was over before their last variant: --resume goes on with them
    for number, name in enumerate(models):
        begin, seconds = passes.left, passes.left / (len(models) - number) - ONE_ISOLATED
        passes.bench(name, ISOLATED, seconds)
        if begin - passes.left > seconds:
            cut.append(name)
    for name in cut:
        if passes.left > ONE_ISOLATED:
            passes.bench(name, ISOLATED, passes.left - ONE_ISOLATED)


def cells(passes: Passes, models: list[str]) -> None:
    """Each model has its share of the time; the first contexts are those that cost least."""
    for number, name in enumerate(models):
        share = passes.left / (len(models) - number)
        passes.cells(name, "1024,128,8192,32768,16384", "1,4,2", share - ONE_CELL)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("mode", choices=["full", "isolated", "cells"])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--layers", type=int, help="of the checkpoints, in their folders' names")
    parser.add_argument("--models", nargs="+", choices=ONE_MORE, default=list(ONE_MORE))
    chosen = parser.parse_args(words)
    passes = Passes(chosen)
    print(PLAN, flush=True)
    models = [name for name in chosen.models if passes.folder(name).is_dir()]
    {"full": full, "isolated": isolated, "cells": cells}[chosen.mode](passes, models)


if __name__ == "__main__":
    main()
