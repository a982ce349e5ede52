"""A capsule of cells measured once more, and whether each ratio lies where it lay."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import LabError, capsule, checkpoint
from . import prompts as prompt_kinds
from . import variants as specs
from .grid import Grid
from .sweep import load


def rerun(
    path: Path, engine, *, root: Path, model: Path | None = None, prompt_file: Path | None = None,
    **more,
) -> dict:  # fmt: skip
    """Repeat a capsule's cells -> each one's old interval, new ratio and whether it lies inside;
    and stock's rate then and now (tok/s).

    Raises LabError when the model or a prompt is not the capsule's. Writes nothing.
    """
    old = capsule.read(path)
    found = checkpoint.recorded(old["model"], root, model)
    source = prompt_file or prompt_kinds.find_file(found.path, root)
    choose = partial(prompt_kinds.recorded, path=source, records=old["prompts"])
    asked = old["asked"]
    axes = tuple(asked["contexts"]), tuple(asked["batches"])
    wanted = Grid(*axes, asked["tokens"], asked["runs"])
    new = load(found, wanted, engine, choose, **more).walk(specs.parse(old["variant"]))
    both = zip(old["cells"], new, strict=False)  # an incomplete capsule has the first ones alone
    told = [_beside(then, now) for then, now in both if then["void"] is None]
    if not told:
        raise LabError(f"[rerun] {path.name}: expected a measured cell, got none")
    inside = all(cell["inside"] for cell in told)
    return {"capsule": path.name, "variant": old["variant"], "cells": told, "inside": inside}


def _beside(then: dict, now: dict) -> dict:
    low, high = then["interval"]
    new = now.get("decode_speedup")
    return {
        "context": then["context"],
        "batch": then["batch"],
        "old_interval": [low, high],
        "old_speedup": then["decode_speedup"],
        "new_speedup": new,
        "old_stock_tok_s": then["median_baseline_tok_s"],
        "new_stock_tok_s": now.get("median_baseline_tok_s"),
        "old_busy_elsewhere": then["busy_elsewhere"],
        "new_busy_elsewhere": now.get("busy_elsewhere"),
        "inside": now["void"] is None and low <= new <= high,
        "void": now["void"],
    }


def lines(found: dict) -> Iterator[str]:
    """The same for people."""
    for cell in found["cells"]:
        where = f"{found['variant']} context {cell['context']} batch {cell['batch']}"
        if cell["void"] is not None:
            yield f"{where}: void: {cell['void']}"
            continue
        low, high = cell["old_interval"]
        yield (
            f"{where}: new ratio {cell['new_speedup']:.3f}x lies "
            f"{'inside' if cell['inside'] else 'outside'} the old interval {low:.3f}-{high:.3f}; "
            f"stock decodes {cell['new_stock_tok_s']:.1f} tok/s here, "
            f"{cell['old_stock_tok_s']:.1f} there; others kept {_busy(cell, 'new')} processors "
            f"busy here, {_busy(cell, 'old')} there"
        )


def _busy(cell: dict, when: str) -> str:
    busy = cell[f"{when}_busy_elsewhere"]
    return "an unknown number of" if busy is None else f"{busy:.2f}"
