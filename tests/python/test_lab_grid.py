"""Context lengths and batches as cells: parsed, measured from one cache, void when not run."""

import mlx.core as mx
import numpy as np
import pytest
from lab_support import FakeEngine, one_row_fits, tiny  # noqa: F401
from moefuse.lab import LabError, checkpoint, grid, measure, prompts, variants

SMALL = grid.Grid((16, 40), (1, 2), tokens=6, runs=2)


@pytest.fixture(scope="module")
def loaded(tiny):  # noqa: F811
    model, tokenizer = checkpoint.load(checkpoint.inspect(tiny))
    return model, prompts.load(tokenizer, tiny.parent / "prompts.json")


@pytest.mark.parametrize(
    ("contexts", "batches", "expected"),
    [
        ("128,1k,128", "1,2,4", ((128, 1024), (1, 2, 4))),
        (None, "2", ((128,), (2,))),
        ("32K", None, ((32768,), (1,))),
    ],
)
def test_lists_of_numbers(contexts, batches, expected):
    found = grid.parse(contexts, batches)
    assert (found.contexts, found.batches) == expected


def test_no_axes_no_grid():
    assert grid.parse(None, None) is None


@pytest.mark.parametrize("words", [("1", None), ("x", None), ("128,", None), (None, "0")])
def test_bad_numbers(words):
    with pytest.raises(LabError, match="expected numbers from"):
        grid.parse(*words)


def test_cells_of_a_variant_that_runs(loaded):
    model, found = loaded
    measured = grid.measure_grid(model, found, SMALL, variants.parse("router"), FakeEngine(), 2)
    keys = [(cell["context"], cell["batch"]) for cell in measured["cells"]]
    assert keys == [(16, 1), (16, 2), (40, 1), (40, 2)]
    assert [p["context"] for p in measured["prefill"]] == [16, 40]
    for cell in measured["cells"]:
        assert cell["void"] is None
        assert cell["same_steps"] == SMALL.tokens
        assert len(cell["baseline_tok_s"]) == len(cell["patched_tok_s"]) == SMALL.runs


def test_damage_shows_in_the_steps_and_a_patch_without_effect_is_void(loaded):
    model, found = loaded
    wrong = FakeEngine(bias=30.0)
    cells = grid.measure_grid(model, found, SMALL, variants.parse("router"), wrong, 2)["cells"]
    assert all(cell["same_steps"] < SMALL.tokens for cell in cells)
    idle = FakeEngine(runs=False)
    cells = grid.measure_grid(model, found, SMALL, variants.parse("router"), idle, 2)["cells"]
    assert all("router: expected at least" in cell["void"] for cell in cells)


def test_a_cell_that_the_machine_cannot_run_says_why(loaded, monkeypatch):
    model, found = loaded
    one_row_fits(monkeypatch)
    cells = grid.measure_grid(model, found, SMALL, variants.STOCK, FakeEngine(), 2)["cells"]
    assert [cell["void"] for cell in cells] == [None, "out of memory"] * 2


def test_rows_of_a_batch_are_those_of_batch_one(loaded):
    """Each row decodes what it decodes alone: the widened cache is the prompt's."""
    model, found = loaded
    ids = grid.context_ids(found, 40)
    cache, _ = measure.prefill(model, ids)
    _, both = grid._decode(model, grid._widen(model, cache, 2), ids[-2:], 5)
    alone = [grid._decode(model, grid._widen(model, cache, 1), [t], 5)[1] for t in ids[-2:]]
    assert np.array(both).T.tolist() == np.concatenate(alone, axis=1).T.tolist()
    mx.clear_cache()
