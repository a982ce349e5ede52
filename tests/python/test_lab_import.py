"""Evidence measured elsewhere joins the ledger: whole, once, and only if it is what it says."""

import json
import shutil
import tarfile

import pytest
from lab_support import FakeEngine, one_fault, tiny  # noqa: F401
from moefuse.lab import (
    LabError,
    bench,
    capsule,
    checkpoint,
    importer,
    ledger,
    notebook,
    ranking,
    variants,
)
from moefuse.lab.schedule import Plan
from typer.testing import CliRunner

PLAN = Plan({"short": (8, 1), "long": (8, 1)}, quick=True, extra_tokens=0, chunk=8)


class CutOff(FakeEngine):
    """The machine is gone in the middle of the second variant."""

    def patch(self, model, variants=None, **more):
        if "combine" in variants:
            raise KeyboardInterrupt
        return super().patch(model, variants, **more)


@pytest.fixture(scope="module")
def evidence(tiny, tmp_path_factory):  # noqa: F811
    """The output folder of a campaign that was cut off in its second variant."""
    out = tmp_path_factory.mktemp("far") / "evidence"
    bench.prepare(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEFUSE_GIT_COMMIT", "0123456789ab")
        patch.setattr("moefuse.lab.faults.FAULTS", {})
        campaign = bench.open_campaign(
            checkpoint.inspect(tiny), PLAN, CutOff(), prompt_file=None, root=tiny.parents[1],
            out=out, command="moefuse bench tiny --quick",
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            bench.run(campaign, [variants.parse("router"), variants.parse("combine")])
    return out


def names(out):
    rows, complaints = ledger.read(out / ledger.NAME)
    assert complaints == []
    return [row["variant"] for row in rows]


def test_what_a_cut_off_campaign_finished_is_taken_once(evidence, tmp_path):
    out = tmp_path / "benchmarks"
    assert len(importer.take(evidence, out)) == 2
    assert names(out) == ["stock", "router"]
    assert ranking.render(out) == ((out / ranking.NAME).read_text(), [])
    assert notebook.STOPPED in (out / notebook.NAME).read_text()
    for path in (evidence / capsule.FOLDER).iterdir():
        assert (out / capsule.FOLDER / path.name).read_bytes() == path.read_bytes()
    before = (out / ledger.NAME).read_bytes()
    assert importer.take(evidence, out) == []
    assert (out / ledger.NAME).read_bytes() == before
    (out / ledger.NAME).unlink()  # a stop between a capsule and its row
    assert len(importer.take(evidence, out)) == 2
    assert (out / ledger.NAME).read_bytes() == before


def test_a_packed_folder_is_appended_by_the_command(evidence, tmp_path):
    from moefuse import cli

    packed, out = tmp_path / "evidence.tar.gz", tmp_path / "benchmarks"
    with tarfile.open(packed, "w:gz") as stream:
        stream.add(evidence, "evidence")
    bench.prepare(out)
    done = CliRunner().invoke(cli.app, ["report", "--out", str(out), "--import", str(packed)])
    assert done.exit_code == 0, done.output
    assert names(out) == ["stock", "router"]
    packed.write_bytes(packed.read_bytes()[:200])
    with pytest.raises(LabError, match=r"\[import\] evidence.tar.gz: expected"):
        importer.take(packed, out)


@pytest.mark.parametrize("name", ["../outside", "/outside", "evidence/link"])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, name):
    packed = tmp_path / "evidence.tar.gz"
    member = tarfile.TarInfo(name)
    if name.endswith("link"):
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
    with tarfile.open(packed, "w:gz") as stream:
        stream.addfile(member)
    with pytest.raises(LabError, match=f"expected plain files and folders, got '{name}'"):
        importer.take(packed, tmp_path / "benchmarks")


def change(path, **more):
    found = json.loads(path.read_text())
    for key, value in more.items():
        section, _, name = key.partition("_0_")
        found[section][name] = value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: change(f, meta_0_git_commit="0123-dirty"), "row and capsule differ"),
        (lambda f: change(f, summary_0_decode_speedup=9.0), "row and capsule differ"),
        (lambda f: f.unlink(), "expected the capsule of a row"),
        (lambda f: f.write_text("{"), "expected JSON"),
    ],
)
def test_damaged_evidence_changes_nothing(evidence, tmp_path, damage, told):
    source = shutil.copytree(evidence, tmp_path / "evidence")
    out = tmp_path / "benchmarks"
    damage(next((source / capsule.FOLDER).glob("*-router.json")))
    with pytest.raises(LabError, match=told):
        importer.take(source, out)
    assert not (out / ledger.NAME).exists() and not list((out / capsule.FOLDER).iterdir())


def test_code_that_no_commit_names_and_a_capsule_already_there_are_refused(evidence, tmp_path):
    source, out = shutil.copytree(evidence, tmp_path / "evidence"), tmp_path / "benchmarks"
    importer.take(source, out)
    (source / ledger.NAME).unlink()
    file = next((source / capsule.FOLDER).glob("*-router.json"))
    change(file, summary_0_reason="other")
    with pytest.raises(LabError, match="expected the same capsule or none"):
        importer.take(source, out)
    change(file, meta_0_git_commit="0123456789ab-dirty")
    with pytest.raises(LabError, match="expected a clean commit"):
        importer.take(source, out)
    with pytest.raises(LabError, match="expected capsules, got none"):
        importer.take(tmp_path, out)
