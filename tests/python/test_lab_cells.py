"""Cells as capsules: whole after each, checked against their own seconds, shown and repeated."""

import copy
import json
import os
import shutil

import jsonschema
import pytest
from lab_support import FakeEngine, one_row_fits, tiny  # noqa: F401
from moefuse import cli
from moefuse.lab import (
    LabError,
    bench,
    capsule,
    cells,
    checkpoint,
    grid,
    html,
    importer,
    ledger,
    measure,
    notebook,
    ranking,
    repeat,
    sweep,
    variants,
)
from typer.testing import CliRunner

WANTED = grid.Grid((16, 40), (1, 2), tokens=6, runs=2)
PLACES = [(16, 1), (16, 2), (40, 1), (40, 2)]
ROUTER = variants.parse("router")


def run(tiny, out, engine=None, wanted=WANTED, deadline=None):  # noqa: F811
    bench.prepare(out)
    root = tiny.parents[1]
    found = checkpoint.inspect(tiny)
    choose = sweep.chooser(found, None, root)
    loaded = sweep.load(found, wanted, engine or FakeEngine(), choose)
    return sweep.Record(root, out, "moefuse cells tiny").run(loaded, ROUTER, deadline)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):  # noqa: F811
    """(output folder, capsule) of a finished run."""
    out = tmp_path_factory.mktemp("far") / "evidence"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEFUSE_GIT_COMMIT", "0123456789ab")
        return out, run(tiny, out)


def only(out):
    (path,) = (out / capsule.FOLDER).glob("*.json")
    return path


def test_a_run_is_a_capsule_a_row_and_an_entry(done):
    out, found = done
    stored = json.loads(only(out).read_text())
    assert stored == json.loads(json.dumps(found)) and capsule.read(only(out)) == stored
    jsonschema.validate(stored, json.loads((out / capsule.SCHEMA_NAME).read_text()))
    assert stored["complete"] and [(c["context"], c["batch"]) for c in stored["cells"]] == PLACES
    for cell in stored["cells"]:
        assert cell["void"] is None and cell["same_steps"] == cell["again_same_steps"] == 6
        assert len(cell["seconds"]["again"]) == 2
        assert cell["busy_elsewhere"] is None or cell["busy_elsewhere"] >= 0
    (row,), complaints = ledger.read(out / ledger.NAME)
    assert complaints == [] and row == capsule.row(stored, row["capsule"])
    assert row["kind"] == "cells" and row["quick"] and len(row["cells"]) == 4
    book = (out / notebook.NAME).read_text()
    assert f"## EXP-{row['campaign']}\n" in book and "context 40, batch 2: " in book


def swap_batches(found):
    first, second = found["cells"][:2]
    first["batch"], second["batch"] = second["batch"], first["batch"]


def exchange_measurements(found):
    """The batches stand where they should, their numbers do not."""
    first, second = found["cells"][:2]
    for key in set(first) - {"context", "batch"}:
        first[key], second[key] = second[key], first[key]


def missing_run(found):
    for side in found["cells"][1]["seconds"].values():
        side.pop()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: f["cells"].pop(1), "expected 16x1 16x2 40x1 40x2, got 16x1 40x1 40x2"),
        (lambda f: f["cells"].pop(), "expected 16x1 16x2 40x1 40x2, got 16x1 16x2 40x1"),
        (lambda f: f.update(complete=False), "expected the first of 16x1 16x2 40x1 40x2, got"),
        (lambda f: f["cells"].append(f["cells"][0]), "expected 16x1 16x2 40x1 40x2, got"),
        (swap_batches, "expected 16x1 16x2 40x1 40x2, got 16x2 16x1"),
        (exchange_measurements, "context 16 batch 1 baseline_tok_s: expected"),
        (missing_run, "context 16 batch 2 baseline: expected 2 runs, got 1"),
        (lambda f: f["cells"][3].update(median_patched_tok_s=9e9), "median_patched_tok_s: expec"),
        (lambda f: f["cells"][0].update(decode_speedup=9.0), "decode_speedup: expected"),
        (lambda f: f["cells"][0].update(interval=[5.0, 9.0]), "interval: expected"),
        (lambda f: f["cells"][0].update(aa_interval=[0.1, 9.0]), "aa_interval: expected"),
        (lambda f: f["cells"][2]["seconds"]["patched"].reverse(), "patched_tok_s: expected"),
        (lambda f: f["cells"][2].pop("seconds"), "'seconds' is a required property"),
        (lambda f: f["meta"].pop("command"), "'command' is a required property"),
    ],
)  # fmt: skip
def test_a_capsule_that_contradicts_itself_is_refused(done, tmp_path, damage, told):
    _, found = done
    found = copy.deepcopy(found)
    damage(found)
    path = tmp_path / "NAME.json"
    path.write_text(json.dumps(found))
    with pytest.raises(LabError, match=r"\[(cells|capsule)\] NAME") as error:
        capsule.read(path)
    assert told in str(error.value)


