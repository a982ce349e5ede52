"""The HTML report: one self-contained file with the ranking's tables and plots of intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from . import ranking

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #8884; text-align: left;
         white-space: nowrap }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
.promote { color: #177a3a; font-weight: 600 } .reject, .void { color: #b3261e }
"""
COLOURS = {"promote": "#177a3a", "hold": "#8a6d00", "reject": "#b3261e", "control": "#555555"}


def plot(rows: Sequence[dict]) -> str:
    """SVG: each variant's ratio with its interval, over the band of the A/A control."""
    settings = {"svg.hashsalt": "moefuse", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
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
        axes.set_xlabel("decode rate, patched / stock (grey: A/A control)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    text = target.getvalue()
    return text[text.index("<svg") :]


def _table(rows: Sequence[dict]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ranking.COLUMNS[:-1])
    body = []
    for rank, row in enumerate(rows, 1):
        cells = ranking._cells(str(rank), row)[:-1]
        kind = escape(row["decision"].split(":")[0])
        tds = "".join(f"<td>{escape(cell.strip('`'))}</td>" for cell in cells)
        body.append(f'<tr class="{kind}">{tds}</tr>')
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _reasons(rows: Sequence[dict]) -> str:
    items = [
        f"<li><b>{escape(row['variant'])}</b>: {escape(row['decision'])}; "
        f"{escape(row['reason'])}</li>"
        for row in rows
    ]
    return f"<ul>{''.join(items)}</ul>"


def render(rows: Sequence[dict]) -> str:
    """The whole page from `ranking.load`'s rows."""
    parts = ["<h1>moefuse ranking</h1>"]
    for (quick, hardware, model, _), found in ranking.groups(rows):
        title = f"{model} on {hardware}" + (" (quick: a first look)" if quick else "")
        parts += [f"<h2>{escape(title)}</h2>", plot(found), _table(found), _reasons(found)]
    if not rows:
        parts.append("<p>No capsule yet.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>moefuse ranking</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
