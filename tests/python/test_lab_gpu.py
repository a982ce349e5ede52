"""What a GPU changes in the lab: a shared control, stops and what follows, a pretended device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from lab_support import CONFIG, FakeEngine, tiny  # noqa: F401
from mlx.utils import tree_flatten
from moefuse.lab import (
    LabError,
    bench,
    checkpoint,
    environment,
    faults,
    measure,
    notebook,
    ranking,
    resume,
    roofline,
    synth,
    variants,
)
from moefuse.lab.oracle import load_oracle
from moefuse.lab.schedule import Plan

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "benchmarks" / "cuda"
PLAN = Plan({"short": (12, 2), "long": (16, 1)}, quick=True, extra_tokens=0, chunk=8)
ROUTER = variants.parse("router")


@pytest.fixture
def one_fault(monkeypatch):
    """Plant a single fault, in the weights: the others have their own tests, and take time."""
    monkeypatch.setattr(faults, "FAULTS", {"wrong-weight": faults.FAULTS["wrong-weight"]})
    monkeypatch.setattr(faults, "IN_WEIGHTS", ("wrong-weight",))


def start(tiny, out, engine=None, **more):  # noqa: F811
    bench.prepare(out)
    return bench.open_campaign(
        checkpoint.inspect(tiny), PLAN, engine or FakeEngine(), prompt_file=None,
        root=tiny.parents[1], out=out, command="moefuse bench models/tiny --quick", **more,
    )  # fmt: skip


def test_the_control_shares_its_stock_runs_with_the_first_variant(tiny, tmp_path, one_fault):  # noqa: F811
    said = []
    outcome = bench.run(start(tiny, tmp_path, say=said.append), [ROUTER], shared=True)
    control, (router,) = outcome.control, outcome.found
    assert control["control"]["beside"] == "router"
    assert set(control["control"]["faults_beside"]) == set(faults.IN_WEIGHTS)
    assert set(control["control"]["fault_errors"]) == set(control["control"]["faults"])
    assert router["baseline"]["decode_tok_s"] == control["baseline"]["decode_tok_s"]
    assert router["patched"]["decode_tok_s"] != control["patched"]["decode_tok_s"]
    assert [len(c["schedule"]) for c in (control, router)] == [3, 3]
    assert router["patched"]["calls"]["moe_router"] > 0 and not control["patched"]["calls"]
    timed = [line.split(":")[0] for line in said if line.startswith(("short", "long"))]
    assert [line.split()[2] for line in timed] == list("ABC" + "CBA" + "ABC")
    assert said[0].startswith("stock decodes ")


class Refuses(FakeEngine):
    """Raises what a kernel that does not compile raises, from the `after`-th patch on."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.after = error, after

    def patch(self, model, variants=None, **more):
        if self.patches >= self.after:
            raise self.error
        return super().patch(model, variants, **more)


@pytest.mark.parametrize("after", [0, 1])
def test_a_variant_that_breaks_leaves_the_control_whole(tiny, tmp_path, one_fault, after):  # noqa: F811
    engine = Refuses(RuntimeError("[cuda compile] no such header"), after)
    outcome = bench.run(start(tiny, tmp_path, engine), [ROUTER], shared=True)
    assert outcome.skipped == {"router": "[cuda compile] no such header"}
    assert len(outcome.control["schedule"]) == 3
    assert [len(outcome.control[k]["decode_tok_s"]) for k in ("baseline", "patched")] == [3, 3]


def test_a_void_variant_leaves_the_control_whole(tiny, tmp_path, one_fault):  # noqa: F811
    outcome = bench.run(start(tiny, tmp_path, FakeEngine(runs=False)), [ROUTER], shared=True)
    assert outcome.found[0]["summary"]["decision"] == "void: did not run"
    assert len(outcome.found[0]["schedule"]) == 1 and len(outcome.control["schedule"]) == 3


