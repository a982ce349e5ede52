"""Logits against a float64 oracle, moefuse's beside its peers', on the very same weights.

    python benchmarks/peers/logits_error.py OUT --ik CHECKOUT --llama CHECKOUT [--json FILE]

OUT is a folder that write_gguf.py wrote. Every engine decodes the same tokens one by one from an
empty cache in its own fast settings; the error is the root mean square of (logits - oracle) over
all tokens and the whole vocabulary, and the same relative to the oracle's own size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import moefuse
import numpy as np
from compare import build
from mlx_lm.models.cache import make_prompt_cache
from oracle import Oracle

SOURCE = Path(__file__).with_name("peer_logits.cpp")


def tool(kind: str, checkout: Path) -> Path:
    """peer_logits.cpp linked against a checkout's library."""
    build(checkout)
    folder = checkout / "build-peer"
    binary = folder / "peer_logits"
    libraries = sorted({str(p.parent) for p in folder.rglob("lib*.so")})
    command = ["c++", "-O2", "-std=c++17", SOURCE, "-o", binary, "-lllama"]
    command += [f"-I{checkout / part}" for part in ("include", "ggml/include")]
    for place in libraries:
        command += [f"-L{place}", f"-Wl,-rpath,{place}", f"-Wl,-rpath-link,{place}"]
    subprocess.run([*command, *(["-DMOEFUSE_IK"] if kind == "ik" else [])], check=True)
    return binary


def peer_logits(binary: Path, gguf: Path, tokens: list[int], threads: int) -> np.ndarray:
    with tempfile.NamedTemporaryFile() as out:
        command = [binary, gguf, out.name, str(threads), *map(str, tokens)]
        subprocess.run(command, check=True, capture_output=True)
        return np.fromfile(out.name, np.float32).reshape(len(tokens), -1)


def our_logits(folder: Path, accumulate: str, tokens: list[int]) -> np.ndarray:
    model, _ = mlx_lm.load(str(folder))
    report = moefuse.patch(model, [], step=True, accumulate=accumulate)
    cache = make_prompt_cache(model)
    rows = [model(mx.array([[t]]), cache=cache)[0, -1].astype(mx.float32) for t in tokens]
    if report.calls.get("step", 0) != len(tokens):
        raise SystemExit(f"the step did not run: {report.calls} {report.fallbacks}")
    return np.array(mx.stack(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ik", type=Path, help="a checkout of ik_llama.cpp")
    parser.add_argument("--llama", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--accumulate", nargs="+", default=["fp32_no_fma", "fp32", "exact"])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens = [int(t) for t in rng.integers(3, 2000, arguments.tokens)]
    oracle = Oracle(arguments.folder).logits(tokens)
    size = float(np.sqrt(np.mean(oracle**2)))
    found = []

    def judge(engine: str, logits: np.ndarray) -> None:
        error = logits.astype(np.float64) - oracle
        rms, largest = float(np.sqrt(np.mean(error**2))), float(np.abs(error).max())
        same = int((logits.argmax(-1) == oracle.argmax(-1)).sum())
        each = [float(e) for e in np.sqrt(np.mean(error**2, -1))]
        found.append(
            {"engine": engine, "rms": rms, "relative": rms / size, "largest": largest,
             "rms_of_each_token": each, "argmax_agrees": same, "tokens": len(tokens)}
        )  # fmt: skip
        print(engine, f"{rms:.3g}", f"{rms / size:.3g}", f"{largest:.3g}", same, sep=" | ")

    print("engine | rms error | relative | largest | argmax agrees")
    for accumulate in arguments.accumulate:
        judge(f"moefuse {accumulate}", our_logits(arguments.folder, accumulate, tokens))
    for kind in ("ik", "llama"):
        if checkout := getattr(arguments, kind):
            binary = tool(kind, checkout)
            judge(kind, peer_logits(binary, arguments.folder / "model.gguf", tokens, 2))
    if arguments.json:
        arguments.json.write_text(json.dumps({"oracle_rms": size, "engines": found}, indent=1))


if __name__ == "__main__":
    main()
