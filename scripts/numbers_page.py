"""Fills the tables of docs/NUMBERS.md from the ledger, with python/ on PYTHONPATH."""

from __future__ import annotations

import re
from pathlib import Path

from moefuse.lab import ranking
from moefuse.lab.notebook import span

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "NUMBERS.md"
HEAD = """| device | model | variant | decode | 95 % | A/A | tok/s | fidelity | decision |
|---|---|---|---|---|---|---|---|---|
"""
TABLE = re.compile(r"(<!-- table: (full|quick) -->\n).*?(<!-- end -->)", re.S)


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


def filled(page: str, rows: list[dict]) -> str:
    """The page with its tables drawn anew."""
    return TABLE.sub(lambda m: m[1] + table(rows, m[2] == "quick") + m[3], page)


if __name__ == "__main__":
    newest, complaints = ranking.load(ROOT / "benchmarks")
    print(*complaints, sep="\n", end="")
    PAGE.write_text(filled(PAGE.read_text(), newest))
