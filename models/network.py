"""The two architectures in torch, for training only; mlx-lm's modules are what runs the result.

Every expert runs on every token and the router's weights (0 for those not chosen) multiply the
activations: at an expert width of 64 two large matrix products beat any gather.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 40,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GLM4_MOE_LITE = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 48,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CONFIGS = {"qwen3-moe-tiny": QWEN3_MOE, "glm4-moe-lite-tiny": GLM4_MOE_LITE}


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Past:
    """One layer's keys and values of up to `length` positions, for text made a token at a time."""

    def __init__(self, length: int, position: torch.Tensor):
        self.length, self.position, self.kept = length, position, None

    def append(self, *new: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values [batch, heads, 1, dims] at `position`; returns all of them."""
        if self.kept is None:
            self.kept = [t.new_zeros(*t.shape[:2], self.length, t.shape[-1]) for t in new]
        for kept, t in zip(self.kept, new, strict=True):
            kept.index_copy_(2, self.position[None], t)
        return self.kept

    def mask(self) -> torch.Tensor:
        return torch.arange(self.length, device=self.position.device)[None] <= self.position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: Past | None) -> torch.Tensor:
    """Causal attention, [batch, heads, length, dims] to [batch, length, heads * dims]."""
    if past is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        y = F.scaled_dot_product_attention(q, *past.append(k, v), attn_mask=past.mask())
    return y.transpose(1, 2).flatten(-2)


def rotate(x: torch.Tensor, theta: float, interleaved: bool, past: Past | None) -> torch.Tensor:
    """Rotary embedding of [batch, heads, length, dims], positions from 0 or at the past's."""
    length, dims = x.shape[-2:]
    with torch.autocast(x.device.type, enabled=False):
        freq = theta ** (-torch.arange(0, dims, 2, device=x.device).float() / dims)
        first = 0 if past is None else past.position
        angle = (first + torch.arange(length, device=x.device)).float()[:, None] * freq
        cos, sin = angle.cos(), angle.sin()
        x = x.float()
        if interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class QwenAttention(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.c, d, h = c, c["head_dim"], c["hidden_size"]
        self.q_proj = Linear(h, c["num_attention_heads"] * d)
        self.k_proj = Linear(h, c["num_key_value_heads"] * d)
        self.v_proj = Linear(h, c["num_key_value_heads"] * d)
        self.o_proj = Linear(c["num_attention_heads"] * d, h)
        self.q_norm = RMSNorm(d, c["rms_norm_eps"])
        self.k_norm = RMSNorm(d, c["rms_norm_eps"])

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        d, theta = self.c["head_dim"], self.c["rope_theta"]
        q, k, v = (p(x).unflatten(-1, (-1, d)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q).transpose(1, 2), theta, False, past).to(v.dtype)
        k = rotate(self.k_norm(k).transpose(1, 2), theta, False, past).to(v.dtype)
        v = v.transpose(1, 2)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return self.o_proj(attend(q, k, v, past))


class LatentAttention(nn.Module):
    """MLA in its expanded form; `embed_q` and `unembed_out` are what mlx-lm stores."""

    def __init__(self, c: dict):
        super().__init__()
        self.c, h, heads = c, c["hidden_size"], c["num_attention_heads"]
        nope, pe, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.q_a_proj = Linear(h, c["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"], c["rms_norm_eps"])
        self.q_b_proj = Linear(c["q_lora_rank"], heads * (nope + pe))
        self.kv_a_proj_with_mqa = Linear(h, c["kv_lora_rank"] + pe)
        self.kv_a_layernorm = RMSNorm(c["kv_lora_rank"], c["rms_norm_eps"])
        std = c["kv_lora_rank"] ** -0.5
        self.embed_q = nn.Parameter(torch.randn(heads, c["kv_lora_rank"], nope) * std)
        self.unembed_out = nn.Parameter(torch.randn(heads, v, c["kv_lora_rank"]) * std)
        self.o_proj = Linear(heads * v, h)

    def forward(self, x: torch.Tensor, past: Past | None = None) -> torch.Tensor:
        c = self.c
        nope, pe, theta = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["rope_theta"]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (c["num_attention_heads"], nope + pe)).transpose(1, 2)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([c["kv_lora_rank"], pe], -1)
        latent = self.kv_a_layernorm(latent)[:, None]
        k = latent @ self.embed_q.to(latent.dtype)
        v = latent @ self.unembed_out.to(latent.dtype).transpose(-1, -2)
        q_pe = rotate(q[..., nope:], theta, True, past).to(v.dtype)
        k_pe = rotate(k_pe[:, None], theta, True, past).to(v.dtype).expand(-1, q.shape[1], -1, -1)
        q = torch.cat((q[..., :nope].to(v.dtype), q_pe), -1)
        k = torch.cat((k.to(v.dtype), k_pe), -1)
        return self.o_proj(attend(q, k, v, past))


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Returns its output, the aux loss and the share of tokens each expert got ([experts])."""

    def __init__(self, c: dict):
        super().__init__()
        self.glm = c["model_type"] == "glm4_moe_lite"
        self.experts = c["n_routed_experts"] if self.glm else c["num_experts"]
        self.k, h, f = c["num_experts_per_tok"], c["hidden_size"], c["moe_intermediate_size"]
        self.scaling = c.get("routed_scaling_factor", 1.0)
        self.gate = Linear(h, self.experts)
        self.gate_proj = nn.Parameter(torch.randn(self.experts, f, h) * h**-0.5)
        self.up_proj = nn.Parameter(torch.randn(self.experts, f, h) * h**-0.5)
        self.down_proj = nn.Parameter(torch.randn(self.experts, h, f) * f**-0.5)
        if self.glm:
            self.register_buffer("correction_bias", torch.zeros(self.experts))
            self.shared_experts = MLP(h, f * c["n_shared_experts"])

    def route(self, x: torch.Tensor):
        """Router weights [tokens, experts] (0 where not chosen), aux loss, shares."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.weight)
            scores = logits.sigmoid() if self.glm else logits.softmax(-1)
            choice = scores + self.correction_bias if self.glm else scores
            chosen = torch.zeros_like(scores).scatter(-1, choice.topk(self.k, -1).indices, 1.0)
            weights = scores * chosen
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling
            share = chosen.mean(0) / self.k
            density = (scores / scores.sum(-1, keepdim=True)).mean(0)
            return weights, self.experts * (share * density).sum(), share.detach()

    def forward(self, x: torch.Tensor):
        flat = x.flatten(0, -2)
        weights, aux, share = self.route(flat)
        gate = F.linear(flat, self.gate_proj.flatten(0, 1))
        up = F.linear(flat, self.up_proj.flatten(0, 1))
        act = (F.silu(gate) * up).unflatten(-1, (self.experts, -1))
        act = (act * weights[..., None].to(act.dtype)).flatten(-2)
        y = F.linear(act, self.down_proj.transpose(0, 1).flatten(1)).view_as(x)
        return (y + self.shared_experts(x) if self.glm else y), aux, share


class Layer(nn.Module):
    def __init__(self, c: dict, index: int, dropout: float):
        super().__init__()
        glm = c["model_type"] == "glm4_moe_lite"
        self.dropout = dropout
        self.self_attn = LatentAttention(c) if glm else QwenAttention(c)
        self.sparse = index >= c.get("first_k_dense_replace", 0)
        self.mlp = MoE(c) if self.sparse else MLP(c["hidden_size"], c["intermediate_size"])
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x: torch.Tensor, past: Past | None = None):
        y = self.self_attn(self.input_layernorm(x), past)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.post_attention_layernorm(x)
        y, aux, share = self.mlp(y) if self.sparse else (self.mlp(y), None, None)
        return x + F.dropout(y, self.dropout, self.training), aux, share


