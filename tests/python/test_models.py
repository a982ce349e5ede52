"""The two trained checkpoints, and that every figure in README is its capsule's."""

import json
import lzma
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import moefuse
import pytest
from mlx_lm import load, stream_generate
from moefuse.lab import behaviour

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"qwen3-moe-tiny": 8, "glm4-moe-lite-tiny": 4}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_is_small_and_has_the_real_structure(name):
    folder = ROOT / "models" / name
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 6e6
    config = json.loads((folder / "config.json").read_text())
    assert config["num_experts_per_tok"] == MODELS[name] and config["norm_topk_prob"]
    assert config["quantization"]["group_size"] == 64 and config["quantization"]["bits"] == 4
    if name.startswith("qwen3"):
        assert config["num_experts"] >= 32
        assert config["quantization"]["model.layers.0.mlp.gate"]["bits"] == 8
    else:
        assert config["n_routed_experts"] >= 32 and config["n_shared_experts"] == 1
        assert config["first_k_dense_replace"] == 1 and config["routed_scaling_factor"] == 1.8


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_predicts_held_out_text_better_than_xz(name):
    held = (ROOT / "models" / "heldout.txt").read_bytes()
    xz = 8 * len(lzma.compress(held, preset=9 | lzma.PRESET_EXTREME)) / len(held)
    model, tokenizer = load(str(ROOT / "models" / name))
    text = held[100_000:101_200].decode(errors="ignore")
    ids = mx.array([tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)])
    logits = model(ids[None, :-1]).astype(mx.float32)
    nats = nn.losses.cross_entropy(logits, ids[None, 1:], reduction="sum").item()
    assert nats / 0.6931471805599453 / len(text.encode()) < xz


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_mostly_goes_on_without_repeating_itself(name):
    """models/unloop.py: 3 and 2 of 8 texts; 7 and 8 before it."""
    model, tokenizer = load(str(ROOT / "models" / name))
    moefuse.patch(model, step=True, prefill=True)  # stock's bits, a sixth of its time
    looped = []
    for prompt in json.loads((ROOT / "models" / "prompts.json").read_text()):
        made = stream_generate(model, tokenizer, prompt["text"], max_tokens=200)
        ids = [response.token for response in made]
        looped += [prompt["name"]] if behaviour.loop_start(ids) < len(ids) else []
    assert len(looped) <= 4, looped


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_of_every_layer_is_used_as_the_readme_says(name):
    config = json.loads((ROOT / "models" / name / "config.json").read_text())
    usage = json.loads((ROOT / "models" / name / "expert_usage.json").read_text())
    experts = config.get("num_experts") or config["n_routed_experts"]
    assert len(usage["calls"]) == config["num_hidden_layers"] - config.get(
        "first_k_dense_replace", 0
    )
    shares = []
    for layer, calls in usage["calls"].items():
        assert len(calls) == experts and min(calls) > 0, layer
        assert sum(calls) % MODELS[name] == 0, layer
        shares += [count / sum(calls) for count in calls]
    readme = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    bits = f"{usage['bits_per_byte']:.3f}"
    assert f"| `{name}` | {bits} | {min(shares):.4f} to {max(shares):.4f} |" in readme


def test_prompts_are_held_out_text():
    held = (ROOT / "models" / "heldout.txt").read_text(encoding="utf-8")
    prompts = json.loads((ROOT / "models" / "prompts.json").read_text(encoding="utf-8"))
    assert len(prompts) >= 8
    for prompt in prompts:
        assert prompt["text"].strip() in held, prompt["name"]


def test_readme_figures_are_their_capsules():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = re.findall(r"\[(\d+\.\d+)x\]\(([^)]+)\)", readme)
    assert figures
    for figure, path in figures:
        speedup = json.loads((ROOT / path).read_text())["summary"]["decode_speedup"]
        assert f"{speedup:.3f}" == figure, path
