"""What must never happen, looked for in the tree and then tried."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from lab_support import FakeEngine, one_fault, tiny  # noqa: F401
from moefuse import cli
from moefuse.lab import LabError, capsule, checkpoint, ledger
from server_support import ROOT
from typer.testing import CliRunner

runner = CliRunner()

# Calls that would run, import or unpickle what a file says. Whatever is listed here with a file has
# been looked at: the file may hold it, and no other.
FORBIDDEN = {
    r"\bpickle\b|\bmarshal\b|\bshelve\b|joblib|torch\.load": (),
    r"trust_remote_code": (),
    r"shell\s*=\s*True|os\.system|os\.popen|\bpopen\(|(?<!platform\.)\bsystem\(": (),
    r"(?<![\w.:>])(?:eval|exec)\(|compile\([^)]*,\s*['\"]exec": (),
    r"yaml\.load|__import__\(": (),
    r"allow_pickle": (),
}
SOURCES = ("python", "src", "include", "models", "scripts", "examples", "benchmarks")
KINDS = {".py", ".cpp", ".h", ".inl", ".body", ".cu", ".cuh"}


def test_nothing_in_the_tree_runs_what_a_file_says():
    read = 0
    for path in (p for top in SOURCES for p in (ROOT / top).rglob("*") if p.suffix in KINDS):
        text = path.read_text(encoding="utf-8")
        read += 1
        for pattern, allowed in FORBIDDEN.items():
            found = re.search(pattern, text)
            name = path.relative_to(ROOT).as_posix()
            assert not found or name in allowed, f"{name}: {found and found.group()}"
    assert read > 100


def test_the_search_finds_what_it_looks_for():
    samples = ("import pickle", "f(trust_remote_code=x)", "run(x, shell=True)", "exec(x)",
               "yaml.load(f)", "np.load(f, allow_pickle=True)")  # fmt: skip
    for pattern, sample in zip(FORBIDDEN, samples, strict=True):
        assert re.search(pattern, sample)
    assert not re.search(r"(?<![\w.:>])(?:eval|exec)\(", "mx.eval(x)")


def test_every_child_process_is_a_list_of_words():
    """subprocess is used in one place of the package, with words of its own and no shell."""
    using = [p for p in (ROOT / "python").rglob("*.py") if "subprocess" in p.read_text()]
    assert [p.name for p in using] == ["environment.py"]
    assert '("git", "-C", str(root), *args)' in using[0].read_text()


@pytest.fixture
def repo(tiny, tmp_path, monkeypatch, one_fault):  # noqa: F811
    """A repository in a folder of its own, so that there is something outside of it."""
    inside = tmp_path / "repo"
    shutil.copytree(tiny.parent, inside / "models")
    monkeypatch.chdir(inside)
    monkeypatch.setattr(cli, "_engine", FakeEngine)
    return inside


def run(*words):
    return runner.invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def stored(repo) -> Path:
    words = ("--quick", "--short", "8x1", "--long", "8x1", "--variants", "router")
    assert "ranking:" in run("bench", "models/tiny", *words).output
    (path,) = (repo / "benchmarks" / "repro_capsules").glob("*router.json")
    return path


def refused(result, message: str) -> None:
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and message in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize("path", ["../outside", "/etc", "models/../../outside", "link"])
def test_a_capsule_whose_model_lies_outside(repo, stored, path):
    shutil.copytree(repo / "models" / "tiny", repo.parent / "outside")
    (repo / "link").symlink_to(repo.parent / "outside")
    found = json.loads(stored.read_text())
    found["model"]["path"] = path
    stored.write_text(json.dumps(found))
    by_schema, by_link = "$.model.path: ", "[path] 'link': expected a path inside the repository"
    refused(run("rerun", stored), by_link if path == "link" else by_schema)


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hostname", "repro_capsules/link.json"])
def test_a_ledger_whose_capsule_lies_outside(repo, stored, name):
    """report reads no file outside of its folder, also not by a link."""
    out = repo / "benchmarks"
    shutil.copy(stored, repo / "secret.json")
    (out / "repro_capsules" / "link.json").symlink_to(repo / "secret.json")
    rows, _ = ledger.read(out / ledger.NAME)
    ledger.append(out / ledger.NAME, {**rows[1], "capsule": name, "timestamp": "9999"})
    before = (out / "RANKING.md").read_bytes()
    refused(run("report"), f"[path] {name!r}: expected a path inside the repository")
    assert (out / "RANKING.md").read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../../x"])
def test_a_capsule_is_written_in_its_folder_only(repo, stored, name):
    found = json.loads(stored.read_text())
    with pytest.raises(LabError, match="expected a path inside"):
        capsule.write(repo / "benchmarks", name, found)


@pytest.mark.parametrize(
    "variant", ["$(touch pwned)", "router; touch pwned", "<script>", "../router", ""]
)
def test_a_capsule_whose_variant_is_none(repo, stored, variant):
    found = json.loads(stored.read_text())
    found["variant"] = variant
    stored.write_text(json.dumps(found))
    assert run("rerun", stored).exit_code == 2
    assert not (repo / "pwned").exists()


def test_a_page_shows_text_as_text(repo, stored):
    """A reason with markup, in row and capsule alike, stays text in the HTML report."""
    out = repo / "benchmarks"
    found = json.loads(stored.read_text())
    found["summary"]["reason"] = found["model"]["kind"] and "<script>alert(1)</script>"
    found["meta"]["date"] = "9999-01-01T00:00:00Z"
    stored.write_text(json.dumps(found))
    name = f"repro_capsules/{stored.name}"
    (out / ledger.NAME).write_text("")
    ledger.append(out / ledger.NAME, capsule.row(found, name))
    assert run("report", "--html", "page.html").exit_code == 0
    page = (repo / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page


@pytest.mark.parametrize("line", ["[1]", '{"capsule": 5}', '{"capsule": "x"}', "[" * 100_000, "\0"])
def test_a_ledger_line_that_is_no_row(repo, stored, line):
    path = repo / "benchmarks" / ledger.NAME
    with path.open("a") as stream:
        stream.write(line + "\n")
    result = run("report")
    assert result.exit_code == 0 and "line 3" in result.output
    rows, complaints = ledger.read(path)
    assert len(rows) == 2 and len(complaints) == 1


EVIL = """
import pathlib
pathlib.Path("pwned").write_text("")
class Model: pass
class ModelArgs: pass
class Tokenizer: pass
"""


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_file": "evil.py"}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.ModelArgs", "AutoModel": "evil.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"chat_template": "{{ ''.__class__.__mro__[1].__bases__ }}"}),
    ],
)  # fmt: skip
def test_code_that_comes_with_a_checkpoint_is_not_run(repo, file, change):
    folder = repo / "models" / "tiny"
    (folder / "evil.py").write_text(EVIL)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    words = ("generate", folder, "--prompt", "A list", "--max-tokens", "2", "--chat")
    result = run(*words, "--variants", "stock")
    assert not (repo / "pwned").exists() and not list(repo.rglob("__pycache__"))
    assert "<class" not in result.output


def test_the_server_keeps_its_limits():
    """python -m moefuse.mlx_lm hands every word on: no default of mlx-lm's is another one."""
    text = (ROOT / "python" / "moefuse" / "mlx_lm.py").read_text()
    assert "module.main()" in text
    for word in ("--host", "0.0.0.0", "max_tokens", "allowed-origins", "argparse"):
        assert word not in text


def test_no_weights_but_safetensors(repo):
    """A checkpoint of pickled weights is refused unread."""
    folder = repo / "models" / "tiny"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LabError, match=r"expected model\*.safetensors, got none"):
        checkpoint.inspect(folder)
