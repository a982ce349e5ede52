"""Decode rate against context length and batch, prefill apart: cells beside the main pairs.

Every row of a batch starts from the same prompt's cache, which stock computed once, but from a
token of its own: the rows route to different experts, as they would with different prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generation_stream

from . import LabError, measure, stats
from .prompts import Prompt
from .variants import STOCK, Variant, applied, did_not_run

MAX_BATCH = 64
WARMUP_TOKENS = 4


@dataclass(frozen=True)
class Grid:
    """contexts: prompt lengths in tokens; batches: rows; runs: pairs of each cell."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    tokens: int = 64
    runs: int = 2

    @property
    def size(self) -> int:
        """Cells."""
        return len(self.contexts) * len(self.batches)

    @property
    def units(self) -> int:
        """Token steps of one variant, for a progress bar."""
        decoded = len(self.batches) * 2 * self.runs * self.tokens
        return sum(2 * context + decoded for context in self.contexts)


def parse(contexts: str | None, batches: str | None) -> Grid | None:
    """`128,1k,8k` and `1,2,4` -> the grid; without both there is none."""
    if contexts is None and batches is None:
        return None
    return Grid(
        _numbers(contexts or "128", "--context", 2, 1 << 20),
        _numbers(batches or "1", "--batch", 1, MAX_BATCH),
    )


def _numbers(text: str, option: str, least: int, most: int) -> tuple[int, ...]:
    found = []
    for word in text.lower().split(","):
        digits, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        number = int(digits) * factor if digits.isdigit() else 0
        if not least <= number <= most:
            expected = f"expected numbers from {least} to {most} like 4,1k"
            raise LabError(f"[bench] {option}: {expected}, got {text!r}")
        found.append(number)
    return tuple(dict.fromkeys(found))


def context_ids(prompts: Sequence[Prompt], length: int) -> tuple[int, ...]:
    """The prompts one after the other, over and over, cut to `length` tokens."""
    ids = [token for prompt in prompts for token in prompt.ids]
    return tuple((ids * (length // len(ids) + 1))[:length])


def _repeat(leaf, rows: int):
    return mx.repeat(leaf, rows, axis=0) if isinstance(leaf, mx.array) else leaf


def _widen(model, cache: list, rows: int) -> list:
    """A copy of a one-row cache with `rows` equal rows."""
    copied = measure.copy_cache(model, cache)
    if rows > 1:
        for part in copied:
            part.state = tree_map(partial(_repeat, rows=rows), part.state)
    mx.eval([part.state for part in copied])
    return copied


def _decode(model, cache: list, first: Sequence[int], count: int):
    """Greedy: (seconds of `count` steps, tokens of every step); the next step is always queued."""
    token = mx.array(list(first))
    steps = []
    with mx.stream(generation_stream):
        begin = time.perf_counter()
        for _ in range(count):
            token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
            mx.async_eval(token)
            steps.append(token)
            if len(steps) > 1:
                mx.eval(steps[-2])
        mx.eval(token)
        seconds = time.perf_counter() - begin
    return seconds, [step.tolist() for step in steps]


class Side:
    """What one side of a cell showed: seconds, tokens of each step, peak memory, counters."""

    def __init__(self):
        self.seconds, self.tokens, self.peak, self.calls, self.decoded = [], [], 0.0, {}, 0

    def run(self, model, variant: Variant, engine, cache, first, tokens: int) -> None:
        with applied(model, variant, engine) as report:
            _decode(model, _widen(model, cache, len(first)), first, WARMUP_TOKENS)
            own = _widen(model, cache, len(first))
            before = dict(report.calls) if report else {}
            source = measure.memory_source()
            measure.reset_peak(source)
            seconds, found = _decode(model, own, first, tokens)
            self.peak = max(self.peak, measure.peak_gb(source))
            for name, calls in (report.calls if report else {}).items():
                self.calls[name] = self.calls.get(name, 0) + calls - before.get(name, 0)
        self.decoded += tokens
        self.seconds.append(seconds)
        self.tokens.append(found)

    def same_steps(self, other: Side) -> int:
        """Steps whose tokens, of every row, are the other's in the first run of each."""
        return sum(x == y for x, y in zip(self.tokens[0], other.tokens[0], strict=True))


def run_cell(
    model, cache, ids, batch: int, grid: Grid, variant: Variant, engine, letters: str = "AB"
) -> dict[str, Side]:
    """The pairs of one context and batch, every other one backwards, by letter: B is the variant,
    others are stock."""
    first = [ids[-1 - row % len(ids)] for row in range(batch)]
    sides = {letter: Side() for letter in letters}
    for i in range(grid.runs):
        for letter in letters if i % 2 == 0 else reversed(letters):
            which = variant if letter == "B" else STOCK
            sides[letter].run(model, which, engine, cache, first, grid.tokens)
    return sides


def void(variant: Variant, side: Side, layers: int) -> str | None:
    """Why a cell says nothing, or None where the variant really ran."""
    return did_not_run(variant, side.calls, side.decoded, layers, prompts=False)


def _cell(model, cache, ids, batch: int, grid: Grid, variant: Variant, engine, layers: int):
    """One context and batch, A B B A."""
    sides = run_cell(model, cache, ids, batch, grid, variant, engine)
    a, b = sides["A"], sides["B"]
    rates = [[grid.tokens * batch / s for s in side.seconds] for side in (a, b)]
    speedup, interval = stats.ratio_interval(*rates)
    return {
        "context": len(ids),
        "batch": batch,
        "baseline_tok_s": rates[0],
        "patched_tok_s": rates[1],
        "decode_speedup": speedup,
        "interval": list(interval),
        "same_steps": a.same_steps(b),
        "peak_mem_gb": {"baseline": a.peak, "patched": b.peak},
        "void": void(variant, b, layers),
    }


def measure_grid(model, prompts, grid: Grid, variant: Variant, engine, layers: int) -> dict:
    """The capsule's `grid`. A cell that the machine cannot run is void and says why."""
    cells, prefills = [], []
    for context in grid.contexts:
        ids = context_ids(prompts, context)
        try:
            cache, seconds = measure.prefill(model, ids)
            with applied(model, variant, engine):
                _, patched = measure.prefill(model, ids)
        except RuntimeError as error:
            cells.append({"context": context, "batch": grid.batches[0], "void": str(error)[:200]})
            continue
        rates = [(context - 1) / s for s in (seconds, patched)]
        prefills.append({"context": context, "baseline_tok_s": rates[0], "patched_tok_s": rates[1]})
        for batch in grid.batches:
            try:
                cells.append(_cell(model, cache, ids, batch, grid, variant, engine, layers))
            except RuntimeError as error:
                cells.append({"context": context, "batch": batch, "void": str(error)[:200]})
        del cache
        mx.clear_cache()
    return {"tokens": grid.tokens, "runs": grid.runs, "cells": cells, "prefill": prefills}
