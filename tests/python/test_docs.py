"""The documents: their commands work, no link dangles, the picture is the plan's.

Blocks after `<!-- slow -->` run only with MOEFUSE_SLOW_DOCS=1; what installs is `./run wheel`'s.
With MOEFUSE_INSTALLED=VENV the commands are that environment's, in a folder that has only models/.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import pytest
from moefuse import _core

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for folder in (ROOT, ROOT / "docs", ROOT / "models", ROOT / "benchmarks")
    for path in folder.glob("*.md")
)
BLOCK = re.compile(r"(<!-- slow -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
INSTALLED = os.environ.get("MOEFUSE_INSTALLED")


def blocks(path: Path) -> list[tuple[bool, str, str]]:
    """(slow, language, text) of each fenced block."""
    found = BLOCK.findall(path.read_text())
    return [(bool(slow), language, text) for slow, language, text in found]


def runnable(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's commands: each line of a sh block, a python block as a whole."""
    found = []
    for slow, language, text in blocks(page):
        if language not in ("sh", "python") or slow and not os.environ.get("MOEFUSE_SLOW_DOCS"):
            continue
        pieces = text.strip().splitlines() if language == "sh" else [text]
        found += [(language, piece) for piece in pieces if "pip install" not in piece]
    return found


QUICK_START = ROOT / "docs" / "QUICKSTART.md"
OTHERS = [(page.name, *piece) for page in DOCUMENTS if page != QUICK_START
          for piece in runnable(page)]  # fmt: skip


def test_the_quick_start_has_commands_to_run():
    commands = " ".join(text for _, text in runnable(QUICK_START))
    for needed in ("moefuse doctor", "moefuse generate", "moefuse.mlx_lm generate", "patch(model)"):
        assert needed in commands


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(where the commands run, their environment)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOEFUSE_", "ZMLX_"))}
    kept["HF_HUB_OFFLINE"] = "1"
    if not INSTALLED:
        path = os.pathsep.join([str(ROOT / "python"), *filter(None, sys.path)])
        return ROOT, {**kept, "PYTHONPATH": path}
    kept.pop("PYTHONPATH", None)
    folder = tmp_path_factory.mktemp("anywhere")
    shutil.copytree(ROOT / "models", folder / "models")
    return folder, {**kept, "HOME": str(tmp_path_factory.mktemp("home"))}


def command(language: str, text: str) -> list[str]:
    words = ["python", "-c", text] if language == "python" else shlex.split(text)
    settings = []
    while words[0] == "env" or "=" in words[0]:
        settings.append(words.pop(0))
    if INSTALLED:
        return [*settings, str(Path(INSTALLED) / "bin" / words[0]), *words[1:]]
    program = {"moefuse": ["-m", "moefuse.cli"], "python": []}[words[0]]
    return [*settings, sys.executable, *program, *words[1:]]


@pytest.mark.parametrize(("language", "text"), runnable(QUICK_START))
def test_the_quick_start_runs(language, text, place, tmp_path):
    works(language, text, place, tmp_path)


@pytest.mark.parametrize(("page", "language", "text"), OTHERS)
def test_the_other_pages_run(page, language, text, place, tmp_path):
    works(language, text.replace("MODEL", "models/qwen3-moe-tiny"), place, tmp_path)


def works(language: str, text: str, place, tmp_path: Path) -> None:
    """The command ends well and says something; a server answers."""
    folder, env = place
    words = command(language, text)
    if " server " in text:
        serve(words, folder, env, tmp_path / "log")
        return
    if "bench" in words and not INSTALLED:
        words += ["--out", str(tmp_path)]  # the ledger of this tree is no test's
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() or (language == "python" and "print(" not in text)


def serve(words: list[str], folder: Path, env: dict[str, str], log: Path) -> None:
    """The server answers, says what it fused, and ends when it is told to."""
    port = words[words.index("--port") + 1]
    with log.open("w") as out:
        child = subprocess.Popen(words, cwd=folder, env=env, stdout=out, stderr=out)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert child.poll() is None, log.read_text()
                time.sleep(0.3)
        body = b'{"messages": [{"role": "user", "content": "The"}], "max_tokens": 4}'
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body,
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert b'"choices"' in reply.read()
        assert "moe_experts fused in" in log.read_text()
    finally:
        child.terminate()
        child.wait(timeout=30)


def prose(path: Path) -> str:
    return BLOCK.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The names that a forge gives to the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.M)
    kept = (re.sub(r"[^\w\- ]", "", title.strip().lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


def dangling(path: Path) -> list[str]:
    """The links of a document that lead to no file or no heading."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        heading = target.suffix != ".md" or not anchor or not target.exists()
        if not target.exists() or not (heading or anchor in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_dangles(path):
    assert dangling(path) == []


def test_a_dangling_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](#a-title-here) [b](#b) [c](none.md) [d](https://x.y)\n")
    assert dangling(page) == ["#b", "none.md"]


def test_every_page_is_reachable_from_the_quick_start():
    seen, todo = set(), [ROOT / "docs" / "QUICKSTART.md"]
    while todo:
        path = todo.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        links = re.findall(r"\]\(([^)#\s:]+\.md)", prose(path))
        todo += [path.parent / link for link in links]
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {path.name for path in seen}


def columns() -> dict[str, list[str]]:
    """The stages that the picture draws for each family."""
    picture = next(text for _, language, text in blocks(ROOT / "docs" / "HOW_IT_WORKS.md"))
    lines = picture.splitlines()
    head = next(i for i, line in enumerate(lines) if "qwen3_moe   " in line)
    end = next(i for i, line in enumerate(lines) if "a dense layer has" in line)
    middle = lines[head].index("glm4_moe_lite")
    halves = {"qwen3-moe-tiny": slice(0, middle), "glm4-moe-lite-tiny": slice(middle, None)}
    words = {
        name: [line[half].strip("| ") for line in lines[head + 1 : end]]
        for name, half in halves.items()
    }
    return {name: [w for w in column if w and ":" not in w] for name, column in words.items()}


@pytest.mark.parametrize("name", ["qwen3-moe-tiny", "glm4-moe-lite-tiny"])
def test_the_picture_is_the_plan(name):
    folder = ROOT / "models" / name
    weights = mx.load(str(folder / "model.safetensors"))
    stages = _core.Decoder((folder / "config.json").read_text(), weights, "exact").stages()
    last = max(stage["layer"] for stage in stages)
    sparse = [stage["name"] for stage in stages if stage["layer"] in (-1, last)]
    assert columns()[name] == sparse
    text = (ROOT / "docs" / "HOW_IT_WORKS.md").read_text()
    assert all(stage["name"] in text for stage in stages)  # a dense layer's too
