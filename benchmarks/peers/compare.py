"""Decode of one geometry by moefuse and its peers, in alternating rounds: ms a token.

    python benchmarks/peers/compare.py FOLDER --ik CHECKOUT --llama CHECKOUT

`write_gguf.py` writes FOLDER: the same weights for all. Each checkout is built once (CMake,
Release, its own `build-peer` folder). A round runs every engine once, forwards and then backwards;
beside each round stands the machine's own read rate. Prints medians, and beside each the median
over the rounds of its time by moefuse's in the same round; --json writes every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

TOKENS, WARMUP = 48, 8
FLAGS = {"ik": ["-rtr", "1", "-fmoe", "1"], "llama": []}


def build(checkout: Path) -> Path:
    folder = checkout / "build-peer"
    binary = folder / "bin" / "llama-bench"
    if not binary.exists():
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
        options += ["-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        options += ["-DGGML_IQK_FA_ALL_QUANTS=OFF"]  # ik: its attention for float16 caches alone
        subprocess.run(["cmake", "-S", checkout, "-B", folder, *options], check=True)
        subprocess.run(
            ["cmake", "--build", folder, "--target", "llama-bench", "-j", str(os.cpu_count())],
            check=True,
        )
    return binary


def time_peer(binary: Path, gguf: Path, flags: list[str], threads: int) -> float:
    """ms a token: the median of llama-bench's repetitions."""
    command = [binary, "-m", gguf, "-p", "0", "-n", str(TOKENS), "-r", "3", "-t", str(threads)]
    run = subprocess.run([*command, "-o", "json", *flags], check=True, capture_output=True)
    (result,) = json.loads(run.stdout)
    return statistics.median(result["samples_ns"]) / TOKENS / 1e6


def time_moefuse(model: Path, accumulate: str, threads: int) -> float:
    command = [sys.executable, __file__, str(model), "--child", accumulate]
    environment = {**os.environ, "MOEFUSE_NUM_THREADS": str(threads)}
    run = subprocess.run(command, check=True, capture_output=True, env=environment)
    return json.loads(run.stdout)


def decode(folder: Path, accumulate: str) -> float:
    """ms a token through a patched mlx-lm model, in this process: the median of TOKENS.

    Random tokens, one after the other, none of them sampled: as llama-bench has it.
    """
    import mlx.core as mx
    import mlx_lm
    import moefuse
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = mlx_lm.load(str(folder))
    report = moefuse.patch(model, step=True, accumulate=accumulate)
    cache, times = make_prompt_cache(model), []
    draw = random.Random(0)
    for _ in range(WARMUP + TOKENS):
        start = time.perf_counter()
        mx.eval(model(mx.array([[draw.randrange(model.args.vocab_size)]]), cache=cache))
        times.append(time.perf_counter() - start)
    if report.calls.get("step", 0) != WARMUP + TOKENS:
        raise SystemExit(f"the step did not run: {report.calls} {report.fallbacks}")
    return statistics.median(times[WARMUP:]) * 1e3


def measure(arguments) -> list[dict]:
    from moefuse import _core

    peers = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name)}
    binaries = {name: build(checkout) for name, checkout in peers.items()}
    engines = [f"moefuse {mode}" for mode in arguments.accumulate] + list(binaries)
    gguf, samples = arguments.model / "model.gguf", []
    for number in range(arguments.rounds):
        read = _core.read_bandwidth(1 << 30) / 1e9
        for engine in engines if number % 2 == 0 else engines[::-1]:
            for threads in arguments.threads:
                if engine in binaries:
                    flags = FLAGS[engine] + shlex.split(getattr(arguments, f"{engine}_flags"))
                    ms = time_peer(binaries[engine], gguf, flags, threads)
                else:
                    ms = time_moefuse(arguments.model, engine.split()[1], threads)
                samples.append(
                    {"round": number, "engine": engine, "threads": threads, "ms": ms, "read": read}
                )
                print(f"round {number}: {engine}, {threads} threads: {ms:.2f} ms", file=sys.stderr)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ik", type=Path, help="a checkout of ik_llama.cpp")
    parser.add_argument("--llama", type=Path, help="a checkout of llama.cpp")
    for peer in FLAGS:
        parser.add_argument(f"--{peer}-flags", default="", help="more flags for its llama-bench")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accumulate", nargs="+", default=["fp32_no_fma"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(decode(arguments.model, arguments.child))
        return
    samples = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(samples, indent=1))
    print("engine | threads | median ms | rounds' range | by moefuse's")
    times = {(s["engine"], s["threads"], s["round"]): s["ms"] for s in samples}
    base = f"moefuse {arguments.accumulate[0]}"
    for engine, threads in dict.fromkeys((s["engine"], s["threads"]) for s in samples):
        rounds = range(arguments.rounds)
        ms = [times[engine, threads, r] for r in rounds]
        ratio = statistics.median(ms[r] / times[base, threads, r] for r in rounds)
        spread = f"{min(ms):.2f}-{max(ms):.2f}"
        print(engine, threads, f"{statistics.median(ms):.2f}", spread, f"{ratio:.3f}", sep=" | ")
    reads = [s["read"] for s in samples]
    print(f"read, GB/s, all threads: {min(reads):.1f}-{max(reads):.1f}")


if __name__ == "__main__":
    main()
