"""Rates that benchmarks/cuda/mlx_lm_decode.py measured, before cells had capsules (cells.py).

They lie as JSON anywhere under a report's folder, with no capsule: one file a run, named
`*mlx_lm_decode*.json` or `*mlx-lm*.json`. Here each becomes cells as a capsule's grid has them.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import LabError, stats

VARIANT = "step"
SIDES = ("stock_tok_s", f"{VARIANT}_tok_s")


def load(out: Path) -> dict[tuple[str, str], list[dict]]:
    """(hardware, model) -> cells by batch and context, the newest of each.

    Raises LabError on a file by such a name that does not hold rates.
    """
    files = {path for name in ("*mlx_lm_decode*", "*mlx-lm*") for path in out.rglob(f"{name}.json")}
    runs = [_read(path) for path in sorted(files)]
    found: dict[tuple[str, str], dict] = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        place = found.setdefault((run["device"], run["model"]), {})
        for cell in run["cells"]:
            place[cell["batch"], cell["context"]] = _cell(cell, run["git_commit"])
    return {key: [cells[at] for at in sorted(cells)] for key, cells in sorted(found.items())}


def _read(path: Path) -> dict:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for key in ("date", "device", "model", "git_commit"):
            if not isinstance(run[key], str):
                raise ValueError(f"{key}: expected text, got {run[key]!r}")
        for cell in run["cells"]:
            if not all(rate > 0 for side in SIDES for rate in cell[side]):
                raise ValueError("cells: expected rates above 0")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LabError(f"[rates] {path.name}: expected decode rates, got {error!r}") from None
    return run


def _cell(cell: dict, commit: str) -> dict:
    stock, step = (cell[side] for side in SIDES)
    speedup, interval = stats.ratio_interval(stock, step)
    return {
        "context": cell["context"],
        "batch": cell["batch"],
        "void": None,
        "baseline_tok_s": stock,
        "patched_tok_s": step,
        "decode_speedup": speedup,
        "interval": list(interval),
        "aa_interval": [min(stock) / max(stock), max(stock) / min(stock)],  # its runs, either way
        "commit": commit,
    }
