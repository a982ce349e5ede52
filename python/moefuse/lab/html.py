"""The HTML report: one self-contained file with the ranking's tables and plots of intervals."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from . import cells, ranking, rates, roofline, stats
from .notebook import span

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 86rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
        display: block; overflow-x: auto }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left;
         white-space: nowrap }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
.promote { color: #177a3a; font-weight: 600 } .reject, .void { color: #b3261e }
"""
COLOURS = {"promote": "#177a3a", "hold": "#8a6d00", "reject": "#b3261e", "control": "#555555"}
WIDE = 8.0  # ratios beyond this are drawn on a logarithmic axis


def _svg(figure) -> str:
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "moefuse", "svg.fonttype": "none"}):
        figure.tight_layout()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = target.getvalue()
    return text[text.index("<svg") :]


def plot(rows: Sequence[dict]) -> str:
    """SVG: each variant's ratio with its interval, over the band of the A/A control."""
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.38 * len(rows)))
    for y, row in enumerate(reversed(rows)):
        found = row["found"]
        low, high = found["summary"]["interval"]
        colour = COLOURS.get(row["decision"], COLOURS["reject"])
        axes.plot([low, high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([row["decode_speedup"]], [y], "o", color=colour, markersize=6)
        aa = found["control"]["aa_interval"]
        axes.fill_betweenx([y - 0.4, y + 0.4], *aa, color="#999999", alpha=0.3, linewidth=0)
    axes.axvline(1.0, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in reversed(rows)])
    if max(row["found"]["summary"]["interval"][1] for row in rows) > WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("decode rate, patched / stock (grey: A/A control)")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def plot_ceiling(rows: Sequence[dict]) -> str:
    """SVG: what part of a plain read's rate each side's decoding reaches; nothing if unknown."""
    known = [row for row in rows if roofline.share(row["found"], "patched") is not None]
    if not known:
        return ""
    figure, axes = plt.subplots(figsize=(9, 1.1 + 0.38 * len(known)))
    for y, row in enumerate(reversed(known)):
        both = [100 * roofline.share(row["found"], side) for side in ("baseline", "patched")]
        axes.barh(y, both[1], color=COLOURS.get(row["decision"], COLOURS["reject"]), height=0.6)
        axes.plot([both[0]] * 2, [y - 0.4, y + 0.4], color="#555555", linewidth=1.5)
        axes.annotate(f" {both[1]:.1f} %", (max(both), y), va="center")
    axes.set_yticks(range(len(known)), [row["variant"] for row in reversed(known)])
    axes.set_xlim(0, 115)
    axes.set_xlabel("weights read per second, % of a plain read (line: stock)")
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def plot_grid(rows: Sequence[dict]) -> str:
    """SVG: decode rate against context at each batch, stock and variants; nothing if unmeasured."""
    known = [row for row in rows if row["found"].get("grid") and not ranking.is_control(row)]
    points = [(r["variant"], c) for r in known for c in _measured(r["found"])]
    if not points:
        return ""
    batches = sorted({cell["batch"] for _, cell in points})
    names = list(dict.fromkeys(name for name, _ in points))
    figure, plots = plt.subplots(
        1, len(batches), figsize=(1.5 + 3.6 * len(batches), 3.4), sharey=True, squeeze=False
    )
    for axes, batch in zip(plots[0], batches, strict=True):
        for number, name in enumerate(["stock", *names]):
            side = "baseline_tok_s" if name == "stock" else "patched_tok_s"
            of = names[0] if name == "stock" else name
            mine = [c for who, c in points if who == of and c["batch"] == batch]
            colour = "#555555" if name == "stock" else f"C{number - 1}"
            _rates(axes, sorted(mine, key=lambda c: c["context"]), side, name, colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.set_xlabel("context, tokens")
        axes.spines[["top", "right"]].set_visible(False)
    plots[0][0].set_ylabel("tokens/s, all rows")
    plots[0][-1].legend(frameon=False, fontsize=9)
    return _svg(figure)


def _measured(found: dict) -> list[dict]:
    return [cell for cell in found["grid"]["cells"] if cell["void"] is None]


def _rates(axes, points: Sequence[dict], side: str, name: str, colour: str) -> None:
    """One line with the span of the runs at each point."""
    middle = [statistics.median(cell[side]) for cell in points]
    span = [
        [m - min(cell[side]) for m, cell in zip(middle, points, strict=True)],
        [max(cell[side]) - m for m, cell in zip(middle, points, strict=True)],
    ]
    at = [cell["context"] for cell in points]
    axes.errorbar(at, middle, span, label=name, color=colour, marker="o", markersize=4, capsize=3)


def _table(rows: Sequence[dict]) -> str:
    names = [*ranking.COLUMNS[:-1], "of a plain read"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = []
    for rank, row in enumerate(rows, 1):
        part = roofline.share(row["found"], "patched")
        words = [*ranking.columns(str(rank), row)[:-1], "-" if part is None else f"{part:.1%}"]
        kind = escape(row["decision"].split(":")[0])
        tds = "".join(f"<td>{escape(word.strip('`'))}</td>" for word in words)
        body.append(f'<tr class="{kind}">{tds}</tr>')
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _grid_table(rows: Sequence[dict]) -> str:
    """Every cell of every variant beside stock against itself there, void ones with the reason."""
    control = next((row for row in rows if ranking.is_control(row)), None)
    noise = {
        (cell["context"], cell["batch"]): stats.noise_interval(cell["interval"])
        for cell in (_measured(control["found"]) if control and "grid" in control["found"] else ())
    }
    body = []
    for row in rows:
        for cell in row["found"].get("grid", {}).get("cells", []):
            where = [row["variant"], str(cell["context"]), str(cell["batch"])]
            if cell["void"] is None:
                both = [statistics.median(cell[f"{k}_tok_s"]) for k in ("baseline", "patched")]
                aa = cell.get("aa_interval") or noise.get((cell["context"], cell["batch"]))
                where += [f"{both[0]:.1f} -> {both[1]:.1f}", f"{cell['decode_speedup']:.3f}x"]
                where += [span(cell["interval"]), span(aa) if aa else "-"]
            else:
                where += [f"void: {cell['void']}", "", "", ""]
            where.append(cell.get("commit", row["found"].get("meta", {}).get("git_commit")) or "-")
            body.append("<tr>" + "".join(f"<td>{escape(w)}</td>" for w in where) + "</tr>")
    if not body:
        return ""
    names = ("variant", "context", "batch", "tok/s", "decode", "95 %", "A/A", "commit")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h3>Context and batch</h3><table><tr>{head}</tr>{''.join(body)}</table>"


def _rates_section(found: Sequence[dict]) -> str:
    """Rates without a capsule, drawn and listed as a grid's."""
    told = "By benchmarks/cuda/mlx_lm_decode.py, A B B A, no capsule; A/A: stock's own two runs."
    return _apart({rates.VARIANT: list(found)}, told)


def _cells_section(found: Sequence[tuple[dict, dict]]) -> str:
    """A model's cells, drawn and listed as a grid's."""
    by_variant: dict[str, list[dict]] = {}
    for row, cell in found:
        here = {**cell, "commit": row["git_commit"]}
        by_variant.setdefault(row["variant"], []).append(here)
    names = ", ".join(dict.fromkeys(Path(row["capsule"]).stem for row, _ in found))
    told = (
        f"By moefuse cells, A B C and C B A; A/A: the two stock runs of a pair. Capsules: {names}."
    )
    return _apart(by_variant, told)


def _apart(by_variant: Mapping[str, list[dict]], told: str) -> str:
    """Cells that no campaign measured: their table, where they are from, and their plot."""
    rows = [
        {"variant": name, "decision": "", "found": {"grid": {"cells": listed}}}
        for name, listed in by_variant.items()
    ]
    return f"{_grid_table(rows)}<p>{escape(told)}</p>{plot_grid(rows)}"


def _reasons(rows: Sequence[dict]) -> str:
    items = [
        f"<li><b>{escape(row['variant'])}</b>: {escape(row['decision'])}; "
        f"{escape(row['reason'])}</li>"
        for row in rows
    ]
    return f"<ul>{''.join(items)}</ul>"


def render(rows: Sequence[dict], apart: Mapping[tuple[str, str], list[dict]] | None = None) -> str:
    """The whole page from `ranking.load`'s rows and `rates.load`'s cells."""
    parts, left = ["<h1>moefuse ranking</h1>"], {}
    for (hardware, model, _), found in cells.by_model(rows).items():
        left.setdefault((hardware, model), []).append(_cells_section(found))
    for at, found in (apart or {}).items():
        left.setdefault(at, []).append(_rates_section(found))
    for key, found in ranking.groups(rows):
        _, _, hardware, model, _ = key
        parts += [
            f"<h2>{escape(ranking.title(key))}</h2>",
            plot(found),
            _table(found),
            plot_ceiling(found),
        ]
        parts += [_grid_table(found), plot_grid(found), _reasons(found)]
        parts += left.pop((hardware, model), [])
    for (hardware, model), sections in sorted(left.items()):
        parts += [f"<h2>{escape(f'{model} on {hardware}')}</h2>", *sections]
    if not rows:
        parts.append("<p>No capsule yet.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>moefuse ranking</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
