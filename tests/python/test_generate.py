"""`moefuse generate` and a patched mlx_lm.generate: the same seed, the same tokens, in `exact`
stock's; and a checkpoint too big for the memory is refused before it is read."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import moefuse
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from moefuse import _core, cli
from moefuse.lab import checkpoint
from typer.testing import CliRunner

MODELS = Path(__file__).resolve().parents[2] / "models"
CHECKPOINTS = ("qwen3-moe-tiny", "glm4-moe-lite-tiny")
PROMPT, TOKENS, SEED = "The function returns", 40, 11
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temp": 0.8},
    "top-p": {"temp": 0.9, "top_p": 0.7},
    "top-k": {"temp": 1.1, "top_k": 5},
    "min-p": {"temp": 1.0, "min_p": 0.1},
    "repetition penalty": {"temp": 0.7, "repetition_penalty": 1.3},
}


def from_mlx_lm(model, tokenizer, options: dict, seed: int = SEED) -> str:
    options = dict(options)
    processors = make_logits_processors(repetition_penalty=options.pop("repetition_penalty", None))
    mx.random.seed(seed)
    return mlx_lm.generate(
        model, tokenizer, PROMPT, max_tokens=TOKENS, sampler=make_sampler(**options),
        logits_processors=processors,
    )  # fmt: skip


def from_command(name: str, options: dict, variant: str) -> str:
    words = ["generate", str(MODELS / name), "--prompt", PROMPT, "--max-tokens", str(TOKENS)]
    words += ["--seed", str(SEED), "--variants", variant]
    for option, value in options.items():
        words += ["--" + option.replace("_", "-"), str(value)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    return result.stdout.removesuffix("\n")


@pytest.mark.parametrize("accumulate", ["exact", "fp32_no_fma"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_same_seed_gives_the_same_tokens(name, accumulate):
    model, tokenizer = mlx_lm.load(str(MODELS / name))
    stock = {kind: from_mlx_lm(model, tokenizer, o) for kind, o in SAMPLINGS.items()}
    report = moefuse.patch(model, [], step=True, accumulate=accumulate)
    for kind, options in SAMPLINGS.items():
        patched = from_mlx_lm(model, tokenizer, options)
        assert from_command(name, options, f"step:{accumulate}") == patched, kind
        if accumulate == "exact":
            assert patched == stock[kind], kind
    assert report.calls["step"] >= (TOKENS - 1) * len(SAMPLINGS)
    assert not [why for why in report.fallbacks if "prompt" not in why]
    # The options do something, and so does the seed.
    assert len(set(stock.values())) == len(SAMPLINGS)
    other = from_mlx_lm(model, tokenizer, SAMPLINGS["temperature"], seed=SEED + 1)
    assert other != stock["temperature"]


def test_a_checkpoint_too_big_for_the_memory_is_told_before_it_is_read(monkeypatch):
    found = checkpoint.inspect(MODELS / CHECKPOINTS[0])
    _core.check_memory(found.name, sum(f.stat().st_size for f in found.weight_files))
    huge = 1 << 50
    with pytest.raises(ValueError, match=f"available memory, got an estimate of {huge * 21 // 20}"):
        _core.check_memory(found.name, huge)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(_core, "check_memory", lambda name, size: _check(name, size << 40))
    words = ["generate", str(found.path), "--prompt", PROMPT]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2 and "an estimate of" in result.output


_check = _core.check_memory
