"""Every figure in the documents that links to a capsule is the capsule's."""

from __future__ import annotations

import json
import re

import pytest
from moefuse.lab import ledger
from script_support import ROOT, load

BENCHMARKS = ROOT / "benchmarks"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A figure of a cell tells which: NAME.json#CONTEXTxBATCH.
FIGURE = re.compile(r"\[([\d.]+)x\]\([^)]*?(repro_capsules/[^)#]+\.json)(?:#(\d+x\d+))?\)")

numbers = load("scripts/numbers_page.py")


def rows() -> dict[str, dict]:
    """The ledger by capsule, each row with its capsule."""
    found, complaints = ledger.read(BENCHMARKS / ledger.NAME)
    assert complaints == []
    return {
        row["capsule"]: {**row, "found": json.loads((BENCHMARKS / row["capsule"]).read_text())}
        for row in found
    }


def cell(found: dict, place: str) -> dict:
    """The cell of a capsule at `CONTEXTxBATCH`."""
    (here,) = (c for c in found["cells"] if f"{c['context']}x{c['batch']}" == place)
    return here


def wrong(text: str, known: dict[str, dict]) -> list[str]:
    """The linked figures that are not what their capsule says, to the digits they show."""
    bad = []
    for figure, capsule, place in FIGURE.findall(text):
        digits = len(figure.partition(".")[2])
        found = known[capsule]["found"]
        speedup = (cell(found, place) if place else found["summary"])["decode_speedup"]
        if f"{speedup:.{digits}f}" != figure:
            bad.append(f"{figure}x: {capsule} says {speedup}")
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_figures_are_their_capsules(page):
    assert wrong(page.read_text(), rows()) == []


def test_a_wrong_figure_is_seen():
    known = rows()
    page = numbers.PAGE.read_text()
    figure = FIGURE.search(page)[1]
    assert len(wrong(page.replace(f"[{figure}x]", "[9.999x]", 1), known)) == 1


def test_every_row_of_the_numbers_page_is_its_capsules():
    known, page = rows(), numbers.PAGE.read_text()
    for text in (line for line in page.splitlines(keepends=True) if "repro_capsules/" in line):
        row, place = known[FIGURE.search(text)[2]], FIGURE.search(text)[3]
        drawn = numbers.cell_line(row, cell(row["found"], place)) if place else numbers.line(row)
        assert text == drawn
    unlinked = re.findall(r"\d+\.\d+x", FIGURE.sub("", page))
    assert unlinked == []


def test_the_page_fills_itself():
    page = numbers.PAGE.read_text()
    assert len(FIGURE.findall(page)) >= 10
    emptied = numbers.TABLE.sub(lambda m: m[1] + m[3], page)
    assert not FIGURE.search(emptied)
    again = numbers.filled(emptied, list(rows().values()))
    assert set(FIGURE.findall(page)) <= set(FIGURE.findall(again))