def test_a_stopped_campaign_is_written_up_and_goes_on(tiny, tmp_path, one_fault):  # noqa: F811
    wanted = [ROUTER, variants.parse("combine")]
    first = bench.run(start(tiny, tmp_path), wanted, deadline=0.0, shared=True)
    assert first.left == ["combine"] and len(first.found) == 1
    name = first.control["meta"]["campaign"]
    assert bench.write_up_stopped(tmp_path) == [name]
    book = tmp_path / notebook.NAME
    assert notebook.STOPPED in book.read_text() and "`combine`" not in book.read_text()
    campaign = start(tiny, tmp_path, resume=True)
    assert campaign.id == name
    assert len(bench.run(campaign, wanted, shared=True).found) == 2
    text = book.read_text()
    assert text.count("## EXP-") == 1 and notebook.STOPPED not in text and "`combine`" in text
    assert bench.write_up_stopped(tmp_path) == []
    ranking.render(tmp_path)


class Stop(Exception):
    """As a limit of time would."""


@pytest.fixture
def timed(monkeypatch):
    """Every generation that is timed, and a stop in front of the one numbered `at`."""
    counts = {"timed": 0, "at": None}
    generate = measure.generate

    def counted(*given, **more):
        if counts["timed"] == counts["at"]:
            raise Stop
        counts["timed"] += 1
        return generate(*given, **more)

    monkeypatch.setattr(measure, "generate", counted)
    return counts


def test_a_stop_costs_one_slot_of_the_pairs(tiny, tmp_path, one_fault, timed):  # noqa: F811
    timed["at"] = 1 + 3 + 1  # behind the forecast, a slot and a run of the second
    first = start(tiny, tmp_path)
    with pytest.raises(Stop):
        bench.run(first, [ROUTER], shared=True)
    assert [len(v) for v in first.slots.found.values()] == [3]
    ledger_file = tmp_path / "matrix.jsonl"
    assert not ledger_file.exists()
    torn = first.slots.path.read_text() + '{"1 CBA router": [{"run"'
    first.slots.path.write_text(torn)
    timed.update(timed=0, at=None)
    said = []
    second = start(tiny, tmp_path, resume=True, say=said.append)
    assert second.id == first.id
    outcome = bench.run(second, [ROUTER], shared=True)
    told = [line for line in said if " tok/s, " in line and line.split()[0] in ("short", "long")]
    assert len(told) == 2 * 3  # not the first slot's
    kept = resume.run_of(first.slots.found["0 ABC router"][1])
    found = outcome.found[0]
    assert found["patched"]["decode_tok_s"][0] == kept.decode_tok_s
    assert outcome.control["baseline"]["decode_tok_s"][0] == found["baseline"]["decode_tok_s"][0]
    decoded = found["patched"]["decoded_tokens"]
    assert decoded == 12 + 12 + 16
    assert found["patched"]["calls"]["moe_router"] >= 2 * decoded
    assert not second.slots.path.exists()  # written up


def test_pairs_beside_the_control_outlive_a_stop_behind_it(
    tiny, tmp_path, one_fault, monkeypatch  # noqa: F811
):  # fmt: skip
    def stop(*_):
        raise Stop

    first = start(tiny, tmp_path)
    monkeypatch.setattr(first, "check_variant", stop)
    with pytest.raises(Stop):
        bench.run(first, [ROUTER], shared=True)
    said = []
    second = start(tiny, tmp_path, resume=True, say=said.append)
    outcome = bench.run(second, [ROUTER], shared=True)
    assert [line for line in said if " tok/s, " in line] == []
    assert len(outcome.found[0]["baseline"]["decode_tok_s"]) == 3


def test_kept_runs_of_other_settings_are_dropped(tmp_path):
    kept = resume.Slots(tmp_path, "a", lambda: {"git_commit": "1"})
    kept.keep("0 AB router", [])
    assert resume.newest(tmp_path, {"git_commit": "1"}) == "a"
    assert resume.newest(tmp_path, {"git_commit": "2"}) is None
    assert resume.Slots(tmp_path, "a", lambda: {"git_commit": "1"}).found == {"0 AB router": []}
    with kept.path.open("a") as stream:
        stream.write('{"1 BA rou')
    again = resume.Slots(tmp_path, "a", lambda: {"git_commit": "1"})
    again.keep("1 BA router", [])
    again = resume.Slots(tmp_path, "a", lambda: {"git_commit": "1"})
    assert list(again.found) == ["0 AB router", "1 BA router"]
    assert resume.Slots(tmp_path, "a", lambda: {"git_commit": "2"}).found == {}
    assert not kept.path.exists()


