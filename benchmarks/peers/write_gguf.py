"""A GGUF of Qwen3-MoE geometry in Q4_0 with random weights: the peers' side of the comparison.

    pip install gguf
    python benchmarks/peers/write_gguf.py SYNTH_MODEL OUT.gguf

SYNTH_MODEL is a folder that `moefuse synth` wrote; its config.json gives the geometry. Q4_0 (32
weights in 18 bytes) moves the same bytes a weight as MLX's 4-bit groups of 64 (36 bytes). The
router is fp32, as the peers' converters write it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np

BLOCK, BLOCK_BYTES = 32, 18


def q4_0(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks: one fp16 scale near 0.02 / sqrt(12), then 32 nibbles."""
    blocks = int(np.prod(shape)) // BLOCK
    data = rng.integers(0, 256, (blocks, BLOCK_BYTES), dtype=np.uint8)
    scales = rng.uniform(0.003, 0.006, blocks).astype(np.float16)
    data[:, :2] = scales.view(np.uint8).reshape(blocks, 2)
    return data.reshape(*shape[:-1], shape[-1] // BLOCK * BLOCK_BYTES)


def add_header(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    vocab = config["vocab_size"]
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocab))])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3, *[1] * (vocab - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def add_tensors(writer: gguf.GGUFWriter, config: dict, rng: np.random.Generator) -> None:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    experts, width = config["num_experts"], config["moe_intermediate_size"]

    def quantized(name: str, *shape: int) -> None:
        data = q4_0(rng, shape)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    quantized("token_embd", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"blk.{i}."
        norm(layer + "attn_norm", hidden)
        quantized(layer + "attn_q", queries, hidden)
        quantized(layer + "attn_k", keys, hidden)
        quantized(layer + "attn_v", keys, hidden)
        quantized(layer + "attn_output", hidden, queries)
        norm(layer + "attn_q_norm", head)
        norm(layer + "attn_k_norm", head)
        norm(layer + "ffn_norm", hidden)
        gate = rng.normal(0, 0.02, (experts, hidden)).astype(np.float32)
        writer.add_tensor(layer + "ffn_gate_inp.weight", gate)
        quantized(layer + "ffn_gate_exps", experts, width, hidden)
        quantized(layer + "ffn_up_exps", experts, width, hidden)
        quantized(layer + "ffn_down_exps", experts, hidden, width)
    norm("output_norm", hidden)
    quantized("output", config["vocab_size"], hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    if config["model_type"] != "qwen3_moe":
        parser.error(f"model_type: expected qwen3_moe, got {config['model_type']}")
    writer = gguf.GGUFWriter(arguments.out, "qwen3moe")
    add_header(writer, config)
    add_tensors(writer, config, np.random.default_rng(0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
