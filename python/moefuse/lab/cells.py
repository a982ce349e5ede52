"""Cells: decode rates by context length and batch, as a capsule, a row and a table hold them.

Nothing here measures. Everything but the seconds follows from them, and `check` sees to it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from math import isclose
from pathlib import Path

from . import LabError, stats
from .notebook import span

KIND = "cells"
SIDES = ("baseline", "again", "patched")  # A, C and B of a pair: stock, stock once more, variant
HEAD = (
    "variant", "context", "batch", "decode", "95 %", "A/A", "tok/s", "same steps", "busy elsewhere",
    "capsule",
)  # fmt: skip


def figures(tokens: int, batch: int, seconds: dict[str, list[float]]) -> dict:
    """Rates (tok/s of all rows together), medians and paired ratios from each run's seconds."""
    rates = {side: [tokens * batch / s for s in seconds[side]] for side in SIDES}
    speedup, interval = stats.ratio_interval(rates["baseline"], rates["patched"])
    _, noise = stats.ratio_interval(rates["baseline"], rates["again"])
    return {
        **{f"{side}_tok_s": rates[side] for side in SIDES},
        **{f"median_{side}_tok_s": statistics.median(rates[side]) for side in SIDES},
        "decode_speedup": speedup,
        "interval": list(interval),
        "aa_interval": list(stats.noise_interval(noise)),
    }


def check(found: dict, name: str) -> None:
    """Raise LabError where a capsule of cells contradicts itself: a cell that is missing or in
    another's place, or a figure that its seconds do not give."""
    asked = found["asked"]
    wanted = list(product(asked["contexts"], asked["batches"]))
    got = [(cell["context"], cell["batch"]) for cell in found["cells"]]
    if got != wanted[: len(got)] or found["complete"] != (len(got) == len(wanted)):
        told = f"expected {'' if found['complete'] else 'the first of '}{_places(wanted)}"
        raise LabError(f"[cells] {name}: {told}, got {_places(got)}")
    for cell in found["cells"]:
        if "seconds" in cell:
            _check_figures(cell, asked, f"{name} context {cell['context']} batch {cell['batch']}")


def _places(pairs: Iterable[tuple[int, int]]) -> str:
    return " ".join(f"{context}x{batch}" for context, batch in pairs)


def _check_figures(cell: dict, asked: dict, where: str) -> None:
    for side in SIDES:
        if len(cell["seconds"][side]) != asked["runs"]:
            count = len(cell["seconds"][side])
            raise LabError(f"[cells] {where} {side}: expected {asked['runs']} runs, got {count}")
    for key, value in figures(asked["tokens"], cell["batch"], cell["seconds"]).items():
        if not _same(value, cell.get(key), exact="interval" not in key):
            raise LabError(f"[cells] {where} {key}: expected {value}, got {cell.get(key)}")


def _same(expected, got, exact: bool) -> bool:
    """Whether figures agree: a bootstrap's ends to 2 %, for its draws are SciPy's to choose."""
    within = 1e-9 if exact else 0.02
    mine, other = ((v if isinstance(v, list) else [v]) for v in (expected, got))
    return len(mine) == len(other) and all(
        isclose(a, b, rel_tol=within) for a, b in zip(mine, other, strict=True)
    )


def row(found: dict) -> dict:
    """What a ledger's row says of the cells."""
    kept = (
        "context", "batch", "void", "median_baseline_tok_s", "median_patched_tok_s",
        "decode_speedup", "interval", "aa_interval",
    )  # fmt: skip
    listed = [{k: cell[k] for k in kept if k in cell} for cell in found["cells"]]
    return {"kind": KIND, "complete": found["complete"], **found["asked"], "cells": listed}


def of(rows: Iterable[dict]) -> list[dict]:
    """The rows of cells among a ledger's."""
    return [row for row in rows if row.get("kind") == KIND]


def without(rows: Iterable[dict]) -> list[dict]:
    """The others: rows of variants in pairs."""
    return [row for row in rows if row.get("kind") != KIND]


def newest(rows: Iterable[dict]) -> list[tuple[dict, dict]]:
    """(row, its capsule's cell) of the newest of each place, as tables list them.

    rows: a ledger's, each with its capsule under "found". A place is a device, model, digest,
    variant, context and batch. What a quick run measured gives way to what a full one did, and a
    void cell to a measured one.
    """
    found: dict[tuple, tuple] = {}
    for row in sorted(of(rows), key=lambda r: r["timestamp"]):
        for cell in row["found"]["cells"]:
            place = (*_model(row), row["variant"], cell["context"], cell["batch"])
            rank = (cell["void"] is None, not row["quick"])
            if place not in found or rank >= found[place][0]:
                found[place] = rank, row, cell
    return [found[place][1:] for place in sorted(found)]


def _model(row: dict) -> tuple[str, str, str]:
    return row["hardware"], row["model_id"], row["model_digest"]


def by_model(rows: Iterable[dict]) -> dict[tuple[str, str, str], list[tuple[dict, dict]]]:
    """(hardware, model, digest) -> its newest (row, cell)."""
    found: dict[tuple, list] = {}
    for row, cell in newest(rows):
        found.setdefault(_model(row), []).append((row, cell))
    return found


def columns(row: dict, cell: dict) -> tuple[str, ...]:
    """A line of a table, by HEAD but for the capsule."""
    where = (f"`{row['variant']}`", str(cell["context"]), str(cell["batch"]))
    if cell["void"] is not None:
        return (*where, f"void: {cell['void']}", *[""] * (len(HEAD) - 5))
    both = (cell["median_baseline_tok_s"], cell["median_patched_tok_s"])
    return (
        *where,
        f"{cell['decode_speedup']:.3f}x",
        span(cell["interval"]),
        span(cell["aa_interval"]),
        " -> ".join(f"{rate:.1f}" for rate in both),
        f"{cell['same_steps']}/{row['tokens']}",
        "-" if cell["busy_elsewhere"] is None else f"{cell['busy_elsewhere']:.2f}",
    )


def lines(rows: Iterable[dict]) -> list[str]:
    """The ranking's part on contexts and batches; none without cells."""
    found = []
    for (hardware, model, digest), here in by_model(rows).items():
        quick = " (quick: a first look)" if any(row["quick"] for row, _ in here) else ""
        found += [
            f"\n## {model} on {hardware}: context and batch{quick}\n",
            f"Checkpoint `{digest[:19]}`; tokens/s of all rows of a batch together; A/A: the two "
            "stock runs of each pair; busy elsewhere: processors that others used meanwhile. These "
            "inform; nothing is promoted by them.\n",
            _line(HEAD),
            _line(["---"] * len(HEAD)),
        ]
        for row, cell in here:
            name = Path(row["capsule"]).stem
            found.append(_line((*columns(row, cell), f"[{name}]({row['capsule']})")))
    return found


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"
