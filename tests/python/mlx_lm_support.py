"""mlx-lm's commands as processes of their own, and what the tests of them compare."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).parents[2]
MODELS = ("qwen3-moe-tiny", "glm4-moe-lite-tiny")
PROMPTS = ("The list type", "Return a new array of", "The")

# What a log says was fused, by the flag that chooses it.
FUSED = {"router,experts": "moe_router, moe_experts fused in", "step": "step fused in 1 modules"}


def folder(name: str) -> Path:
    return ROOT / "models" / name


def child_env(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOEFUSE_", "ZMLX_"))}
    path = os.pathsep.join(p for p in sys.path if p)
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **extra}


def run(module: str, *words, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
    """`python -m module words`, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        env=child_env(**env), input=stdin, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def said(output: str) -> str:
    """What a command said, without the times and memory it tells."""
    kept = [line for line in output.splitlines() if not re.search(r"tok/s|tokens-per|memory", line)]
    return "\n".join(kept)


def same_command(*words, stdin: str = "", fused: dict[str, str] = FUSED) -> str:
    """Run an mlx_lm command on stock and once for each way to patch it; what all of them said."""
    with ThreadPoolExecutor(2) as pool:
        stock = pool.submit(run, "mlx_lm", *words, stdin=stdin)
        patched = {
            told: pool.submit(
                run, "moefuse.mlx_lm", *words, stdin=stdin,
                MOEFUSE_VARIANTS=variants, MOEFUSE_LOG="info",
            )
            for variants, told in fused.items()
        }  # fmt: skip
        expected = said(stock.result().stdout)
        for told, running in patched.items():
            done = running.result()
            assert said(done.stdout) == expected, told
            assert told in done.stderr, done.stderr
    return expected


def unquantised(source: Path, target: Path) -> Path:
    """The checkpoint with its weights in bfloat16 again, as a hub would have it."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    settings = config.pop("quantization")
    config.pop("quantization_config")
    weights = mx.load(str(source / "model.safetensors"))
    for name in [name for name in weights if name.endswith(".scales")]:
        layer = name.removesuffix(".scales")
        how = settings.get(layer, settings)
        parts = (weights.pop(f"{layer}.{part}") for part in ("weight", "scales", "biases"))
        weights[f"{layer}.weight"] = mx.dequantize(
            *parts, group_size=how["group_size"], bits=how["bits"]
        )
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config))
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, target)
    return target
