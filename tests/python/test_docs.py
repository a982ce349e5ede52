"""The documents: the quick start's commands work, no link dangles, the picture is the plan's.

Blocks after `<!-- slow -->` run only with MOEFUSE_SLOW_DOCS=1, those that install or serve never.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
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
UNTRIED = ("pip install", " server ")  # an environment's, and one that does not end


def blocks(path: Path) -> list[tuple[bool, str, str]]:
    """(slow, language, text) of each fenced block."""
    found = BLOCK.findall(path.read_text())
    return [(bool(slow), language, text) for slow, language, text in found]


def runnable() -> list[tuple[str, str]]:
    found = []
    for slow, language, text in blocks(ROOT / "docs" / "QUICKSTART.md"):
        if slow and not os.environ.get("MOEFUSE_SLOW_DOCS"):
            continue
        pieces = text.strip().splitlines() if language == "sh" else [text]
        found += [(language, piece) for piece in pieces if not any(u in piece for u in UNTRIED)]
    return found


def test_the_quick_start_has_commands_to_run():
    commands = " ".join(text for _, text in runnable())
    for needed in ("moefuse doctor", "moefuse generate", "moefuse.mlx_lm generate", "patch(model)"):
        assert needed in commands


@pytest.mark.parametrize(("language", "text"), runnable())
def test_the_quick_start_runs(language, text, tmp_path):
    if language == "python":
        command = [sys.executable, "-c", text]
    else:
        words = shlex.split(text)
        program = {"moefuse": ["-m", "moefuse.cli"], "python": []}[words[0]]
        command = [sys.executable, *program, *words[1:]]
        if words[:2] == ["moefuse", "bench"]:
            command += ["--out", str(tmp_path)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOEFUSE_", "ZMLX_"))}
    path = os.pathsep.join([str(ROOT / "python"), *filter(None, sys.path)])
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


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
