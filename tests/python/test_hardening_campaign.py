"""The real `moefuse bench` against what a machine does to it: kills, full disks, locks, no network.

Each test runs the command itself, in a process of its own, on a tiny checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab_support import tiny  # noqa: F401
from moefuse.lab import capsule, files, ledger, ranking
from server_support import child_env

BENCH = ("bench", "models/tiny", "--quick", "--short", "8x1", "--long", "8x1")
ROUTER = (*BENCH, "--variants", "router")
CLI = ("-m", "moefuse.cli")


@pytest.fixture
def repo(tiny, tmp_path):  # noqa: F811
    shutil.copytree(tiny.parent, tmp_path / "models")
    return tmp_path


def start(folder: Path, *words, program=CLI, prefix=(), preexec=None, **env) -> subprocess.Popen:
    """A child's own process, so that it can be killed or short of something."""
    found = child_env(MOEFUSE_NUM_THREADS="1", PYTHONWARNINGS="ignore", **env)
    return subprocess.Popen(
        [*prefix, sys.executable, *program, *map(str, words)], cwd=folder, env=found, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=preexec,
    )  # fmt: skip


def run(folder: Path, *words, **more) -> tuple[int, str]:
    """(exit code, everything it said)"""
    child = start(folder, *words, **more)
    said, _ = child.communicate(timeout=600)
    assert "Traceback" not in said, said
    return child.returncode, said


def whole(folder: Path) -> list[str]:
    """Variants in the ledger, every line of it a row with its capsule whole."""
    out = folder / "benchmarks"
    rows, complaints = ledger.read(out / ledger.NAME)
    assert not complaints
    for row in rows:
        found = capsule.read(out / row["capsule"])
        assert capsule.row(found, row["capsule"]) == row
    return [row["variant"] for row in rows]


def finish(folder: Path, words=ROUTER) -> None:
    """--resume brings it to its end: 1 says that the tiny model's faults were not all caught."""
    code, said = run(folder, *words, "--resume")
    assert code in (0, 1) and "ranking:" in said, said
    out = folder / "benchmarks"
    assert ranking.render(out)[0] == (out / ranking.NAME).read_text()


# The process ends itself in the middle of a write: no other way hits the very place.
KILLED = """
import os, signal, sys
from moefuse import cli
from moefuse.lab import ledger, notebook

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_row(path, row):
    with path.open("a") as stream:
        stream.write('{"capsule": "repro_capsules/x.json", "varia')
    die()

point = sys.argv.pop(1)
if point == "before the first row":
    ledger.append = die
elif point == "half a row":
    ledger.append = half_a_row
else:
    notebook.add = die
cli.main()
"""


def test_killed_in_the_middle_of_a_write(repo):
    """At three places in turn: each time the campaign goes on, and measures nothing twice."""
    out = repo / "benchmarks"
    for point in ("before the first row", "half a row", "before the notebook"):
        child = start(repo, point, *ROUTER, "--resume", program=("-c", KILLED))
        child.communicate(timeout=600)
        assert child.returncode == -signal.SIGKILL
        if point == "half a row":
            rows, complaints = ledger.read(out / ledger.NAME)
            assert not rows and "line 1" in complaints[0]
    finish(repo)
    rows, complaints = ledger.read(out / ledger.NAME)
    assert [row["variant"] for row in rows] == ["stock", "router"]
    assert len({row["campaign"] for row in rows}) == 1
    assert len(complaints) == 1  # the torn line: told, left out, and followed by whole ones
    assert len(list((out / capsule.FOLDER).glob("*.json"))) == 2
    assert (out / "LAB_NOTEBOOK.md").read_text().count("## EXP-") == 1


def test_killed_from_outside(repo):
    """As soon as the first row is there, which is at any point of what follows."""
    words = (*BENCH, "--variants", "router,combine")
    child = start(repo, *words)
    path = repo / "benchmarks" / ledger.NAME
    while not (path.exists() and path.stat().st_size):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)
    child.kill()
    child.communicate(timeout=60)
    before = whole(repo)
    assert before[0] == "stock" and len(before) < 3
    finish(repo, words)
    assert whole(repo) == ["stock", "router", "combine"]


def limit_files(size: int):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_disk_that_is_full_from_the_start(repo):
    code, said = run(repo, *ROUTER, preexec=limit_files(4096))
    assert code == 2
    assert "capsule.schema.json: expected to write it, got File too large" in said
    assert "stock (1 of" not in said  # nothing was measured in vain


def test_a_disk_that_is_full_at_a_row(repo):
    """The row is taken back, its capsule stays, and the next run enters it."""
    out = repo / "benchmarks"
    out.mkdir()
    other = {key: "x" for key in ledger.KEYS} | {"capsule": "repro_capsules/other.json"}
    ledger.append(out / ledger.NAME, {**other, "pad": "x" * 30_000})
    before = (out / ledger.NAME).read_bytes()
    code, said = run(repo, *ROUTER, preexec=limit_files(len(before) + 100))
    assert code == 2
    assert f"{ledger.NAME}: expected to write it, got" in said
    assert (out / ledger.NAME).read_bytes() == before
    (kept,) = (out / capsule.FOLDER).glob("*.json")
    (out / ledger.NAME).unlink()
    digest = kept.read_bytes()
    finish(repo)
    assert whole(repo) == ["stock", "router"] and kept.read_bytes() == digest


