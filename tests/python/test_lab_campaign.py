"""A whole campaign on the tiny model: capsules, ledger, notebook, ranking, resume, rerun."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import mlx.core as mx
import pytest
from lab_support import FakeEngine, one_fault, tiny  # noqa: F401
from moefuse.lab import (
    LabError,
    bench,
    capsule,
    checkpoint,
    environment,
    html,
    ledger,
    measure,
    ranking,
    rates,
    roofline,
    variants,
)
from moefuse.lab.grid import Grid
from moefuse.lab.prompts import Prompt
from moefuse.lab.schedule import FULL_PLAN, Plan, make_schedule, resized

PLAN = Plan(
    {"short": (24, 2), "long": (32, 1)}, quick=True, extra_tokens=8, chunk=8,
    grid=Grid((16, 24), (1, 2), tokens=4, runs=2),
)  # fmt: skip
WANTED = [variants.parse("router"), variants.parse("experts+combine:fp32")]


def start(tiny, out, engine=None, **more):  # noqa: F811
    bench.prepare(out)
    return bench.open_campaign(
        checkpoint.inspect(tiny),
        PLAN,
        engine or FakeEngine(),
        prompt_file=None,
        root=tiny.parents[1],
        out=out,
        command="moefuse bench models/tiny --quick",
        **more,
    )


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):  # noqa: F811
    """(output folder, outcome) of one finished campaign."""
    out = tmp_path_factory.mktemp("out")
    outcome = bench.run(start(tiny, out), WANTED)
    bench.write_ranking(out)
    return out, outcome


def test_every_variant_has_a_valid_capsule_and_a_row(done):
    out, _ = done
    schema = json.loads((out / capsule.SCHEMA_NAME).read_text())
    rows, complaints = ledger.read(out / ledger.NAME)
    assert not complaints
    assert [row["variant"] for row in rows] == ["stock", "router", "experts+combine:fp32"]
    for row in rows:
        found = json.loads((out / row["capsule"]).read_text())
        jsonschema.validate(found, schema)
        assert row == capsule.row(found, row["capsule"])


def test_what_the_numbers_mean(done):
    _, outcome = done
    found = outcome.found[0]
    assert [s["order"] for s in found["schedule"]] == ["AB", "BA", "AB"]
    assert len(found["baseline"]["decode_tok_s"]) == 3
    assert found["fidelity"]["verdict"] == "identical"
    assert {p["name"] for p in found["fidelity"]["per_prompt"]} == {"list", "dict", "loop"}
    decoded = found["patched"]["decoded_tokens"]
    assert decoded == 24 + 24 + 32 + 8  # the timed runs and one prompt that is only judged
    assert found["patched"]["calls"]["moe_router"] >= 2 * decoded
    aa = found["control"]
    assert aa["aa_interval"][0] <= 1 <= aa["aa_interval"][1]
    assert aa["self_matched"] == aa["self_total"] > 0
    assert set(aa["faults"].values()) == {"fail"}
    assert found["summary"]["decision"] in ("hold", "reject")  # quick cannot promote
    assert [(c["context"], c["batch"]) for c in found["grid"]["cells"]] == [
        (16, 1), (16, 2), (24, 1), (24, 2),
    ]  # fmt: skip
    assert found["roofline"]["weight_bytes"] > 0
    assert roofline.share(found, "baseline") > 0


def test_capsules_name_neither_machine_nor_user(done):
    out, _ = done
    for path in (out / capsule.FOLDER).iterdir():
        found = json.loads(path.read_text())
        text = json.dumps({k: v for k, v in found.items() if k != "control"})
        assert found["model"]["path"] == "models/tiny"
        assert not re.search(r'"(/|~)|/(home|root|usr|tmp|work)\b', text)
        assert str(Path.cwd()) not in text
        user = getpass.getuser()
        assert user in ("root",) or user not in text


def test_ranking_regenerates_and_no_link_dangles(done):
    out, _ = done
    text = (out / ranking.NAME).read_text()
    assert ranking.render(out) == (text, [])
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 3
    assert all((out / link).is_file() for link in links)
    assert "(quick: a first look)" in text


def test_ranking_puts_an_earlier_checkpoint_of_a_name_last():
    row = {"quick": False, "hardware": "cpu", "variant": "step", "decode_speedup": 2.0}
    old = {**row, "model_id": "a", "model_digest": "sha256:1", "timestamp": "2026-01-01T00:00:00Z"}
    new = {**old, "model_digest": "sha256:2", "timestamp": "2026-01-02T00:00:00Z"}
    other = {**old, "model_id": "b"}
    found = ranking.groups([old, new, other])
    assert [rows for _, rows in found] == [[new], [other], [old]]
    titles = [ranking.title(key) for key, _ in found]
    assert titles == ["a on cpu", "b on cpu", "a on cpu (an earlier checkpoint)"]


def test_ranking_tells_a_row_that_is_not_its_capsule(done, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    path = out / ledger.NAME
    rows, _ = ledger.read(path)
    rows[1]["decode_speedup"] *= 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LabError, match="decode_speedup: row and capsule differ"):
        ranking.render(out)
    next((out / capsule.FOLDER).glob("*router.json")).unlink()
    with pytest.raises(LabError, match="expected a file"):
        ranking.render(out)


def test_notebook_entry_has_all_parts(done):
    out, outcome = done
    text = (out / "LAB_NOTEBOOK.md").read_text()
    assert f"## EXP-{outcome.control['meta']['campaign']}\n" in text
    parts = re.findall(r"^\*\*([A-Za-z ]+)\.\*\*", text, re.M)
    assert parts == [
        "Question", "Code delta", "Method", "Capsules", "Results", "Interpretation", "Decision",
        "Next",
    ]  # fmt: skip


def test_html_is_self_contained_and_repeatable(done):
    rows, _ = ranking.load(done[0])
    page = html.render(rows)
    assert page == html.render(rows)
    assert page.count("<svg") == 3  # ratios, share of a plain read, rate against context
    assert "context, tokens" in page
    assert "% of a plain read" in page
    assert "experts+combine:fp32" in page
    assert not re.search(r'(src|href)="(?!#)', page.replace("xlink:href=", "href="))


def test_html_draws_rates_that_lie_beside_the_capsules(done, tmp_path):
    cell = {"context": 128, "batch": 1, "stock_tok_s": [40.0, 50.0], "step_tok_s": [400.0, 420.0]}
    old = {"date": "2026-01-01T00:00:00Z", "device": "cuda: <H200>", "model": "qwen",
           "git_commit": "abc", "cells": [cell]}  # fmt: skip
    new = {**old, "date": "2026-01-02T00:00:00Z", "cells": [{**cell, "context": 1024}, cell]}
    new["cells"][1] = {**cell, "step_tok_s": [800.0, 1000.0]}
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "1-mlx-lm-b.json").write_text(json.dumps(old))
    (tmp_path / "mlx_lm_decode-a.json").write_text(json.dumps(new))
    found = rates.load(tmp_path)
    cells = found["cuda: <H200>", "qwen"]
    assert [c["context"] for c in cells] == [128, 1024]
    assert cells[0]["interval"] == pytest.approx([20, 20]) and cells[0]["aa_interval"] == [
        0.8,
        1.25,
    ]
    page = html.render(ranking.load(done[0])[0], found)
    assert page.count("<svg") == 4 and "qwen on cuda: &lt;H200&gt;" in page
    assert "<td>20.000x</td><td>20.000-20.000</td><td>0.800-1.250</td><td>abc</td>" in page
    del old["device"]
    (tmp_path / "deeper" / "1-mlx-lm-b.json").write_text(json.dumps(old))
    with pytest.raises(LabError, match="1-mlx-lm-b.json: expected decode rates"):
        rates.load(tmp_path)


def test_a_variant_that_does_not_run_is_void(tiny, tmp_path, one_fault):  # noqa: F811
    campaign = start(tiny, tmp_path, FakeEngine(runs=False))
    outcome = bench.run(campaign, WANTED[:1])
    summary = outcome.found[0]["summary"]
    assert summary["decision"] == "void: did not run"
    assert summary["reason"].startswith("did-not-run: router: expected at least")
    assert len(outcome.found[0]["schedule"]) == 1  # no time is spent on a void variant
    assert "void" in ranking.render(tmp_path)[0]


class Refuses(FakeEngine):
    def patch(self, model, variants=None, **more):
        raise ValueError("[patch] router: expected a GPU, got a CPU")


def test_a_variant_that_cannot_be_applied_is_told(tiny, tmp_path, one_fault):  # noqa: F811
    outcome = bench.run(start(tiny, tmp_path, Refuses()), WANTED[:1])
    assert outcome.skipped == {"router": "[patch] router: expected a GPU, got a CPU"}
    assert "not measured: [patch] router" in (tmp_path / "LAB_NOTEBOOK.md").read_text()


class Interrupted(FakeEngine):
    """Ctrl-C in the middle of the second variant."""

    def patch(self, model, variants=None, **more):
        if "experts" in variants:
            raise KeyboardInterrupt
        return super().patch(model, variants, **more)


def test_an_interrupted_campaign_is_whole_and_goes_on(tiny, tmp_path, one_fault):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        bench.run(start(tiny, tmp_path, Interrupted()), WANTED)
    rows, complaints = ledger.read(tmp_path / ledger.NAME)
    assert [row["variant"] for row in rows] == ["stock", "router"]
    assert not complaints
    ranking.render(tmp_path)
    campaign = start(tiny, tmp_path, resume=True)
    assert campaign.id == rows[0]["campaign"]
    outcome = bench.run(campaign, WANTED)
    after, _ = ledger.read(tmp_path / ledger.NAME)
    assert after[:2] == rows
    assert [row["variant"] for row in after] == ["stock", "router", "experts+combine:fp32"]
    assert len(outcome.found) == 2
    assert start(tiny, tmp_path, resume=True).id != campaign.id  # written up: nothing to resume


def test_nothing_starts_after_the_deadline_and_resume_goes_on(tiny, tmp_path, one_fault):  # noqa: F811
    outcome = bench.run(start(tiny, tmp_path), WANTED[:1], deadline=time.monotonic() - 1)
    assert outcome.left == ["router"]
    assert not (tmp_path / "LAB_NOTEBOOK.md").exists()
    resumed = bench.run(start(tiny, tmp_path, resume=True), WANTED[:1])
    assert resumed.control == outcome.control
    assert [c["variant"] for c in resumed.found] == ["router"]


def test_a_device_is_named_by_its_kind(monkeypatch):
    class Gpu:
        type = mx.gpu

    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx, "device_info", lambda device: {"device_name": "NVIDIA H200"})
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert environment.device_name() == "cuda: NVIDIA H200"
    assert measure.memory_source() == "mlx"
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert environment.device_name() == "metal: NVIDIA H200"


@pytest.mark.parametrize(
    ("isa", "asked", "end"),
    [
        ("avx512", None, "cores"),
        ("avx512", "", "cores"),  # empty is as good as unset, as in the kernels' dispatch
        ("avx512", "avx512", "cores, AVX-512"),
        ("avx2", None, "cores, AVX2"),
        ("avx2", "avx2", "cores, AVX2"),
        ("neon", None, "cores, NEON"),
        ("plain", "plain", "cores, plain"),
    ],
)
def test_a_processor_is_told_by_its_instruction_set(monkeypatch, on_cpu, isa, asked, end):
    monkeypatch.setattr(environment._core, "cpu_isa", lambda: isa)
    monkeypatch.delenv("MOEFUSE_ISA", raising=False)
    if asked is not None:
        monkeypatch.setenv("MOEFUSE_ISA", asked)
    name = environment.device_name()
    assert name.startswith("cpu: ") and name.endswith(end)


def test_processors_of_one_brand_keep_their_own_rows(monkeypatch, on_cpu):
    def row(isa):
        monkeypatch.setattr(environment._core, "cpu_isa", lambda: isa)
        found = dict.fromkeys(ledger.KEYS, "same") | {"hardware": environment.device_name()}
        return found | {"isa": isa}

    monkeypatch.delenv("MOEFUSE_ISA", raising=False)
    newest = ledger.latest([row("avx512"), row("avx2"), row("avx512")])
    assert sorted(r["isa"] for r in newest) == ["avx2", "avx512"]


def test_an_asked_for_table_names_the_device():
    code = "from moefuse.lab import environment as e; print(e.device_name())"
    words = [sys.executable, "-c", f"import mlx.core as mx; mx.set_default_device(mx.cpu); {code}"]
    env = {**os.environ, "MOEFUSE_ISA": "plain"}
    told = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    assert told.endswith("cores, plain\n")


def test_rerun_repeats_and_refuses_another_model(done, tiny, tmp_path):  # noqa: F811
    out, _ = done
    path = next((out / capsule.FOLDER).glob("*-router.json"))
    found = bench.rerun(path, FakeEngine(), root=tiny.parents[1])
    assert found["pairs"] == 3
    low, high = found["old_interval"]
    assert found["inside"] == (low <= found["new_median"] <= high)
    other = shutil.copytree(tiny, tmp_path / "tiny")
    shutil.copy(tiny.parent / "prompts.json", tmp_path)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(LabError, match=r"\[rerun\] model tiny: expected sha256"):
        bench.rerun(path, FakeEngine(), root=tiny.parents[1], model=other)


def test_capsule_cannot_point_out_of_the_repository(done, tiny, tmp_path):  # noqa: F811
    found = capsule.read(next((done[0] / capsule.FOLDER).glob("*-router.json")))
    for bad in ("../tiny", "/etc", "a/../../b"):
        found["model"]["path"] = bad
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(found))
        with pytest.raises(LabError, match=r"\[capsule\] bad.json \$.model.path"):
            bench.rerun(path, FakeEngine(), root=tiny.parents[1])


def test_schedule_is_a_b_b_a_over_the_short_prompts():
    pool = [Prompt(f"s{i}", tuple(range(50))) for i in range(4)] + [Prompt("l", tuple(range(900)))]
    slots = make_schedule(pool, FULL_PLAN)
    assert [(s.length, s.prompt, s.tokens, s.order) for s in slots] == [
        ("short", "s0", 200, "AB"),
        ("short", "s1", 200, "BA"),
        ("short", "s2", 200, "AB"),
        ("long", "s0", 1024, "AB"),
        ("long", "s1", 1024, "BA"),
    ]


def test_less_than_the_minimum_is_quick():
    assert resized(FULL_PLAN, short=(300, 3)).quick is False
    assert resized(FULL_PLAN, short=(200, 2)).quick is True
    assert resized(FULL_PLAN, long=(1000, 2)).quick is True


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("router", "router"),
        ("combine+router", "router+combine"),
        ("experts:fp32", "experts:fp32"),
        ("stock", "stock"),
    ],
)
def test_variant_specs(spec, name):
    assert variants.parse(spec).name == name


@pytest.mark.parametrize("spec", ["", "x", "router+router", "router:", "router:fp64", "stock:fp32"])
def test_bad_variant_specs(spec):
    with pytest.raises(LabError, match=r"\[variants\]"):
        variants.parse(spec)


def test_void_counts_each_part():
    router = variants.parse("router")
    assert variants.did_not_run(router, {"moe_router": 20}, 10, 2) is None
    assert "got 19" in variants.did_not_run(router, {"moe_router": 19}, 10, 2)
    assert "got 0" in variants.did_not_run(router, {"moe_experts": 99}, 10, 2)
    both = variants.parse("experts+combine")
    assert variants.did_not_run(both, {"moe_experts": 20}, 10, 2) is None
    assert variants.did_not_run(both, {"moe_combine": 20}, 10, 2)


def test_schema_beside_the_capsules_is_the_package_s(done):
    assert (done[0] / capsule.SCHEMA_NAME).read_text() == capsule.SCHEMA_PATH.read_text()