class CutOff(FakeEngine):
    """The machine is gone in the second cell: a patch is put on twice a cell."""

    def patch(self, *args, **more):
        if self.patches == 3:
            raise KeyboardInterrupt
        return super().patch(*args, **more)


def test_a_stop_leaves_the_cells_done_so_far(tiny, tmp_path):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path, CutOff())
    found = capsule.read(only(tmp_path))
    assert not found["complete"] and len(found["cells"]) == 1
    (row,), _ = ledger.read(tmp_path / ledger.NAME)
    assert row["complete"] is False
    assert "left 3 cells of `router` unmeasured" in (tmp_path / notebook.NAME).read_text()


def test_what_a_kill_leaves_is_written_up(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A killed process writes neither row nor entry: the report does, once."""
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "enter", lambda out, relative: None)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path, CutOff())
    assert not (tmp_path / ledger.NAME).exists()
    (name,) = bench.write_up_stopped(tmp_path)
    assert name == capsule.read(only(tmp_path))["meta"]["campaign"]
    assert len(ledger.read(tmp_path / ledger.NAME)[0]) == 1
    assert bench.write_up_stopped(tmp_path) == []


def test_no_cell_starts_after_the_deadline(tiny, tmp_path):  # noqa: F811
    assert run(tiny, tmp_path, deadline=0.0) is None
    assert not list((tmp_path / capsule.FOLDER).glob("*"))


def test_a_cell_that_cannot_run_is_void_and_the_next_one_runs(tiny, tmp_path, monkeypatch):  # noqa: F811
    one_row_fits(monkeypatch)
    found = run(tiny, tmp_path)
    assert [cell["void"] for cell in found["cells"]] == [None, "out of memory"] * 2
    idle = run(tiny, tmp_path / "idle", FakeEngine(runs=False), grid.Grid((16,), (1,), 6, 2))
    assert "router: expected at least" in idle["cells"][0]["void"]
    assert "void: out of memory" in ranking.render(tmp_path)[0]


def test_ranking_and_page_show_the_newest_measured_cell(done, tmp_path):
    out, found = done
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    newer = copy.deepcopy(found)
    newer["meta"].update(date="2099-01-01T00:00:00Z", campaign="newer", git_commit="ffff")
    newer["cells"][1] = {"context": 16, "batch": 2, "void": "out of memory"}
    sweep.enter(tmp_path, capsule.write(tmp_path, "newer-router", newer))
    rows, _ = ranking.load(tmp_path)
    shown = {(c["context"], c["batch"]): r["campaign"] for r, c in cells.newest(rows)}
    assert shown == dict.fromkeys(PLACES, "newer") | {(16, 2): found["meta"]["campaign"]}
    text, _ = ranking.render(tmp_path)
    assert text.count("| `router` | 16 |") == 2 and "(repro_capsules/newer-router.json)" in text
    page = html.render(rows)
    assert page.count("<td>router</td>") == 4 and "newer-router" in page and "ffff" in page


def test_a_row_that_is_not_its_capsule_s_is_told(done, tmp_path):
    out, _ = done
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    path = tmp_path / ledger.NAME
    path.write_text(path.read_text().replace('"batch": 2', '"batch": 4', 1))
    with pytest.raises(LabError, match="cells: row and capsule differ"):
        ranking.load(tmp_path)


def test_cells_join_a_ledger_once_and_stand_beside_its_variants(done, tmp_path):
    out, _ = done
    here = tmp_path / "benchmarks"
    assert len(importer.take(out, here)) == 1
    assert importer.take(out, here) == []
    assert only(here).read_bytes() == only(out).read_bytes()
    assert "batch 2: " in (here / notebook.NAME).read_text()
    assert ranking.render(here) == ((here / ranking.NAME).read_text(), [])
    source = shutil.copytree(out, tmp_path / "evidence")
    (source / ledger.NAME).unlink()
    found = json.loads(only(source).read_text())
    found["cells"].pop(1)
    only(source).write_text(json.dumps(found))
    with pytest.raises(LabError, match="expected 16x1 16x2"):
        importer.take(source, tmp_path / "other")


def test_a_rerun_tells_of_each_cell(done, tiny, tmp_path):  # noqa: F811
    out, found = done
    wide = copy.deepcopy(found)
    for cell in wide["cells"]:  # whatever this machine is doing
        seconds = {"baseline": [1e-9, 1e9], "again": [1.0, 1.0], "patched": [1.0, 1.0]}
        figures = cells.figures(6, cell["batch"], seconds)
        cell.update(seconds=seconds, **figures)
    narrow = wide["cells"][3]
    seconds = {"baseline": [1.0, 1.0], "again": [1.0, 1.0], "patched": [1e-6, 1e-6]}
    narrow.update(seconds=seconds, **cells.figures(6, 2, seconds))
    path = tmp_path / "NAME.json"
    path.write_text(json.dumps(wide))
    told = repeat.rerun(path, FakeEngine(), root=tiny.parents[1])
    assert [(c["context"], c["batch"]) for c in told["cells"]] == PLACES
    assert [c["inside"] for c in told["cells"]] == [True, True, True, False]
    assert told["inside"] is False
    lines = list(repeat.lines(told))
    assert "context 40 batch 2" in lines[3] and "lies outside the old interval" in lines[3]
    del wide["cells"][1:]
    path.write_text(json.dumps({**wide, "complete": False}))  # the first cells alone
    told = repeat.rerun(path, FakeEngine(), root=tiny.parents[1])
    assert told["inside"] and len(told["cells"]) == 1
    other = {**wide["model"], "digest": "sha256:" + "0" * 64}
    path.write_text(json.dumps({**wide, "complete": False, "model": other}))
    with pytest.raises(LabError, match=r"\[rerun\] model tiny: expected sha256:0000"):
        repeat.rerun(path, FakeEngine(), root=tiny.parents[1])


def test_who_else_kept_processors_busy(monkeypatch, tmp_path):
    before, after = (100.0, 50.0, 10.0), (104.0, 57.0, 13.0)  # wall, everybody, this process
    assert measure.busy_elsewhere(before, after) == 1.0
    assert measure.busy_elsewhere(before, (104.0, 52.0, 13.0)) == 0.0  # clocks of other grain
    assert measure.busy_elsewhere(None, after) is None
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9999 8888 1 2 3 0 0\ncpu0 1\n")
    monkeypatch.setattr(measure, "STAT", stat)
    assert measure.processor_time()[1] == 156 / os.sysconf("SC_CLK_TCK")
    stat.unlink()
    assert measure.processor_time() is None


def test_the_commands(tiny, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(tiny.parent, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_engine", FakeEngine)

    def command(*words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    size = ("--context", "16", "--batch", "1,2", "--tokens", 6, "--runs", 2)
    result = command("cells", "models/tiny", "--variants", "router", *size, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)
    assert found["meta"]["command"] == (
        "moefuse cells models/tiny --variants router --context 16 --batch 1,2 --tokens 6 --runs 2"
    )
    assert command("report", "--check").exit_code == 0
    result = command("rerun", only(tmp_path / "benchmarks"))
    assert result.exit_code in (0, 1) and "context 16 batch 2: new ratio" in result.output
    result = command("cells", "models/tiny", *size, "--minutes", 0)
    assert result.exit_code == 2 and "expected time for a cell" in result.output
