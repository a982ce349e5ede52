"""Sweeps: a variant beside stock over context lengths and batches, each run a capsule of cells.

The capsule is on disk from the first cell on and whole after each, so that a stop leaves what was
measured; the ledger's row and the notebook's entry come at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx

from . import capsule, cells, environment, files, grid, ledger, measure, notebook, resume
from . import checkpoint as checkpoints
from . import prompts as prompt_kinds
from .grid import Grid
from .variants import Variant

LETTERS = "ABC"  # of a pair: stock, the variant, stock once more
SIDE_OF = dict(zip("ACB", cells.SIDES, strict=True))
NOTABLE = 0.1  # processors; less is the system's own
LEAST_TOKENS, LEAST_RUNS = 64, 2  # fewer are a first look


@dataclass
class Sweep:
    """One loaded model, what its contexts are made of, and which cells are wanted."""

    checkpoint: checkpoints.Checkpoint
    model: object
    prompts: list[prompt_kinds.Prompt]
    grid: Grid
    engine: object
    tick: Callable[[int], None] = lambda units: None
    say: Callable[[str], None] = lambda line: None

    def walk(self, variant: Variant, late: Callable[[], bool] = lambda: False) -> Iterator[dict]:
        """The cells in order, none once it is late. One that cannot run is void and says why."""
        for context in self.grid.contexts:
            ids = grid.context_ids(self.prompts, context)
            cache = None
            for batch in self.grid.batches:
                if late():
                    return
                try:
                    cache = cache or measure.prefill(self.model, ids)[0]
                    found = self._cell(cache, ids, batch, variant)
                except RuntimeError as error:
                    found = {"void": str(error)[:200]}
                found = {"context": context, "batch": batch, **found}
                self.say(f"{variant.name} context {context} batch {batch}: {_told(found)}")
                self.tick(1)
                yield found
            del cache
            mx.clear_cache()

    def _cell(self, cache, ids, batch: int, variant: Variant) -> dict:
        before = measure.processor_time()
        sides = grid.run_cell(
            self.model, cache, ids, batch, self.grid, variant, self.engine, LETTERS
        )
        elsewhere = measure.busy_elsewhere(before, measure.processor_time())
        a, b, c = (sides[letter] for letter in LETTERS)
        seconds = {name: sides[letter].seconds for letter, name in SIDE_OF.items()}
        return {
            "void": grid.void(variant, b, self.checkpoint.moe_layers),
            "seconds": seconds,
            **cells.figures(self.grid.tokens, batch, seconds),
            "same_steps": a.same_steps(b),
            "again_same_steps": a.same_steps(c),
            "peak_mem_gb": {"baseline": max(a.peak, c.peak), "patched": b.peak},
            "calls": b.calls,
            "busy_elsewhere": elsewhere,
        }


def _told(cell: dict) -> str:
    if cell["void"] is not None:
        return f"void: {cell['void']}"
    return (
        f"{cell['median_baseline_tok_s']:.1f} -> {cell['median_patched_tok_s']:.1f} tok/s, "
        f"{cell['decode_speedup']:.3f}x{_beside_others(cell)}"
    )


def _beside_others(cell: dict) -> str:
    """Ratios of a machine that others share are not those of one at rest."""
    busy = cell.get("busy_elsewhere") or 0.0
    return f" (others kept {busy:.2f} processors busy)" if busy >= NOTABLE else ""


def load(
    found: checkpoints.Checkpoint, wanted: Grid, engine, choose: Callable[..., list], **more
) -> Sweep:
    """A sweep of a checked model. choose: tokenizer -> the prompts that contexts are made of."""
    found.digest_early()
    model, tokenizer = checkpoints.load(found)
    short = prompt_kinds.pick(choose(tokenizer), long=False)
    return Sweep(found, model, short, wanted, engine, **more)


def chooser(
    found: checkpoints.Checkpoint, prompt_file: Path | None, root: Path
) -> Callable[..., list[prompt_kinds.Prompt]]:
    """What makes a tokenizer the model's prompts."""
    return partial(prompt_kinds.load, path=prompt_file or prompt_kinds.find_file(found.path, root))


@dataclass(frozen=True)
class Record:
    """Where a sweep's capsules go, and what they say of how to repeat it."""

    root: Path
    out: Path
    command: str
    begun: str = field(default_factory=environment.now)

    def run(self, sweep: Sweep, variant: Variant, deadline: float | None = None) -> dict | None:
        """Measure and record a variant -> its capsule; None if there was no time for a cell.

        After the deadline (time.monotonic) no cell is started. What a stop leaves is recorded too,
        as incomplete.
        """
        found = self._empty(sweep, variant)
        name = f"{found['meta']['campaign']}-{variant.slug}"
        try:
            for cell in sweep.walk(variant, partial(_late, deadline)):
                found["cells"].append(cell)
                found["complete"] = len(found["cells"]) == sweep.grid.size
                capsule.write(self.out, name, found, again=len(found["cells"]) > 1)
        finally:
            relative = f"{capsule.FOLDER}/{name}.json"
            if found["cells"] and (self.out / relative).exists():
                enter(self.out, relative)
        return found if found["cells"] else None

    def _empty(self, sweep: Sweep, variant: Variant) -> dict:
        wanted = sweep.grid
        quick = wanted.tokens < LEAST_TOKENS or wanted.runs < LEAST_RUNS
        stamp = environment.stamp(self.begun)
        return {
            "kind": cells.KIND,
            "meta": {
                **environment.meta(sweep.engine, self.root, self.command),
                "campaign": f"{stamp}-{sweep.checkpoint.name}{'-quick' * quick}-cells",
                "quick": quick,
                "memory_source": measure.memory_source(),
            },
            "model": sweep.checkpoint.record(self.root),
            "prompts": [prompt.record() for prompt in sweep.prompts],
            "variant": variant.name,
            "asked": {
                "contexts": list(wanted.contexts),
                "batches": list(wanted.batches),
                "tokens": wanted.tokens,
                "runs": wanted.runs,
            },
            "complete": False,
            "cells": [],
        }


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def enter(out: Path, relative: str) -> str:
    """Put a stored capsule into the ledger, if it is not there, and its run into the notebook;
    returns the run's name."""
    row = capsule.row(capsule.read(files.inside(out, relative)), relative)
    rows, _ = ledger.read(out / ledger.NAME)
    if relative not in {known["capsule"] for known in rows}:
        ledger.append(out / ledger.NAME, row)
        rows.append(row)
    name = row["campaign"]
    mine = [known["capsule"] for known in cells.of(rows) if known["campaign"] == name]
    found = [capsule.read(files.inside(out, stored)) for stored in mine]
    notebook.add(out / notebook.NAME, name, notebook.cells_entry(found))
    return name


def write_up(out: Path) -> list[str]:
    """Enter what a stop left without a row or an entry; returns the runs' names."""
    written = notebook.read(out)
    missing = cells.of(resume.unlisted(out))
    rows, _ = ledger.read(out / ledger.NAME)
    missing += [r for r in cells.of(rows) if not notebook.of_campaign(written, r["campaign"])]
    return list(dict.fromkeys(enter(out, row["capsule"]) for row in missing))


def lines(found: Sequence[dict]) -> Iterator[str]:
    """What a run left, for people."""
    for one in found:
        told = "" if one["complete"] else " (incomplete)"
        yield f"{one['meta']['campaign']} {one['variant']} on {one['meta']['device']}{told}"
        for cell in one["cells"]:
            yield f"  context {cell['context']} batch {cell['batch']}: {_told(cell)}"
