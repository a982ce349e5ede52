"""One model in both formats, bit for bit the same weights: moefuse's and its peers' side of a
comparison of speed and of error.

    pip install gguf
    python benchmarks/peers/write_gguf.py SYNTH_MODEL OUT

SYNTH_MODEL is a folder that `moefuse synth` wrote. OUT becomes an mlx-lm checkpoint with those
codes and scales and the biases of Q4_0, -8 * scale; OUT/model.gguf holds the same numbers as Q4_0
(32 weights in 18 bytes: the same bytes a weight as MLX's 4-bit groups of 64, 36 bytes). The router,
which MLX keeps at 8 bits or in bfloat16, is fp32 there, as the peers' converters write it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

BLOCK = 32  # weights of a Q4_0 block: one fp16 scale, then 16 bytes
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def gguf_name(base: str) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", base)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}" if layer else NAMES[base]


def numpy_of(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def q4_0(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MLX's codes (eight to a word, ascending) and scales of groups of 64 as Q4_0's blocks."""
    half = scales.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scales):
        raise SystemExit("a scale has no float16 of the same value")
    packed = words.view(np.uint8).reshape(-1, BLOCK // 2)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1, BLOCK)
    blocks = np.empty((len(codes), 2 + BLOCK // 2), np.uint8)
    blocks[:, :2] = np.repeat(half.reshape(-1, 1), 2, 0).view(np.uint8).reshape(-1, 2)
    blocks[:, 2:] = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    return blocks.reshape(*words.shape[:-1], -1)


def twins(folder: Path, out: Path) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Writes each shard with Q4_0's biases; yields (name in the GGUF, data, is Q4_0)."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = mx.load(str(shard))
        for name in [n for n in tensors if n.endswith(".scales")]:
            base = name.removesuffix(".scales")
            words, scales = tensors[base + ".weight"], tensors[name]
            if words.shape[-1] == scales.shape[-1] * 8:
                tensors[base + ".biases"] = -8 * scales
                yield gguf_name(base) + ".weight", q4_0(np.array(words), numpy_of(scales)), True
            else:  # the router, at 8 bits
                biases = tensors[base + ".biases"].astype(mx.float32)
                weight = mx.dequantize(words, scales.astype(mx.float32), biases, 64, 8)
                yield gguf_name(base) + ".weight", np.array(weight), False
        for name, value in tensors.items():
            base, _, part = name.rpartition(".")
            if part == "weight" and base + ".scales" not in tensors:
                yield gguf_name(base) + ".weight", numpy_of(value), False
            elif part == "e_score_correction_bias":
                yield (
                    gguf_name(base).replace("ffn_gate_inp", "exp_probs_b.bias"),
                    np.array(value.astype(mx.float32)),
                    False,
                )
        mx.save_safetensors(str(out / shard.name), tensors, metadata={"format": "mlx"})
        del tensors
        mx.clear_cache()


def add_header(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    (add_qwen if config["model_type"] == "qwen3_moe" else add_glm)(writer, config)
    vocab = config["vocab_size"]
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocab))])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3, *[1] * (vocab - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def add_qwen(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_expert_count(config["num_experts"])


def add_glm(writer: gguf.GGUFWriter, config: dict) -> None:
    """As llama.cpp's converter writes GLM-4.7-Flash: absorbed MLA is one key head."""
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    architectures = {"qwen3_moe": "qwen3moe", "glm4_moe_lite": "deepseek2"}
    if config["model_type"] not in architectures:
        parser.error(f"model_type: expected qwen3_moe or glm4_moe_lite, got {config['model_type']}")
    arguments.out.mkdir(parents=True)
    for file in arguments.model.glob("*.json"):
        shutil.copy(file, arguments.out)
    writer = gguf.GGUFWriter(
        arguments.out / "model.gguf", architectures[config["model_type"]], use_temp_file=True
    )
    add_header(writer, config)
    for name, data, is_q4_0 in twins(arguments.model, arguments.out):
        kind = gguf.GGMLQuantizationType.Q4_0 if is_q4_0 else None
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
