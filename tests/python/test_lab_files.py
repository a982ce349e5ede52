"""What is on disk stays whole: ledger, capsules, atomic writes, paths."""

import json
import multiprocessing

import pytest
from moefuse.lab import LabError, files, ledger


def _row(i: int, **more) -> dict:
    return {
        "capsule": f"repro_capsules/{i}.json",
        "model_digest": "d",
        "variant": "router",
        "hardware": "h",
        "timestamp": f"2026-01-01T00:00:{i % 60:02d}Z",
        **more,
    }


def _append_many(path, first: int) -> None:
    for i in range(50):
        ledger.append(path, _row(first + i, pad="x" * 3000))


def test_rows_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / ledger.NAME
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, 100 * n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rows, complaints = ledger.read(path)
    assert not complaints
    assert len({row["capsule"] for row in rows}) == 150


def test_a_torn_last_line_is_told_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / ledger.NAME
    ledger.append(path, _row(1))
    with path.open("a") as stream:
        stream.write('{"capsule": "repro_caps')
    rows, complaints = ledger.read(path)
    assert len(rows) == 1
    assert "line 2" in complaints[0]
    ledger.append(path, _row(2))
    rows, complaints = ledger.read(path)
    assert [row["capsule"][-6] for row in rows] == ["1", "2"]
    assert len(complaints) == 1


def test_latest_row_wins_and_quick_stays_apart():
    rows = [_row(5), _row(9), _row(7), _row(3, quick=True), _row(1, hardware="other")]
    newest = {
        (r["hardware"], bool(r.get("quick"))): r["timestamp"][-3:-1] for r in ledger.latest(rows)
    }
    assert newest == {("h", False): "09", ("h", True): "03", ("other", False): "01"}


def test_ledger_refuses_what_json_cannot_hold(tmp_path):
    path = tmp_path / ledger.NAME
    with pytest.raises(ValueError, match="JSON"):
        ledger.append(path, _row(1, decode_speedup=float("nan")))
    assert not path.exists()


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_paths_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(LabError, match="inside the repository"):
        files.inside(tmp_path, name)


def test_links_cannot_leave_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(LabError, match="inside"):
        files.inside(tmp_path / "in", "link/x")


def test_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text(json.dumps({}))
    with pytest.raises(LabError, match="writable folder"):
        files.require_writable(tmp_path / "out")
