"""examples/generate.cpp, built as a user would on an installed library, says what Python says."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import moefuse
import pytest
from mlx_lm.models.cache import make_prompt_cache

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"{platform.system()}-{platform.machine()}"
MODELS = ("qwen3-moe-tiny", "glm4-moe-lite-tiny")
TEXT, COUNT = "The function returns a list of", 40

pytestmark = pytest.mark.skipif(
    not (BUILD / "build.ninja").exists(), reason="the package is installed, not built in this tree"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("prefix with a space")
    tree = tmp_path_factory.mktemp("examples")
    for command in (
        ["cmake", "--install", BUILD, "--prefix", prefix, "--component", "cpp"],
        ["cmake", "-S", ROOT / "examples", "-B", tree, "-G", "Ninja",
         f"-Dmoefuse_ROOT={prefix}", f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", tree],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return tree / "generate"


def run(program: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120)


def greedy(model, prompt: list[int]) -> list[int]:
    """Token after token, the prompt's too, as the program does it."""
    cache, tokens = make_prompt_cache(model), []
    for token in prompt[:-1]:
        model(mx.array([[token]]), cache=cache)
    last = prompt[-1]
    for _ in range(COUNT):
        last = int(mx.argmax(model(mx.array([[last]]), cache=cache)[0, -1]))
        tokens.append(last)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_its_tokens_are_pythons(program, name):
    folder = ROOT / "models" / name
    model, tokenizer = mlx_lm.load(str(folder))
    prompt = tokenizer.encode(TEXT)
    stock = greedy(model, prompt)
    report = moefuse.patch(model, [], step=True)
    try:
        assert greedy(model, prompt) == stock
        assert report.calls["step"] == len(prompt) - 1 + COUNT
    finally:
        moefuse.unpatch(model)
    done = run(program, folder, COUNT, *prompt)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == stock
    other = run(program, folder, COUNT, *prompt[::-1])
    assert [int(token) for token in other.stdout.split()] != stock  # the comparison can fail


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((ROOT / "models" / MODELS[0], 4, "x"), "TOKEN: expected a number from 0, got 'x'"),
        ((ROOT / "models" / MODELS[0], 4, 10**8), "rows[0].token: expected 0 to "),
        ((ROOT / "models" / MODELS[0], 10**6, 1), "COUNT: expected at most "),
        ((ROOT / "no such folder", 4, 1), "no such folder"),
    ],
)
def test_bad_input_is_named(program, words, message):
    done = run(program, *words)
    assert done.returncode == 1 and not done.stdout
    assert message in done.stderr