def allowed(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def test_a_disk_that_is_really_full(repo):
    """A file system of nine pages: the schema, the first capsule and its row, and no more."""
    space = ("unshare", "-rm", "sh", "-c")
    if not allowed(*space, "mount -t tmpfs tmpfs /mnt"):
        pytest.skip("no file system of one's own here (unshare -rm)")
    (repo / "benchmarks").mkdir()
    mount = 'mount -t tmpfs -o size=36k tmpfs benchmarks && "$@"; code=$?; ls -A benchmarks/*; '
    end = "cat benchmarks/matrix.jsonl; exit $code"
    code, said = run(repo, *ROUTER, prefix=(*space, mount + end, "sh"))
    assert code == 2
    assert "expected to write it, got No space left on device" in said
    listed = said[said.index("error:") :]
    assert ".json." not in listed  # no temporary file is left behind
    rows = [json.loads(line) for line in listed.split("\n") if line.startswith("{")]
    assert [row["variant"] for row in rows] == ["stock"]


def as_nobody_special():
    """Root without the right to write everywhere; PR_CAPBSET_DROP of CAP_DAC_OVERRIDE."""
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(24, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="root may write anywhere")
def test_read_only_folders(repo):
    """A folder that can't be written is named first; a model's may be read-only, and home too."""
    home = repo / "home"
    home.mkdir()
    for path in (repo / "models" / "tiny", repo / "models", home, repo):
        path.chmod(0o500)
    try:
        code, said = run(repo, *ROUTER, preexec=as_nobody_special, HOME=str(home))
        assert code == 2 and "stock (1 of" not in said
        assert "[output] benchmarks: expected a writable folder, got Permission denied" in said
        repo.chmod(0o700)
        code, said = run(
            repo, "generate", "models/tiny", "--prompt", "A list", "--max-tokens", 4,
            preexec=as_nobody_special, HOME=str(home),
        )  # fmt: skip
        assert code == 0, said
    finally:
        for path in (repo, repo / "models", repo / "models" / "tiny"):
            path.chmod(0o700)


def test_two_campaigns_at_once(repo):
    """One ledger, one campaign: the second is told so, and the first is undisturbed."""
    out = repo / "benchmarks"
    files.require_writable(out)
    with files.alone(out):
        code, said = run(repo, *ROUTER)
        assert code == 2
        assert "[output] benchmarks: expected no campaign at work there, got one" in said
        assert not (out / ledger.NAME).exists()
        assert ranking.render(out)  # reading is free
    first, second = start(repo, *ROUTER), start(repo, *ROUTER)
    codes = []
    for child in (first, second):
        said, _ = child.communicate(timeout=600)
        codes.append(child.returncode)
        assert (child.returncode == 2) == ("expected no campaign at work" in said), said
    assert codes.count(2) <= 1
    assert whole(repo)[:2] == ["stock", "router"]


# Every attempt to reach anything ends the process with a code of its own.
NO_NETWORK = """
import os, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, f"NETWORK {event} {args}".encode())
        os._exit(97)
sys.addaudithook(refuse)
"""


def test_no_network(repo):
    """Without an interface where that can be had, and with an eye on every call where not."""
    guard = repo / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(NO_NETWORK)
    prefix = ("unshare", "-rn") if allowed("unshare", "-rn", "true") else ()
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
    path = os.pathsep.join([str(guard), *(p for p in sys.path if p)])
    env = {**nowhere, "PYTHONPATH": path, "HF_HUB_OFFLINE": "0"}
    probe = ("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert run(repo, program=probe, **env)[0] == 97  # the guard is there
    code, said = run(repo, *ROUTER, prefix=prefix, **env)
    assert code in (0, 1) and "ranking:" in said, said
    assert whole(repo) == ["stock", "router"]
    gone = run(repo, "doctor", "org/name", prefix=prefix, **env)
    assert "[model] org/name: expected a model folder, got none" in gone[1]


def test_unicode_spaces_and_what_a_shell_would_run(repo):
    odd = repo / "año 模型 'q' $(touch pwned) `touch pwned`; touch pwned #"
    shutil.move(repo / "models", odd / "my models")
    words = [odd / "my models" / "tiny" if word == "models/tiny" else word for word in ROUTER]
    code, said = run(repo, *words, "--out", odd / "out put", LC_ALL="C")
    assert code in (0, 1) and "ranking:" in said, said
    rows, complaints = ledger.read(odd / "out put" / ledger.NAME)
    assert not complaints and [row["variant"] for row in rows] == ["stock", "router"]
    page = odd / "the page.html"
    code, said = run(repo, "report", "--out", odd / "out put", "--html", page, LC_ALL="C")
    assert code == 0 and "<svg" in page.read_text(), said
    path = odd / "out put" / rows[1]["capsule"]
    model = odd / "my models" / "tiny"
    code, said = run(repo, "rerun", path, "--model", model, LC_ALL="C")
    assert code in (0, 1) and "new median" in said, said
    assert not list(repo.rglob("pwned"))


def test_a_path_that_is_no_text(repo):
    shutil.copytree(repo / "models", repo / os.fsdecode(b"bad\xff"))
    bad = os.fsdecode(b"bad\xff/tiny")  # Linux takes any bytes for a name
    message = r"'bad\udcff/tiny': expected a path in UTF-8, got other bytes"
    code, said = run(repo, "bench", bad, "--quick")
    assert code == 2 and f"[model] {message}" in said, said
    code, said = run(repo, *ROUTER, "--out", bad)
    assert code == 2 and f"[output] {message}" in said, said
