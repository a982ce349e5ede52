"""Writes docs/COVERAGE.md: of all that benchmarks/asked.json asks for, the capsule or the reason.

With python/ on PYTHONPATH. Raises ValueError where something asked for has neither.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from moefuse.lab import cells, ranking
from moefuse.lab.notebook import span

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "COVERAGE.md"
HEAD = """# What was asked for, and what there is

Written by `scripts/coverage_page.py` from the ledger and [asked.json](../benchmarks/asked.json); do
not edit. Each variant and each cell on each device has a row, or the reason why it has none, or
none of the whole model. A gain counts only above the A/A interval; decisions and the reject list
are in [RANKING.md](../benchmarks/RANKING.md).
"""


def find(rows: list[dict], hardware: str, model: str, variant: str) -> dict | None:
    """The row that says most: of the whole model before fewer layers, full before quick, newest."""
    size = re.compile(re.escape(model) + r"(-\d+-layers(-float32)?)?")
    fit = [
        row
        for row in cells.without(rows)
        if row["hardware"].startswith(hardware)
        and size.fullmatch(row["model_id"])
        and row["variant"].split(":")[0] == variant
        and not row["decision"].startswith("void")
    ]
    order = [(r["model_id"] == model, not r["quick"], r["timestamp"]) for r in fit]
    return fit[order.index(max(order))] if fit else None


class Reasons:
    """The file's reasons, the first that fits; which of them were needed."""

    def __init__(self, known: list[dict]):
        self.known, self.used = known, set()

    def of(self, device: str, model: str, what: str) -> str:
        for i, r in enumerate(self.known):
            if r["device"] != device or r.get("model", model) != model:
                continue
            if what in r.get("what", [what]):
                self.used.add(i)
                return f"{r['why']} ([there](../{r['see']}))"
        raise ValueError(f"[coverage] {device}, {model}, {what}: expected a row or a reason")

    def unused(self) -> list[dict]:
        return [r for i, r in enumerate(self.known) if i not in self.used]


def shown(row: dict) -> str:
    """A row's ratio with its link, intervals, size and decision."""
    found = row["found"]
    size = row["model_id"] + (", quick" if row["quick"] else "")
    ratio = f"[{row['decode_speedup']:.3f}x](../benchmarks/{row['capsule']})"
    within = f"{span(found['summary']['interval'])}; A/A {span(found['control']['aa_interval'])}"
    return f"`{row['variant']}` {ratio} ({within}), {size}: {row['decision']}"


def variants(asked: dict, rows: list[dict], reasons: Reasons, device: str, model: str) -> str:
    lines = []
    for variant in asked["variants"]:
        row = find(rows, asked["devices"][device], model, variant)
        whole = row is not None and row["model_id"] == model and not row["quick"]
        why = "" if whole else reasons.of(device, model, variant)
        lines.append((variant, shown(row) if row else "none", why))
    if len({line[1:] for line in lines}) == 1:
        return f"No variant: {lines[0][2]}.\n"
    text = "| variant | row | why no more |\n|---|---|---|\n"
    return text + "".join(f"| `{variant}` | {row} | {why} |\n" for variant, row, why in lines)


def grid(asked: dict, rows: list[dict], reasons: Reasons, device: str, model: str) -> str:
    """Cells of the step by context (down) and batch."""
    known = {
        (cell["context"], cell["batch"]): f"[{cell['decode_speedup']:.3f}x]"
        f"(../benchmarks/{row['capsule']}#{cell['context']}x{cell['batch']})"
        for row, cell in cells.newest(rows)
        if row["hardware"].startswith(asked["devices"][device])
        and row["model_id"] == model
        and cell["void"] is None
    }
    places = [(c, b) for c in asked["contexts"] for b in asked["batches"]]
    text = "" if all(p in known for p in places) else reasons.of(device, model, "cells")
    if not any(p in known for p in places):
        return f"Context and batch: {text}.\n"
    batches = asked["batches"]
    text = f"Context and batch{': ' + text if text else ''}.\n\n"
    text += "| context | " + " | ".join(f"{b} rows" for b in batches) + " |\n"
    text += "|---" * (len(batches) + 1) + "|\n"
    for context in asked["contexts"]:
        line = [known.get((context, b), "none") for b in batches]
        text += f"| {context:,} | " + " | ".join(line) + " |\n"
    return text


def page(asked: dict, rows: list[dict]) -> str:
    """The page. Raises ValueError on what has neither, and on a reason that nothing needs."""
    reasons, text = Reasons(asked["reasons"]), HEAD
    for device in asked["devices"]:
        for model in asked["models"]:
            text += f"\n## {model} on {device}\n"
            text += variants(asked, rows, reasons, device, model)
            text += "\n" + grid(asked, rows, reasons, device, model)
    if left := reasons.unused():
        raise ValueError(f"[coverage] reasons: expected each to be needed, not {left[0]}")
    text += "\n## Beside them\n| what | what there is |\n|---|---|\n"
    for b in asked["beside"]:
        text += f"| {b['what']} | {b['text']} ([there](../{b['see']})) |\n"
    return text


def asked() -> dict:
    return json.loads((ROOT / "benchmarks" / "asked.json").read_text())


if __name__ == "__main__":
    newest, complaints = ranking.load(ROOT / "benchmarks")
    print(*complaints, sep="\n", end="")
    PAGE.write_text(page(asked(), newest))
