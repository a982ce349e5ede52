"""The passes of campaign.sh, in one process: MLX compiles its CUDA kernels anew in each.

What matters most comes first: the step beside the control on both models, then isolated kernels
while time is left, then contexts and batches through mlx-lm.
  python benchmarks/cuda/campaign.py WEIGHTS OUT SECONDS full|rehearse MODEL...
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from pathlib import Path

import mlx.core as mx
from moefuse import cli

STEP = "step:fp32_no_fma"
EXTRAS = ("concat_gate_up", "experts:fp32_no_fma", "router", "combine:fp32_no_fma")
# Seconds on an H200, from stock's 94 and 34 tok/s: one more variant; contexts and batches.
ONE_MORE = {"qwen3-30b-a3b": 75, "glm-4.7-flash": 190}
CELLS = {"qwen3-30b-a3b": 60, "glm-4.7-flash": 70}
FAMILY = {"qwen3-30b-a3b": "qwen", "glm-4.7-flash": "glm"}
PLAN = """predicted on an H200: compilation 75 to 150 s, once; control, step and faults 130 s for
Qwen, 250 s for GLM; then, while time is left, contexts and batches 60 and 70 s, each further
variant 75 and 190 s. Stock's own rate is measured first and told."""


class Passes:
    """Runs the moefuse command in this process until the time is over or it was interrupted."""

    def __init__(self, weights: Path, out: Path, seconds: float, mode: str):
        self.weights, self.out, self.mode = weights, out, mode
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def bench(self, name: str, need: float) -> int:
        """One bench; no variant starts when fewer than `need` seconds are left."""
        words = ["bench", str(self.weights / name), "--variants", ",".join((STEP, *EXTRAS))]
        words += ["--shared-control", "--resume", "--out", str(self.out)]
        words += ["--minutes", f"{max(0.0, self.left - need) / 60:.3f}"]
        small = ["--quick", "--short", "33x2", "--long", "34x1"]
        words += small if self.mode == "rehearse" else []
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

    def cells(self, name: str) -> None:
        import mlx_lm_decode

        small = self.mode == "rehearse"
        words = [FAMILY[name], "--json", str(self.out / f"mlx_lm_decode-{name}.json")]
        words += ["--contexts", "32" if small else "1024,128,16384", "--batches", "1,4"]
        words += ["--layers", "1", "--vocab", "512", "--tokens", "12"] if small else []
        try:
            mlx_lm_decode.main(words)
        except Exception:
            traceback.print_exc()
        gc.collect()
        mx.clear_cache()


def main() -> None:
    weights, out, seconds, mode, *wanted = sys.argv[1:]
    passes = Passes(Path(weights), Path(out), float(seconds), mode)
    print(PLAN, flush=True)
    models = [name for name in wanted if (passes.weights / name).is_dir()]
    for name in models:  # `need` above what is left: nothing but the control and the step
        passes.bench(name, float("inf"))
    for name in models:
        if passes.left > CELLS[name]:
            passes.cells(name)
    for name in models:
        if passes.left > ONE_MORE[name] + 20:
            passes.bench(name, ONE_MORE[name])


if __name__ == "__main__":
    main()
