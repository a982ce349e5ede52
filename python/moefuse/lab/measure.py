"""One timed generation through mlx-lm's own generate_step, and what it cost in memory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
STAT = Path("/proc/stat")
WARMUP_TOKENS = 4
PREFILL_CHUNK = 2048  # prompt tokens at once, as mlx-lm has it


@dataclass(frozen=True)
class Run:
    """Greedy generation of `len(tokens)` tokens; times in seconds, memory in GB (1e9 bytes)."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_s: float | None  # all prompt tokens but the last; None: their cache was handed in
    first_token_s: float  # from the end of prefill
    decode_s: float  # the tokens after the first
    peak_mem_gb: float
    peak_mlx_gb: float

    @property
    def decode_tok_s(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s

    @property
    def prefill_tok_s(self) -> float | None:
        return None if self.prefill_s is None else (self.prompt_tokens - 1) / self.prefill_s


def rss_is_resettable() -> bool:
    """Whether the kernel lets a process reset its peak resident set."""
    try:
        CLEAR_REFS.write_text("5")
        return "VmHWM" in STATUS.read_text()
    except OSError:
        return False


def memory_source() -> str:
    """Which peak `peak_mem_gb` holds: the process's on CPU, MLX's where weights lie elsewhere."""
    on_cpu = mx.default_device().type == mx.cpu
    return "rss" if on_cpu and rss_is_resettable() else "mlx"


def reset_peak(source: str) -> None:
    mx.clear_cache()
    mx.reset_peak_memory()
    if source == "rss":
        CLEAR_REFS.write_text("5")


def peak_gb(source: str) -> float:
    if source == "mlx":
        return mx.get_peak_memory() / 1e9
    line = next(ln for ln in STATUS.read_text().splitlines() if ln.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def processor_time() -> tuple[float, float, float] | None:
    """(now, busy time of all processors, of this process) in seconds; None where none is told."""
    try:
        user, nice, system, _, _, *more = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + sum(more[:3])  # interrupts, and what a host took for others
    own = os.times()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own.user + own.system


def busy_elsewhere(before: tuple | None, after: tuple | None) -> float | None:
    """How many processors others kept busy in between two `processor_time`s, on average."""
    if before is None or after is None:
        return None
    wall, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return round(max(0.0, busy - own) / wall, 2)


def copy_cache(model, cache: list) -> list:
    """A cache that starts where `cache` is; decoding into it leaves the original alone."""
    fresh = make_prompt_cache(model)
    for new, old in zip(fresh, cache, strict=True):
        # mx.array(a) is a new handle: the cache writes into its handle in place.
        new.state = tree_map(lambda a: mx.array(a) if isinstance(a, mx.array) else a, old.state)
    return fresh


def prefill(model, prompt: Sequence[int], chunk: int = PREFILL_CHUNK) -> tuple[list, float]:
    """Cache holding all but the last prompt token, and the seconds that took."""
    cache = make_prompt_cache(model)
    ids = mx.array(list(prompt[:-1]))
    begin = time.perf_counter()
    with mx.stream(generation_stream):
        for at in range(0, ids.size, chunk):
            model(ids[at : at + chunk][None], cache=cache)
            mx.eval([c.state for c in cache])
    return cache, time.perf_counter() - begin


def generate(
    model,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    cache: list | None = None,
    on_token: Callable[[], None] | None = None,
) -> Run:
    """Greedy decode of exactly `max_tokens` tokens (an end-of-text token does not stop it).

    With `cache` (all but the last prompt token, see `prefill`) only decoding is timed.
    """
    source = memory_source()
    marks: list[float] = []
    steps = generate_step(
        mx.array(list(prompt if cache is None else prompt[-1:])),
        model,
        max_tokens=max_tokens,
        prompt_cache=None if cache is None else copy_cache(model, cache),
        prompt_progress_callback=lambda done, _: marks.append(time.perf_counter()),
    )
    gc.collect()
    gc.disable()  # a collection inside one run of a pair would be charged to its side
    try:
        with wired_limit(model, [generation_stream]):
            reset_peak(source)
            tokens = []
            begin = time.perf_counter()
            for token, _ in steps:
                if not tokens:
                    first = time.perf_counter()
                tokens.append(token)
                if on_token:
                    on_token()
            end = time.perf_counter()
    finally:
        gc.enable()
    prefilled = marks[-2] if cache is None else begin  # the last mark is the first token
    return Run(
        tokens=tuple(tokens),
        prompt_tokens=len(prompt),
        prefill_s=prefilled - begin if cache is None else None,
        first_token_s=first - prefilled,
        decode_s=end - first,
        peak_mem_gb=peak_gb(source),
        peak_mlx_gb=mx.get_peak_memory() / 1e9,
    )


def warm_up(model, prompt: Sequence[int]) -> None:
    """An untimed short generation: first calls pay for page faults, threads and compilation.

    A GPU compiles kernels per shape, so there the whole prompt is run.
    """
    on_gpu = mx.default_device().type == mx.gpu
    short = list(prompt) if on_gpu else list(prompt[:WARMUP_TOKENS])
    for _ in generate_step(mx.array(short), model, max_tokens=WARMUP_TOKENS):
        pass
