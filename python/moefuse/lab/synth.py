"""Checkpoints with a real model's layer geometry and random weights, for timing.

Speed does not depend on the values, but a gate on tokens proves something only on a model that is
decided: activations in range, experts used alike, a best token that leads as in a trained model
and text that goes on. Codes are uniform; scales and the output rows see to the rest. The same
seed gives the same bytes.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
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
DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}

# What makes a model decided, measured beside the trained checkpoints (docs/LAB.md).
ROUTER_SPREAD = {"qwen3_moe": 1.5, "glm4_moe_lite": 1.0}  # deviation of the router's logits
ATTENTION_SPREAD = 1.5  # deviation of the attention scores: heads look somewhere
LOGIT_SPREAD = 3.4  # deviation of the output logits of tokens that nothing speaks for
# How much of the last hidden vector is the last token's embedding (a cosine). The less there is,
# the more the layers decide, and the more they enlarge the rounding errors of the layers before.
EMBEDDING_SHARE = 0.7
# Of 32 parts of an output row, each from another token's embedding: a token's successors.
SUCCESSORS = (6, 5, 4, 3, 3, 3, 2, 2, 2, 2)
# What a branch's last projection is multiplied by to add about 1 (rms) to the residual stream.
BRANCH = {
    "qwen3_moe": {"self_attn.o_proj": 1.4, "switch_mlp.down_proj": 6.0},
    "glm4_moe_lite": {
        "self_attn.o_proj": 1.4,
        "switch_mlp.down_proj": 3.3,
        "shared_experts.down_proj": 1.0,
        "mlp.down_proj": 1.7,
    },
}


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


def _rng(seed: int, name: str) -> np.random.Generator:
    """Each tensor has its own numbers, so order and sharding change nothing."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


class Maker:
    """Draws tensors by name. All by numpy on the host: the same bytes on every device."""

    def __init__(self, seed: int, config: dict, quantized: dict, known_tokens: int, dtype: str):
        self.seed, self.config, self.dtype = seed, config, DTYPES[dtype]
        self.quantized, self.known_tokens = quantized, known_tokens
        # Two branches a layer, independent of each other, make up what is not the embedding.
        self.branch = math.sqrt((1 / EMBEDDING_SHARE**2 - 1) / (2 * config["num_hidden_layers"]))

    def bits(self, base: str) -> int:
        return self.quantized.get(base, {}).get("bits", BITS)

    def gain(self, base: str) -> float:
        """Size of a projection's output (rms) when its input's is 1."""
        if base.endswith("mlp.gate"):
            return ROUTER_SPREAD[self.config["model_type"]]
        if base.endswith("q_b_proj"):  # GLM: no norm on a head's queries; scores over the latent
            c = self.config
            scored, scale = c["kv_lora_rank"], c["qk_nope_head_dim"]
            rope = c["qk_rope_head_dim"]
            return ATTENTION_SPREAD * math.sqrt((scale + rope) / (scored + rope))
        ends = BRANCH[self.config["model_type"]].items()
        return next((self.branch * size for end, size in ends if base.endswith(end)), 1.0)

    def _deviation(self, base: str, fan_in: int) -> float:
        if base.endswith("embed_tokens"):
            return 1.0
        if base == "lm_head":
            return LOGIT_SPREAD / math.sqrt(fan_in)
        return self.gain(base) / math.sqrt(fan_in)

    def _round(self, values: np.ndarray) -> np.ndarray:
        """float32 values that the checkpoint's dtype holds: to nearest, ties to even."""
        if self.dtype != mx.bfloat16:
            return values
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)

    def _scales(self, base: str, shape: tuple) -> np.ndarray:
        levels = math.sqrt((4 ** self.bits(base) - 1) / 12)  # deviation of a uniform code
        jitter = _rng(self.seed, base + ".scales").uniform(0.75, 1.25, shape)
        scales = jitter * (self._deviation(base, shape[-1] * GROUP) / levels)
        return scales.astype(np.float32)

    def _codes(self, name: str, shape: tuple) -> np.ndarray:
        """Uniform quantised codes, eight or four to a word: plain random bits."""
        count = (math.prod(shape) + 1) // 2
        words = _rng(self.seed, name).integers(0, 2**64 - 1, count, np.uint64, endpoint=True)
        return words.view(np.uint32)[: math.prod(shape)].reshape(shape)

    def _packed(self, base: str, part: str, shape: tuple) -> np.ndarray:
        """Codes, scales or biases; the biases centre the codes, so that the mean weight is 0."""
        if part == "weight":
            return self._codes(base + ".weight", shape)
        scales = self._round(self._scales(base, shape))
        return scales if part == "scales" else scales * (-(2 ** self.bits(base) - 1) / 2)

    def _output_rows(self, part: str, shape: tuple) -> np.ndarray:
        """lm_head: a known token's row is made of pieces of its predecessors' embeddings.

        Each token so has a few successors that it speaks for, the first the loudest, and what
        the layers add decides among them. Other rows are zero: they are never chosen.
        """
        known = self.known_tokens
        if part == "weight":
            source = self._codes("model.embed_tokens.weight", (known, shape[1]))
        else:
            ones = _rng(self.seed, "model.embed_tokens.scales").uniform(
                0.75, 1.25, (known, shape[1])
            )
            levels = math.sqrt((4**BITS - 1) / 12)
            size = self._deviation("lm_head", shape[1] * GROUP) / levels
            source = self._round((ones * size).astype(np.float32))
            source *= 1 if part == "scales" else -(2**BITS - 1) / 2
        rows = np.zeros(shape, source.dtype)
        pieces = np.repeat(np.arange(len(SUCCESSORS)), SUCCESSORS)
        pieces = pieces[np.arange(shape[1]) * len(pieces) // shape[1]]
        for piece in range(len(SUCCESSORS)):
            before = _rng(self.seed, f"successor {piece}").permutation(known)
            columns = pieces == piece
            rows[:known, columns] = source[before][:, columns]
        return rows

    def draw(self, name: str, shape: tuple, packed: bool) -> np.ndarray:
        """One tensor's codes (uint32) or values (float32); `packed`: its matrix is quantised."""
        base, _, part = name.rpartition(".")
        if part == "e_score_correction_bias":
            return np.float32(0.05) * _rng(self.seed, name).standard_normal(shape, np.float32)
        if packed:
            draw = self._output_rows if base == "lm_head" else partial(self._packed, base)
            return draw(part, shape)
        if len(shape) == 1:  # norm weights
            size = ATTENTION_SPREAD if base.endswith("q_norm") else 1.0
            return np.full(shape, size, np.float32)
        values = _rng(self.seed, name).standard_normal(shape, np.float32)
        return values * np.float32(self._deviation(base, shape[-1]))

    def cast(self, name: str, values: np.ndarray) -> mx.array:
        """The tensor as the file holds it."""
        exact = values.dtype == np.uint32 or name.endswith("e_score_correction_bias")
        return mx.array(values) if exact else mx.array(values).astype(self.dtype)


def _shard_of(name: str) -> str:
    """Everything of one decoder layer travels together; the rest is one more shard."""
    parts = name.split(".")
    return f"{int(parts[2]):05d}" if parts[:2] == ["model", "layers"] else "~"


def _ahead(work: Callable, items: Iterable, jobs: int) -> Iterator:
    """map(work, items) by `jobs` threads, with no more than that many results waiting."""
    items = iter(items)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = deque(pool.submit(work, item) for item in islice(items, jobs))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(items, 1))
            yield done


def _write_tensors(folder: Path, model, maker: Maker, tick: Callable[[int], None]) -> None:
    shapes = {name: like.shape for name, like in tree_flatten(model.parameters())}
    quantized = {n.rpartition(".")[0] for n in shapes if n.endswith(".scales")}
    shards = [sorted(group) for _, group in groupby(sorted(shapes, key=_shard_of), key=_shard_of)]

    def draw(members: list[str]) -> dict[str, np.ndarray]:
        return {n: maker.draw(n, shapes[n], n.rpartition(".")[0] in quantized) for n in members}

    weight_map, total = {}, 0
    for number, drawn in enumerate(_ahead(draw, shards, min(8, os.cpu_count() or 1)), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name, values in drawn.items():
            if values.shape != shapes[name]:
                raise LabError(f"[synth] {name}: expected {shapes[name]}, got {values.shape}")
            made[name] = maker.cast(name, values)
            mx.eval(made[name])
            total += made[name].nbytes
            weight_map[name] = file
        mx.save_safetensors(str(folder / file), made, metadata={"format": "mlx"})
        del made, drawn
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
    try:
        table = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        added = (token["id"] for token in table.get("added_tokens", []))
        return max([*table["model"]["vocab"].values(), *added]) + 1
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise LabError(
            f"[synth] tokenizer: expected a vocabulary in {source.name}/tokenizer.json, "
            f"got {error!r:.200}"
        ) from None


def write(
    like: str,
    layers: int | None,
    out: Path,
    *,
    tokenizer: Path,
    vocab: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    tick: Callable[[int], None] = lambda shards: None,
) -> dict:
    """Write a checkpoint folder (whole, or not at all) and return its config.

    layers, vocab: None keeps the real model's count. The vocabulary must hold the tokenizer's;
    the rest is padding that is never chosen. dtype: of scales, norms and activations.
    """
    if like not in LIKE:
        raise LabError(f"[synth] like: expected one of {sorted(LIKE)}, got {like!r}")
    config = dict(LIKE[like])
    if dtype not in DTYPES:
        raise LabError(f"[synth] dtype: expected one of {sorted(DTYPES)}, got {dtype!r}")
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
        config["torch_dtype"] = dtype
        real = {k: LIKE[like][k] for k in ("num_hidden_layers", "vocab_size")}
        config["moefuse_synth"] = {"like": like, "seed": seed, "real": real}
        with mx.stream(mx.cpu):
            _write_tensors(folder, model, Maker(seed, config, quantized, known, dtype), tick)
        files.write_atomic(folder / "config.json", files.dump_json(config))
        folder.rename(out)
    return config