def test_notebook_entries_replace_their_own_alone(tmp_path):
    book = tmp_path / notebook.NAME
    for name, text in (("a", "1"), ("ab", "2"), ("a", "3"), ("c", "4")):
        notebook.add(book, name, f"\n## EXP-{name}\n\n{text}\n")
    assert book.read_text() == notebook.HEADER + "".join(
        f"\n## EXP-{name}\n\n{text}\n" for name, text in (("a", "3"), ("ab", "2"), ("c", "4"))
    )


@pytest.fixture
def pretend_gpu(monkeypatch):
    class Gpu:
        type = mx.gpu

    info = {"device_name": "NVIDIA H200", "architecture": "sm_90", "total_memory": 150_000_000_000,
            "free_memory": 1000}  # fmt: skip
    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)


def test_a_gpu_is_described_and_its_memory_asked(pretend_gpu, tiny, tmp_path, monkeypatch):  # noqa: F811
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 3201 MHz, 700.00 W'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert environment.gpu() == {
        "name": "NVIDIA H200", "architecture": "sm_90", "memory_gb": 150.0,
        "driver_version": "580.1", "clocks.max.sm": "1980 MHz", "clocks.max.memory": "3201 MHz",
        "power.limit": "700.00 W",
    }  # fmt: skip
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert set(environment.gpu()) == {"name", "architecture", "memory_gb"}
    with pytest.raises(LabError, match="fit into the 1000 bytes free on the device"):
        checkpoint.load(checkpoint.inspect(tiny))


def test_read_rate_of_a_gpu_is_a_reduction_s(pretend_gpu):
    assert roofline.read_rate(1 << 16) > 0


def test_the_oracle_is_the_model_in_float32_and_refuses_tf32(tiny, monkeypatch):  # noqa: F811
    found = checkpoint.inspect(tiny)
    model = checkpoint.load_weights(found)
    with_file = checkpoint.load_weights(found)
    with_file.set_dtype(mx.float32)
    oracle = dict(tree_flatten(load_oracle(found, model).parameters()))
    for name, value in tree_flatten(with_file.parameters()):
        assert oracle[name].dtype == value.dtype and mx.array_equal(oracle[name], value), name
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    with pytest.raises(LabError, match="MLX_ENABLE_TF32: expected 0"):
        load_oracle(found, model)


def test_a_copy_without_git_tells_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.COMMIT, "0123456789ab")
    assert environment.commit(tmp_path) == "0123456789ab"
    assert environment.COMMIT not in environment.flags()


def test_tensors_drawn_ahead_come_in_order():
    assert list(synth._ahead(lambda i: i * i, range(50), 3)) == [i * i for i in range(50)]


def test_decode_rates_through_mlx_lm_as_json(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(CUDA))
    import mlx_lm_decode

    small = {k: v for k, v in CONFIG.items() if k != "eos_token_id"}
    monkeypatch.setattr(mlx_lm_decode, "LIKE", {"qwen3-30b-a3b": small})
    file = tmp_path / "rates.json"
    words = ["qwen", "--contexts", "16", "--batches", "1,2", "--tokens", "12", "--prefill", "9"]
    mlx_lm_decode.main([*words, "--json", str(file)])
    found = json.loads(file.read_text())
    assert [(c["context"], c["batch"]) for c in found["cells"]] == [(16, 1), (16, 2)]
    for cell in found["cells"]:
        assert len(cell["stock_tok_s"]) == len(cell["step_tok_s"]) == 2
        assert cell["calls"] >= 2 * 12 and not cell["fallbacks"]
    assert found["prefill"][0]["tokens"] == 8 and found["device"].startswith("cpu")


def test_campaign_script_says_what_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without packages
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(CUDA / "campaign.sh"), str(tmp_path / "out"), "60", "rehearse"],
        env={**os.environ, "PYTHON": str(python), "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "campaign: mlx.core: No module named 'mlx'" in done.stdout
    assert (tmp_path / "out" / "evidence.tar.gz").is_file()
    assert not list(tmp_path.glob("moefuse.*"))  # its own folder is gone


def test_campaign_script_begins_with_no_commit_that_could_not_be_imported(tmp_path):
    done = subprocess.run(
        ["bash", str(CUDA / "campaign.sh"), str(tmp_path / "out"), "60", "cells"],
        env={**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path),
             "GIT_DIR": str(tmp_path / "none"), "MOEFUSE_GIT_COMMIT": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "expected a clean checkout" in done.stdout
    assert "checkpoints written" not in done.stdout
