"""The command line: help, exit codes, what goes to stdout, and errors that name the thing."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from lab_support import FakeEngine, one_fault, tiny  # noqa: F401
from moefuse import cli
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
COMMANDS = ("doctor", "synth", "bench", "cells", "fidelity", "report", "rerun", "generate")
runner = CliRunner()


@pytest.fixture
def repo(tiny, tmp_path, monkeypatch, one_fault):  # noqa: F811
    """A working folder with models/tiny and prompts, and a stand-in for the patch."""
    shutil.copytree(tiny.parent, tmp_path / "models")
    wide = shutil.copytree(tiny, tmp_path / "models" / "wide")  # contradicts its tensors
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "num_experts": 32}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_engine", FakeEngine)
    return tmp_path


def run(*words):
    return runner.invoke(cli.app, [str(word) for word in words])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: moefuse {command}" in re.sub(r"\s+", " ", result.stdout)


def test_exit_codes_are_documented():
    assert "130 interrupted" in re.sub(r"\s+", " ", run("--help").stdout)


BENCH = ("bench", "models/tiny", "--short", "32x2", "--long", "32x1", "--variants", "router")


def test_bench_report_rerun(repo):
    result = run(*BENCH, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["variant"] for row in rows] == ["stock", "router"]
    path = repo / "benchmarks" / rows[1]["capsule"]
    meta = json.loads(path.read_text())["meta"]
    assert meta["quick"] is True  # shorter than the minimum cannot promote
    assert meta["command"] == (
        "moefuse bench models/tiny --variants router --short 32x2 --long 32x1"
    )
    assert run("report", "--check").exit_code == 0
    page = run("report", "--html", "page.html")
    assert page.exit_code == 0
    assert "<svg" in (repo / "page.html").read_text()
    (repo / "benchmarks" / "RANKING.md").write_text("stale")
    assert run("report", "--check").exit_code == 1
    again = run("rerun", path, "--json")
    found = json.loads(again.stdout)
    assert again.exit_code == (0 if found["inside"] else 1)


def test_interrupted(repo, monkeypatch):
    class Stops(FakeEngine):
        def patch(self, *args, **more):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_engine", Stops)
    result = run(*BENCH)
    assert result.exit_code == 130
    assert "--resume" in result.output
    monkeypatch.setattr(cli, "_engine", FakeEngine)
    result = run(*BENCH, "--resume")
    assert result.exit_code == 0, result.output
    assert re.search(r"router .* identical", result.stdout)
    assert "\x1b[" not in result.output  # no terminal, no colours
    rows = [
        json.loads(ln)
        for ln in (repo / "benchmarks" / "matrix.jsonl").read_text().split("\n")
        if ln
    ]
    assert [row["variant"] for row in rows] == ["stock", "router"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench", "nowhere"), "expected a model folder"),
        (("bench", "models/tiny", "--variants", "magic"), "expected parts from"),
        (("bench", "models/tiny", "--short", "long"), "expected TOKENSxRUNS"),
        (("bench", "models/tiny", "--out", "models/prompts.json"), "expected a writable folder"),
        (("bench", "models/tiny", "--prompts", "none.json"), "expected a list of name and text"),
        (("bench", "models/tiny", "models/wide"), "Expected shape"),
        (("fidelity", "models/tiny", "--plant", "magic"), "--plant: expected one of"),
        (("generate", "models/tiny", "--prompt", ""), "expected text, got an empty string"),
        (("doctor", "--plan"), "--plan: expected a model folder"),
        (("doctor", "--plan", "models/tiny", "--accumulate", "half"), "accumulate: expected"),
        (("rerun", "none.json"), "none.json: expected a file"),
        (("report", "--out", "none"), "expected a folder with a ledger"),
        (("synth", "--like", "gpt-2", "--out", "x"), "like: expected one of"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(repo, words, message):
    before = sorted(p for p in repo.rglob("*"))
    result = run(*words)
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output)
    assert "Traceback" not in result.output
    assert sorted(p for p in repo.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output_is_found_before_measuring(repo):
    (repo / "locked").mkdir(mode=0o500)
    result = run(*BENCH, "--out", "locked/out")
    assert result.exit_code == 2
    assert "expected a writable folder" in result.output


def test_doctor(repo):
    result = run("doctor", "models/tiny", "models/none", "--json")
    assert result.exit_code == 2, result.output  # the other model is looked into all the same
    found = json.loads(result.stdout)
    good, bad = found["models"]
    assert good["fused"]["router"]["modules"] == 2
    assert "expected a model folder" in bad["error"]
    text = run("doctor", "models/tiny", "models/none").stdout
    lines = text.splitlines()
    assert re.search(r"^  router +fused in 2 blocks$", text, re.M) and "expected a" in lines[-1]
    assert len(lines) < 24  # one screen


@pytest.mark.parametrize("accumulate", ["fp32_no_fma", "exact"])
def test_doctor_plan(repo, accumulate):
    words = ("doctor", "--plan", "models/tiny", "--accumulate", accumulate)
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["models"][0]["plan"]
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert len(stages) == len(plan["stages"])  # two equal layers are one line
    assert stages["router"]["layers"] == [0, 1]
    # Four of sixteen experts in each of two layers: 64 x 64 weights of 4 bits, gate and up; one
    # scale and one bias of two bytes for each 64.
    assert stages["experts_gate_up"]["weight_bytes"] == 2 * 4 * 2 * (64 * 64 // 2 + 64 * 4)
    head = stages["lm_head"]
    assert head["shape"] == "320 x 64" and head["weight_bytes"] == 320 * (64 // 2 + 4)
    assert plan["weight_bytes"] == sum(s["weight_bytes"] for s in plan["stages"])
    assert plan["tokens"] == 32 and plan["accumulate"] == accumulate
    for stage in plan["stages"]:
        assert stage["seconds"] > 0
        rate = stage["weight_bytes"] / stage["seconds"]
        assert stage["bytes_per_s"] == pytest.approx(rate)
        assert stage["read_share"] == pytest.approx(rate / plan["read_bytes_per_s"])
    text = run(*words).stdout
    assert re.search(r"^router +0-1 +2 +16 x 64, top 4 ", text, re.M)
    assert re.search(r"^total .*%$", text, re.M)


def test_doctor_plan_without_an_executor(repo, monkeypatch):
    monkeypatch.setattr("moefuse._core.has_executor", lambda: False)
    result = run("doctor", "--plan", "models/tiny", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["models"][0]["plan"]
    assert plan["seconds"] is None and plan["tokens"] == 0
    assert all(stage["seconds"] is None for stage in plan["stages"])
    assert "not timed" in run("doctor", "--plan", "models/tiny").stdout


def test_fidelity(repo):
    result = run("fidelity", "models/tiny", "--variants", "router", "--tokens", "24", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["router"]["verdict"] == "identical"
    planted = run("fidelity", "models/tiny", "--plant", "k-minus-1", "--tokens", "24", "--json")
    assert planted.exit_code == 0
    assert json.loads(planted.stdout)["k-minus-1"]["verdict"] == "fail"


def test_generate_is_the_same_text_patched_and_unpatched(repo):
    words = ("generate", "models/tiny", "--prompt", "A list", "--max-tokens", "12", "--variants")
    plain, patched = (run(*words, spec) for spec in ("stock", "router"))
    assert plain.exit_code == patched.exit_code == 0, plain.output
    assert plain.stdout == patched.stdout
    assert plain.stdout.strip()
    found = json.loads(run(*words, "router", "--json").stdout)
    assert found["text"].rstrip("\n") == plain.stdout.rstrip("\n")
    assert found["tokens"] == 12 and found["finish_reason"] == "length"


def test_version():
    result = run("--version")
    assert result.exit_code == 0 and re.fullmatch(r"\d+\.\d+\.\d+\S*\n", result.stdout)


def test_doctor_on_fp4_experts(tmp_path):
    """The experts are fused; the step takes affine weights only, and says which are not."""
    import patch_support
    from mlx_lm.utils import save_model

    settings = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    save_model(tmp_path, patch_support.tiny("qwen", quantize=settings))
    config = {**patch_support.QWEN, "quantization": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "models/qwen3-moe-tiny/tokenizer.json", tmp_path)
    text = run("doctor", tmp_path).stdout
    assert re.search(r"^  experts +fused in 2 blocks$", text, re.M), text
    assert re.search(r"^  swiglu +fused in 2 blocks$", text, re.M)
    assert "step: [model] model.embed_tokens: expected affine quantisation" in text


def test_doctor_on_a_family_that_the_lab_does_not_measure(tmp_path):
    """The real engine: Qwen3-Next's blocks are fused, its step is not there, and both are said."""
    import patch_support
    from mlx_lm.utils import save_model

    save_model(tmp_path, patch_support.tiny("qwen3_next"))
    settings = {"quantization": {"group_size": 32, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps({**patch_support.NEXT, **settings}))
    (model,) = json.loads(run("doctor", tmp_path, "--json").stdout)["models"]
    assert (model["model_type"], model["geometry"]) == ("qwen3_next", {})
    assert model["fused"]["experts"] == {
        "modules": 2, "patterns": ["moe_experts"], "fallbacks": {},
    }  # fmt: skip
    assert model["fused"]["step"]["modules"] == 0
    assert "expected qwen3_moe or glm4_moe_lite" in next(iter(model["fused"]["step"]["fallbacks"]))
    assert re.search(r"^  step +stock: step: .*qwen3_next", run("doctor", tmp_path).stdout, re.M)
    (tmp_path / "config.json").write_text("{")
    assert "expected JSON" in run("doctor", tmp_path).stdout
