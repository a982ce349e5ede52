// Qwen3-30B-A3B and GLM-4.7-Flash by their shapes: one layer of each kind.
#pragma once

#include <string>
#include <utility>

#include "moefuse/model.h"

namespace true_shapes {

namespace mx = mlx::core;

// Arrays of the right size whose memory nobody touches.
struct Shapes {
  moefuse::Model model;

  mx::array unread(const mx::Shape& shape, mx::Dtype dtype) {
    const size_t bytes = mx::array(shape, dtype, nullptr, {}).nbytes();
    return mx::array(mx::allocator::malloc(bytes), shape, dtype);
  }
  void dense(const std::string& name, const mx::Shape& shape, mx::Dtype dtype = mx::bfloat16) {
    model.weights.emplace(name, unread(shape, dtype));
  }
  void quantized(const std::string& name, mx::Shape shape, int bits = 4) {
    const int cols = shape.back();
    shape.back() = cols * bits / 32;
    model.weights.emplace(name + ".weight", unread(shape, mx::uint32));
    shape.back() = cols / 64;
    dense(name + ".scales", shape);
    dense(name + ".biases", shape);
  }
  void mlp(const std::string& name, mx::Shape shape) {
    quantized(name + "gate_proj", shape);
    quantized(name + "up_proj", shape);
    std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
    quantized(name + "down_proj", shape);
  }
  void norms(const std::string& layer, std::initializer_list<std::pair<const char*, int>> others) {
    dense(layer + "input_layernorm.weight", {2048});
    dense(layer + "post_attention_layernorm.weight", {2048});
    for (const auto& [name, size] : others) dense(layer + name, {size});
  }
  void ends(int vocab) {
    quantized("model.embed_tokens", {vocab, 2048});
    quantized("lm_head", {vocab, 2048});
    dense("model.norm.weight", {2048});
  }
};

inline Shapes qwen() {
  Shapes s{{moefuse::parse_config(R"({"model_type": "qwen3_moe", "hidden_size": 2048,
    "num_hidden_layers": 1, "vocab_size": 151936, "max_position_embeddings": 40960,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "norm_topk_prob": true})"),
            {}}};
  const std::string layer = "model.layers.0.", a = layer + "self_attn.";
  s.ends(151936);
  s.norms(layer, {{"self_attn.q_norm.weight", 128}, {"self_attn.k_norm.weight", 128}});
  s.quantized(a + "q_proj", {4096, 2048});
  s.quantized(a + "k_proj", {512, 2048});
  s.quantized(a + "v_proj", {512, 2048});
  s.quantized(a + "o_proj", {2048, 4096});
  s.quantized(layer + "mlp.gate", {128, 2048}, 8);
  s.mlp(layer + "mlp.switch_mlp.", {128, 768, 2048});
  return s;
}

inline Shapes glm() {
  Shapes s{{moefuse::parse_config(R"({"model_type": "glm4_moe_lite", "hidden_size": 2048,
    "num_hidden_layers": 2, "vocab_size": 154880, "max_position_embeddings": 202752,
    "num_attention_heads": 20, "intermediate_size": 10240, "moe_intermediate_size": 1536,
    "n_routed_experts": 64, "num_experts_per_tok": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
    "routed_scaling_factor": 1.8})"),
            {}}};
  s.ends(154880);
  for (int i = 0; i < 2; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", a = layer + "self_attn.";
    s.norms(layer,
            {{"self_attn.q_a_layernorm.weight", 768}, {"self_attn.kv_a_layernorm.weight", 512}});
    s.quantized(a + "q_a_proj", {768, 2048});
    s.quantized(a + "q_b_proj", {20 * 256, 768});
    s.quantized(a + "kv_a_proj_with_mqa", {576, 2048});
    s.quantized(a + "embed_q", {20, 512, 192});
    s.quantized(a + "unembed_out", {20, 256, 512});
    s.quantized(a + "o_proj", {2048, 20 * 256});
  }
  s.mlp("model.layers.0.mlp.", {10240, 2048});
  const std::string mlp = "model.layers.1.mlp.";
  s.dense(mlp + "gate.weight", {64, 2048});
  s.dense(mlp + "gate.e_score_correction_bias", {64}, mx::float32);
  s.mlp(mlp + "switch_mlp.", {64, 1536, 2048});
  s.mlp(mlp + "shared_experts.", {1536, 2048});
  return s;
}

}  // namespace true_shapes
