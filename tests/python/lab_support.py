"""A tiny random checkpoint and stand-ins for the patch, so the lab is tested by itself."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import moefuse
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import quantize_model
from moefuse.lab import faults, grid
from moefuse.lab.faults import moe_layers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "vocab_size": 320,
    "eos_token_id": 256,
}
PROMPTS = [
    {"name": "list", "text": "A list holds items in order."},
    {"name": "dict", "text": "A dict maps keys to values; keys are hashable."},
    {"name": "loop", "text": "for i in range(10): print(i)"},
]


def write_tokenizer(folder: Path) -> None:
    """One token per byte and an end-of-text token: 257 in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, "<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def write_model(folder: Path, seed: int = 3) -> Path:
    """A quantised bfloat16 Qwen3-MoE whose routing and logits are spread as a real one's."""
    folder.mkdir(parents=True)
    mx.random.seed(seed)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(CONFIG))
    grown = {"embed_tokens": 3.0, "lm_head": 6.0, "mlp.gate": 4.0, "down_proj": 3.0}
    for name, module in model.named_modules():
        for part, factor in grown.items():
            if name.endswith(part):
                module.weight = module.weight * factor
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    model, config = quantize_model(model, dict(CONFIG), 64, 4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    (folder.parent / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


@dataclass
class Report:
    variants: tuple[str, ...] = ()
    accumulate: str = "exact"
    patterns: list[str] = field(default_factory=list)
    modules_patched: int = 0
    calls: Counter = field(default_factory=Counter)
    fallbacks: dict = field(default_factory=dict)


class Counted(nn.Module):
    """A MoE block that computes what stock computes (plus `bias`) and says that it ran."""

    def __init__(self, block, report: Report, bias: float):
        super().__init__()
        self.block, self.report, self.bias = block, report, bias

    def __call__(self, x):
        for part in self.report.variants:
            name = part if part in ("concat_gate_up", "step") else f"moe_{part}"
            self.report.calls[name] += 1
        y = self.block(x)
        return y if self.bias == 0.0 else y + self.bias


class FakeEngine:
    """Stands in for the moefuse package. `runs`: whether a patch takes effect at all."""

    __version__ = "0.0-test"

    def __init__(self, runs: bool = True, bias: float = 0.0):
        self.runs, self.bias, self.undo, self.patches = runs, bias, [], 0

    def capabilities(self) -> dict:
        return {**moefuse.capabilities(), "isa": "none", "compiler": "/usr/bin/c++"}

    def patch(self, model, variants=None, *, accumulate=None, step=False) -> Report:
        assert not self.undo, "patched twice"
        self.patches += 1
        report = Report(tuple(variants), accumulate or "exact", ["moe_block"])
        if self.runs:
            for layer in moe_layers(model):
                block = layer.mlp
                layer.mlp = Counted(block, report, self.bias)
                self.undo.append((layer, block))
            report.modules_patched = len(self.undo)
        return report

    def unpatch(self, model) -> None:
        for layer, block in self.undo:
            layer.mlp = block
        self.undo = []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Folder of the tiny model; its parent stands for the repository."""
    return write_model(tmp_path_factory.mktemp("repo") / "models" / "tiny")


@pytest.fixture
def one_fault(monkeypatch):
    """Plant a single fault in the control: the others have their own tests, and take time."""
    monkeypatch.setattr(faults, "FAULTS", {"k-minus-1": faults.FAULTS["k-minus-1"]})


def one_row_fits(monkeypatch):
    """Makes a machine of this one that has no memory for more rows."""
    plain = grid._decode

    def decode(model, cache, first, count):
        if len(first) > 1:
            raise RuntimeError("out of memory")
        return plain(model, cache, first, count)

    monkeypatch.setattr(grid, "_decode", decode)
