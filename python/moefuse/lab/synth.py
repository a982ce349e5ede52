"""Checkpoints with a real model's layer geometry and random weights, for timing.

Speed does not depend on the values, but routing and margins have to look alive: quantised codes
are uniform and scales are chosen so that every projection keeps its input's size, router logits
spread by about two and output logits by about three. The same seed gives the same bytes.
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import LabError, files

GROUP, BITS = 64, 4
LIKE = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
        "vocab_size": 151_936,
    },
    "glm-4.7-flash": {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 47,
        "intermediate_size": 10_240,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 202_752,
        "vocab_size": 154_880,
    },
}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
ROUTER_SPREAD, LOGIT_SPREAD = 2.0, 3.0


def _module(config: dict):
    """The mlx-lm module with quantised layers, never evaluated: its shapes are what we want."""
    arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = arch.Model(arch.ModelArgs.from_dict(config))
    predicate = getattr(model, "quant_predicate", lambda path, module: True)
    layers: dict = {"group_size": GROUP, "bits": BITS, "mode": "affine"}

    def choose(path, module):
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP:
            return False
        found = predicate(path, module)
        if isinstance(found, dict):
            layers[path] = found
        return found

    nn.quantize(model, GROUP, BITS, class_predicate=choose)
    return model, layers


def _deviation(name: str, fan_in: int, layers: int) -> float:
    """Standard deviation of the weights of one matrix."""
    if name.endswith("mlp.gate"):
        return ROUTER_SPREAD / math.sqrt(fan_in)
    if name.startswith("lm_head"):
        return LOGIT_SPREAD / math.sqrt(fan_in)
    if name.endswith("embed_tokens"):
        return 1.0
    residual = name.endswith(("o_proj", "down_proj"))  # these add to the residual stream
    return (1 / math.sqrt(2 * layers) if residual else 1.0) / math.sqrt(fan_in)


class Maker:
    """Draws tensors by name: each has its own key, so order and sharding change nothing."""

    def __init__(self, seed: int, config: dict, quantized: dict, known_tokens: int):
        self.seed, self.layers = seed, config["num_hidden_layers"]
        self.quantized, self.known_tokens = quantized, known_tokens

    def key(self, name: str) -> mx.array:
        return mx.random.key((self.seed << 32) ^ zlib.crc32(name.encode()))

    def bits(self, base: str) -> int:
        return self.quantized.get(base, {}).get("bits", BITS)

    def _scales(self, base: str, shape: tuple) -> mx.array:
        bits = self.bits(base)
        levels = math.sqrt((4**bits - 1) / 12)  # deviation of a uniform code
        size = _deviation(base, shape[-1] * GROUP, self.layers) / levels
        jitter = mx.random.uniform(0.75, 1.25, shape, key=self.key(base + ".scales"))
        scales = (size * jitter).astype(mx.bfloat16)
        if base == "lm_head":  # tokens the tokenizer does not know get logit 0, never the best
            known = mx.arange(shape[0])[:, None] < self.known_tokens
            scales = mx.where(known, scales, mx.zeros_like(scales))
        return scales

    def _codes(self, name: str, shape: tuple) -> mx.array:
        """Uniform quantised codes, eight or four to a word: plain random bits."""
        source = np.random.PCG64([self.seed, zlib.crc32(name.encode())])
        words = source.random_raw((math.prod(shape) + 1) // 2).view(np.uint32)
        return mx.array(words[: math.prod(shape)]).reshape(shape)

    def make(self, name: str, like: mx.array, packed: bool) -> mx.array:
        """One tensor of `like`'s shape; `packed`: its matrix is quantised."""
        base, _, part = name.rpartition(".")
        key = self.key(name)
        if part == "e_score_correction_bias":
            return 0.05 * mx.random.normal(like.shape, key=key)
        if packed and part == "weight":
            return self._codes(name, like.shape)
        if packed and part == "scales":
            return self._scales(base, like.shape)
        if packed and part == "biases":  # centres the codes: their mean weight is zero
            centre = -(2 ** self.bits(base) - 1) / 2
            return (centre * self._scales(base, like.shape).astype(mx.float32)).astype(mx.bfloat16)
        if like.ndim == 1:  # norm weights
            return mx.ones(like.shape, mx.bfloat16)
        size = _deviation(base, like.shape[-1], self.layers)
        return (size * mx.random.normal(like.shape, key=key)).astype(mx.bfloat16)


def _shard_of(name: str) -> str:
    """Everything of one decoder layer travels together; the rest is one more shard."""
    parts = name.split(".")
    return f"{int(parts[2]):05d}" if parts[:2] == ["model", "layers"] else "~"


def _write_tensors(folder: Path, model, maker: Maker, tick: Callable[[int], None]) -> None:
    names = dict(tree_flatten(model.parameters()))
    quantized = {n.rpartition(".")[0] for n in names if n.endswith(".scales")}
    shards = [
        (key, list(group)) for key, group in groupby(sorted(names, key=_shard_of), key=_shard_of)
    ]
    weight_map, total = {}, 0
    for number, (_, members) in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name in sorted(members):
            packed = name.rpartition(".")[0] in quantized
            made[name] = maker.make(name, names[name], packed)
            if made[name].shape != names[name].shape:
                raise LabError(f"[synth] {name}: expected {names[name].shape}, got another shape")
            mx.eval(made[name])
            total += made[name].nbytes
            weight_map[name] = file
        mx.save_safetensors(str(folder / file), made, metadata={"format": "mlx"})
        del made
        mx.clear_cache()
        tick(1)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files.write_atomic(folder / "model.safetensors.index.json", files.dump_json(index))


def _copy_tokenizer(source: Path, folder: Path) -> int:
    """Copy the tokenizer's files; returns how many tokens it knows."""
    if not (source / "tokenizer.json").is_file():
        raise LabError(f"[synth] tokenizer: expected {source.name}/tokenizer.json, got none")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    table = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*table["model"]["vocab"].values(), *(t["id"] for t in table.get("added_tokens", []))]
    return max(ids) + 1


def write(
    like: str,
    layers: int | None,
    out: Path,
    *,
    tokenizer: Path,
    vocab: int | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda shards: None,
) -> dict:
    """Write a checkpoint folder (whole, or not at all) and return its config.

    layers, vocab: None keeps the real model's count. The vocabulary must hold the tokenizer's;
    the rest is padding that is never chosen.
    """
    if like not in LIKE:
        raise LabError(f"[synth] like: expected one of {sorted(LIKE)}, got {like!r}")
    config = dict(LIKE[like])
    depth = config["num_hidden_layers"] if layers is None else layers
    first = config.get("first_k_dense_replace", 0) + 1
    if depth < first:
        raise LabError(f"[synth] layers: expected at least {first} for {like}, got {layers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabError(f"[synth] {out}: expected a new or empty folder, got one in use")
    config["num_hidden_layers"] = depth
    config["vocab_size"] = vocab or config["vocab_size"]
    files.require_writable(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        folder = Path(work) / "model"
        folder.mkdir()
        known = _copy_tokenizer(tokenizer, folder)
        if config["vocab_size"] < known:
            raise LabError(f"[synth] vocab: expected at least {known}, got {vocab}")
        model, quantized = _module(config)
        config["quantization"] = config["quantization_config"] = quantized
        real = {k: LIKE[like][k] for k in ("num_hidden_layers", "vocab_size")}
        config["moefuse_synth"] = {"like": like, "seed": seed, "real": real}
        _write_tensors(folder, model, Maker(seed, config, quantized, known), tick)
        files.write_atomic(folder / "config.json", files.dump_json(config))
        folder.rename(out)
    return config