class Network(nn.Module):
    """Token ids [batch, length] -> (logits [batch, length, vocab], aux loss, shares)."""

    def __init__(self, config: dict, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.embed_tokens = Linear(config["hidden_size"], config["vocab_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        layers = range(config["num_hidden_layers"])
        self.layers = nn.ModuleList(Layer(config, i, dropout) for i in layers)
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = Linear(config["hidden_size"], config["vocab_size"])
        for layer in self.layers:  # residual branches start small
            with torch.no_grad():
                for name, p in layer.named_parameters():
                    if "o_proj" in name or "down_proj" in name:
                        p.mul_((2 * len(self.layers)) ** -0.5)

    def forward(self, ids: torch.Tensor, pasts: list[Past] | None = None):
        x = F.embedding(ids, self.embed_tokens.weight)
        aux, shares = 0.0, []
        for i, layer in enumerate(self.layers):
            x, layer_aux, share = layer(x, pasts[i] if pasts else None)
            if share is not None:
                aux, shares = aux + layer_aux, [*shares, share]
        return self.lm_head(self.norm(x)), aux / len(shares), torch.stack(shares)

    def matrices(self) -> dict[int, list[nn.Parameter]]:
        """Bits -> the parameters that mlx_lm.convert stores in that many bits."""
        found: dict[int, list[nn.Parameter]] = {4: [], 8: []}
        for name, p in self.named_parameters():
            if name.endswith("mlp.gate.weight"):
                if self.config["model_type"] == "qwen3_moe":
                    found[8].append(p)
            elif p.ndim > 1:
                found[4].append(p)
        return found

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """bfloat16 tensors under Hugging Face's names, one matrix per expert."""
        tensors = {}
        for name, p in self.state_dict().items():
            name = name if name.startswith("lm_head") else f"model.{name}"
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("gate_proj", "up_proj", "down_proj"):
                base = name.removesuffix(leaf)
                for e, w in enumerate(p):
                    tensors[f"{base}experts.{e}.{leaf}.weight"] = w
            elif leaf == "unembed_out":
                continue
            elif leaf == "embed_q":
                attention = self.get_submodule(name.removeprefix("model.").rsplit(".", 1)[0])
                both = torch.cat((p.transpose(1, 2), attention.unembed_out), 1)
                tensors[name.replace("embed_q", "kv_b_proj.weight")] = both.flatten(0, 1)
            elif leaf == "correction_bias":
                tensors[name.replace(leaf, "gate.e_score_correction_bias")] = p
            else:
                tensors[name] = p
        keep = "e_score_correction_bias"  # stays fp32, as in the published checkpoints
        return {
            n: t.detach().to(torch.float32 if keep in n else torch.bfloat16).contiguous().cpu()
            for n, t in tensors.items()
        }

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes a checkpoint of mlx-lm's layout, dequantised."""
        for name, p in self.state_dict().items():
            full = name if name.startswith("lm_head") else f"model.{name}"
            base, leaf = full.rsplit(".", 1)
            if leaf in ("gate_proj", "up_proj", "down_proj"):
                full = f"{base}.switch_mlp.{leaf}.weight"
            elif leaf in ("embed_q", "unembed_out"):
                full = f"{full}.weight"
            elif leaf == "correction_bias":
                full = f"{base}.gate.e_score_correction_bias"
            p.copy_(tensors[full])
