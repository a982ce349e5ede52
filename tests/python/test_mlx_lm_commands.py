"""mlx-lm's commands, each as its own process, on stock and patched: the same words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mlx_lm_support import MODELS, PROMPTS, child_env, folder, run, said, same_command
from test_mlx_lm import adapter


@pytest.mark.parametrize("name", MODELS)
def test_generate(name):
    words = ("generate", "--model", folder(name), "--prompt", PROMPTS[0])
    assert len(same_command(*words, "--max-tokens", 32)) > 30


def test_generate_with_a_draft_model_and_a_sampler():
    same_command(
        "generate", "--model", folder(MODELS[1]), "--draft-model", folder(MODELS[0]),
        "--num-draft-tokens", 2, "--prompt", PROMPTS[0], "--max-tokens", 24, "--temp", 1,
        "--top-p", 0.9, "--seed", 3,
    )  # fmt: skip


def test_generate_with_an_adapter(tmp_path):
    path = adapter(MODELS[0], tmp_path / "adapter", ["mlp.switch_mlp.gate_proj"])
    words = ("generate", "--model", folder(MODELS[0]), "--prompt", PROMPTS[0], "--max-tokens", 24)
    told = {
        "router,experts": "experts: gate_proj is a LoRASwitchLinear",
        "step": "step: [",
    }
    tuned = same_command(*words, "--adapter-path", path, fused=told)
    assert tuned != said(run("mlx_lm", *words).stdout)


def test_a_prompt_cache_file_from_the_commands(tmp_path):
    """cache_prompt writes the same file, and generate goes on from it with the same words."""
    files = []
    for module, variants in (("mlx_lm", ""), ("moefuse.mlx_lm", "step")):
        file = tmp_path / f"{module}.safetensors"
        run(
            module, "cache_prompt", "--model", folder(MODELS[0]), "--prompt", PROMPTS[1],
            "--prompt-cache-file", file, MOEFUSE_VARIANTS=variants,
        )  # fmt: skip
        files.append(file)
    stock, patched = files
    assert stock.read_bytes() == patched.read_bytes()
    words = ("generate", "--prompt", PROMPTS[0], "--max-tokens", 24, "--prompt-cache-file")
    assert len(same_command(*words, patched)) > 20


def test_chat():
    """Two turns, a reset, a turn, help, the end: typed into the command."""
    typed = "\n".join((*PROMPTS[:2], "r", PROMPTS[2], "h", "q")) + "\n"
    text = same_command("chat", "--model", folder(MODELS[0]), "--max-tokens", 16, stdin=typed)
    assert "context cleared" in text and "bye" in text


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (["fly"], {}, "[mlx_lm] command: expected one of"),
        (["generate"], {"MOEFUSE_LOG": "loud"}, "MOEFUSE_LOG: expected one of"),
        (["generate"], {"MOEFUSE_VARIANTS": "magic"}, "variants: expected names from"),
        (["chat"], {"ZMLX_QWEN_COMBINE_MODE": "odd"}, "ZMLX_QWEN_COMBINE_MODE: expected one of"),
    ],
)
def test_what_cannot_be_read_is_named(words, env, message):
    done = subprocess.run(
        [sys.executable, "-m", "moefuse.mlx_lm", *words],
        env=child_env(**env), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr
