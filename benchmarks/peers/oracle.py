"""Qwen3-MoE and GLM-4.7-Flash in float64: the logits that a checkpoint's weights really give.

Nothing is rounded below float64: weights are dequantised exactly, the attention sees its own keys
and values. Written from the models' definitions, independent of the engines it judges.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

Array = np.ndarray


class Weights:
    """A checkpoint's matrices by mlx-lm's names, in float64, one at a time."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, mx.array] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self.tensors |= mx.load(str(shard))

    def matrix(self, base: str, index: int | Array | None = None) -> Array:
        """The matrix [rows, cols]; index: of one expert or head, or the rows of a table."""
        parts = [self.tensors.get(f"{base}.{p}") for p in ("weight", "scales", "biases")]
        if parts[0] is None:
            parts[0] = self.tensors[base]
        if index is not None:
            at = index if isinstance(index, int) else mx.array(index)
            parts = [None if p is None else p[at] for p in parts]
        weight, scales, biases = parts
        if scales is not None:
            settings = self.config["quantization"].get(base, {})
            bits = settings.get("bits", 4) if isinstance(settings, dict) else 4
            # Exact in float32: at most 8 bits of code times 8 of scale, plus a bias near it.
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            weight = mx.dequantize(weight, scales, biases, 64, bits)
        return np.array(weight.astype(mx.float32)).astype(np.float64)


def norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x: Array, base: float, interleaved: bool) -> Array:
    """x [tokens, heads, dims], token t at position t."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    first, second = a * c - b * s, a * s + b * c
    if interleaved:
        return np.stack([first, second], -1).reshape(x.shape)
    return np.concatenate([first, second], -1)


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Causal; q [tokens, heads, dim], k and v [tokens, kv heads, dim]."""
    per_head = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, per_head, 1), np.repeat(v, per_head, 1)
    scores = np.einsum("thd,shd->hts", q, k) * scale
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    return np.einsum("hts,shd->thd", softmax(scores), v)


class Oracle:
    def __init__(self, folder: Path):
        self.w = Weights(folder)
        self.config = self.w.config
        self.eps = self.config["rms_norm_eps"]

    def normed(self, x: Array, name: str) -> Array:
        return norm(x, self.w.matrix(name), self.eps)

    def times(self, x: Array, name: str) -> Array:
        return x @ self.w.matrix(name).T

    def grouped_attention(self, x: Array, at: str) -> Array:
        c, base = self.config, self.config["rope_theta"]
        q, k, v = (
            self.times(x, f"{at}.{name}_proj").reshape(len(x), -1, c["head_dim"]) for name in "qkv"
        )
        q = rotate(self.normed(q, f"{at}.q_norm"), base, interleaved=False)
        k = rotate(self.normed(k, f"{at}.k_norm"), base, interleaved=False)
        y = attend(q, k, v, c["head_dim"] ** -0.5)
        return self.times(y.reshape(len(x), -1), f"{at}.o_proj")

    def latent_attention(self, x: Array, at: str) -> Array:
        c, heads, base = self.config, self.config["num_attention_heads"], self.config["rope_theta"]
        nope, latent = c["qk_nope_head_dim"], c["kv_lora_rank"]
        q = self.times(self.normed(self.times(x, f"{at}.q_a_proj"), f"{at}.q_a_layernorm"),
                       f"{at}.q_b_proj").reshape(len(x), heads, -1)  # fmt: skip
        kv = self.times(x, f"{at}.kv_a_proj_with_mqa")
        value = self.normed(kv[:, :latent], f"{at}.kv_a_layernorm")[:, None]
        key = np.concatenate([value, rotate(kv[:, None, latent:], base, interleaved=True)], -1)
        absorbed = [q[:, h, :nope] @ self.w.matrix(f"{at}.embed_q", h).T for h in range(heads)]
        query = [np.stack(absorbed, 1), rotate(q[..., nope:], base, interleaved=True)]
        y = attend(np.concatenate(query, -1), key, value, q.shape[-1] ** -0.5)
        y = [y[:, h] @ self.w.matrix(f"{at}.unembed_out", h).T for h in range(heads)]
        return self.times(np.stack(y, 1).reshape(len(x), -1), f"{at}.o_proj")

    def route(self, x: Array, at: str) -> tuple[Array, Array]:
        """Experts and weights, [tokens, k] each."""
        c, logits = self.config, self.times(x, f"{at}.gate")
        k = c["num_experts_per_tok"]
        if c["model_type"] == "qwen3_moe":
            scores = choice = softmax(logits)
        else:
            scores = 1 / (1 + np.exp(-logits))
            choice = scores + self.w.matrix(f"{at}.gate.e_score_correction_bias")
        chosen = np.argsort(-choice, -1)[:, :k]
        weights = np.take_along_axis(scores, chosen, -1)
        if c["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * c.get("routed_scaling_factor", 1.0)

    def mlp(self, x: Array, at: str, expert: int | None = None) -> Array:
        gate, up, down = (self.w.matrix(f"{at}.{n}_proj", expert) for n in ("gate", "up", "down"))
        g = x @ gate.T
        return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T

    def experts(self, x: Array, at: str) -> Array:
        chosen, weights = self.route(x, at)
        y = np.zeros_like(x)
        for expert in np.unique(chosen):
            token, place = np.nonzero(chosen == expert)
            share = weights[token, place][:, None]
            y[token] += share * self.mlp(x[token], f"{at}.switch_mlp", int(expert))
        if self.config.get("n_shared_experts"):
            y += self.mlp(x, f"{at}.shared_experts")
        return y

    def logits(self, tokens: list[int]) -> Array:
        """[tokens, vocabulary] after each of `tokens` in turn, from an empty cache."""
        glm = self.config["model_type"] == "glm4_moe_lite"
        x = self.w.matrix("model.embed_tokens", np.array(tokens))
        for i in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{i}"
            h = self.normed(x, f"{at}.input_layernorm")
            attention = self.latent_attention if glm else self.grouped_attention
            x = x + attention(h, f"{at}.self_attn")
            h = self.normed(x, f"{at}.post_attention_layernorm")
            dense = glm and i < self.config["first_k_dense_replace"]
            x = x + (self.mlp if dense else self.experts)(h, f"{at}.mlp")
        return self.times(self.normed(x, "model.norm"), "lm_head")
