"""docs/COVERAGE.md: all that was asked for has a row or a reason, and the page is the ledger's."""

from __future__ import annotations

import copy

import pytest
from moefuse.lab import ranking
from script_support import ROOT, load

coverage = load("scripts/coverage_page.py")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return ranking.load(ROOT / "benchmarks")[0]


def test_the_page_is_the_ledgers(rows):
    assert coverage.PAGE.read_text() == coverage.page(coverage.asked(), rows)


@pytest.mark.parametrize("lost", range(len(coverage.asked()["reasons"])))
def test_what_loses_its_reason_is_said(rows, lost):
    asked = coverage.asked()
    gone = asked["reasons"].pop(lost)
    try:
        page = coverage.page(asked, rows)
    except ValueError as error:
        assert gone["device"] in str(error) and "a row or a reason" in str(error)
    else:  # a later one of the same device stands in for it
        assert page != coverage.PAGE.read_text()


def test_a_variant_more_needs_a_reason(rows):
    asked = coverage.asked()
    asked["variants"].append("telepathy")
    with pytest.raises(ValueError, match="H200, qwen3-30b-a3b, telepathy"):
        coverage.page(asked, rows)


def test_a_reason_that_nothing_needs_is_said(rows):
    asked = coverage.asked()
    asked["reasons"].append({"device": "H200", "what": ["step"], "why": "old", "see": "README.md"})
    with pytest.raises(ValueError, match="to be needed"):
        coverage.page(asked, rows)


def test_the_row_that_says_most_is_taken(rows):
    model, variant, on = "qwen3-30b-a3b", "step", "cuda: NVIDIA H200"
    best = coverage.find(rows, on, model, variant)
    assert best["model_id"] == model and not best["quick"]
    rest = [r for r in rows if r is not best and r["model_id"] != model]
    fewer = coverage.find(rest, on, model, variant)
    assert fewer["model_id"] == f"{model}-4-layers"
    quick = copy.copy(fewer) | {"quick": True, "timestamp": "2099"}
    assert coverage.find([quick, fewer], on, model, variant) is fewer
    assert coverage.find([fewer | {"decision": "void: did not run"}], on, model, variant) is None
    assert coverage.find([fewer | {"model_id": model + "-chat"}], on, model, variant) is None


def test_links_lead_somewhere():
    asked = coverage.asked()
    for place in [r["see"] for r in asked["reasons"] + asked["beside"]]:
        assert (ROOT / place).is_file(), place
