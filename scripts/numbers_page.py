"""Fills the tables of docs/NUMBERS.md from the ledger, with python/ on PYTHONPATH."""

from __future__ import annotations

import re
from pathlib import Path

from moefuse.lab import cells, ranking
from moefuse.lab.notebook import span

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "NUMBERS.md"
HEAD = """| device | model | variant | decode | 95 % | A/A | tok/s | fidelity | decision |
|---|---|---|---|---|---|---|---|---|
"""
CELLS_HEAD = (
    "| device | model | variant | context | batch | decode | 95 % | A/A | tok/s | steps | busy |\n"
    + "|---" * 11
    + "|\n"
)
TABLE = re.compile(r"(<!-- table: (full|quick|cells) -->\n).*?(<!-- end -->)", re.S)


def line(row: dict) -> str:
    """A table row from a row of the ledger that carries its capsule."""
    found = row["found"]
    cells = (
        row["hardware"],
        row["model_id"],
        f"`{row['variant']}`",
        f"[{row['decode_speedup']:.3f}x](../benchmarks/{row['capsule']})",
        span(found["summary"]["interval"]),
        span(found["control"]["aa_interval"]),
        f"{row['decode_tps_baseline']:.1f} -> {row['decode_tps_patched']:.1f}",
        f"{row['fidelity']} {found['fidelity']['matched']}/{found['fidelity']['total']}",
        row["decision"],
    )
    return "| " + " | ".join(cells) + " |\n"


def table(rows: list[dict], quick: bool) -> str:
    """Every measured variant, the models in turn and the fastest first; stock itself and the
    rows of checkpoints that another of their name has replaced are left out."""
    current = [r for (earlier, *_), found in ranking.groups(rows) if not earlier for r in found]
    wanted = [r for r in current if bool(r["quick"]) is quick and r["decision"] != "control"]
    wanted.sort(key=lambda r: (r["hardware"], r["model_id"], -r["decode_speedup"]))
    return HEAD + "".join(map(line, wanted))


def cell_line(row: dict, cell: dict) -> str:
    """A table row from a measured cell and its row of the ledger; the link tells the cell."""
    variant, context, batch, decode, *rest = cells.columns(row, cell)
    link = f"[{decode}](../benchmarks/{row['capsule']}#{context}x{batch})"
    words = (row["hardware"], row["model_id"], variant, context, batch, link, *rest)
    return "| " + " | ".join(words) + " |\n"


def cells_table(rows: list[dict]) -> str:
    """The newest of every measured cell; a quick run's are left out."""
    known = [(row, cell) for row, cell in cells.newest(rows) if not row["quick"]]
    return CELLS_HEAD + "".join(cell_line(r, c) for r, c in known if c["void"] is None)


def filled(page: str, rows: list[dict]) -> str:
    """The page with its tables drawn anew."""

    def draw(match: re.Match) -> str:
        kind = match[2]
        drawn = cells_table(rows) if kind == "cells" else table(rows, kind == "quick")
        return match[1] + drawn + match[3]

    return TABLE.sub(draw, page)


if __name__ == "__main__":
    newest, complaints = ranking.load(ROOT / "benchmarks")
    print(*complaints, sep="\n", end="")
    PAGE.write_text(filled(PAGE.read_text(), newest))
