// Qwen3-MoE: grouped attention with normed queries and keys; softmax router; some layers may be
// dense.
#include <cmath>

#include "decode/plan.h"

namespace moefuse {

namespace {

void attention(const WeightReader& w, const ModelConfig& c, int i, Plan& plan) {
  const std::string layer = "model.layers." + std::to_string(i), attn = layer + ".self_attn.";
  const int q = c.num_attention_heads * c.head_dim, kv = c.num_key_value_heads * c.head_dim;
  plan.stages.push_back({"qkv", i,
                         GroupedProjection{w.norm(layer + ".input_layernorm", c.hidden_size),
                                           w.matrix(attn + "q_proj", q, c.hidden_size),
                                           w.matrix(attn + "k_proj", kv, c.hidden_size),
                                           w.matrix(attn + "v_proj", kv, c.hidden_size)}});
  // mlx-lm computes the scale in Python's doubles and hands MLX a float.
  const auto scale = static_cast<float>(std::pow(double(c.head_dim), -0.5));
  plan.stages.push_back(
      {"attention", i,
       GroupedAttention{w.norm(attn + "q_norm", c.head_dim), w.norm(attn + "k_norm", c.head_dim),
                        c.num_attention_heads, c.num_key_value_heads, c.head_dim, scale,
                        Rope{c.head_dim, c.rope_theta, false}}});
  plan.stages.push_back(
      {"output", i, OutputProjection{w.matrix(attn + "o_proj", c.hidden_size, q)}});
}

void mlp(const WeightReader& w, const ModelConfig& c, int i, Plan& plan) {
  const std::string layer = "model.layers." + std::to_string(i), mlp = layer + ".mlp.";
  const Norm norm = w.norm(layer + ".post_attention_layernorm", c.hidden_size);
  if (!c.sparse[i]) {
    const int width = c.intermediate_size;
    plan.stages.push_back({"gate_up", i,
                           DenseGateUp{norm, w.matrix(mlp + "gate_proj", width, c.hidden_size),
                                       w.matrix(mlp + "up_proj", width, c.hidden_size)}});
    plan.stages.push_back(
        {"down", i, DenseDown{w.matrix(mlp + "down_proj", c.hidden_size, width)}});
    return;
  }
  const int n = c.num_experts, width = c.moe_intermediate_size;
  const std::string experts = mlp + "switch_mlp.";
  Router router{norm, {}, {}, {}, n, c.num_experts_per_tok, {.norm_topk_prob = c.norm_topk_prob}};
  if (w.has(mlp + "gate.scales"))
    router.quantized_gate = w.matrix(mlp + "gate", n, c.hidden_size);
  else
    router.dense_gate = w.dense(mlp + "gate.weight", {n, c.hidden_size});
  plan.stages.push_back({"router", i, router});
  plan.stages.push_back({"experts_gate_up", i,
                         ExpertsGateUp{w.stack(experts + "gate_proj", n, width, c.hidden_size),
                                       w.stack(experts + "up_proj", n, width, c.hidden_size),
                                       {},
                                       {}}});
  plan.stages.push_back({"experts_down", i,
                         ExpertsDown{w.stack(experts + "down_proj", n, c.hidden_size, width), {}}});
}

}  // namespace

Plan qwen3_moe_plan(const Model& model) {
  const ModelConfig& c = model.config;
  const WeightReader w(model);
  Plan plan{c, w.dtype(), {c.num_key_value_heads, c.head_dim, c.head_dim}, {}};
  const Matrix table = w.matrix("model.embed_tokens", c.vocab_size, c.hidden_size);
  plan.stages.push_back({"embed", -1, Embed{table}});
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    attention(w, c, i, plan);
    mlp(w, c, i, plan);
  }
  const Matrix head =
      c.tie_word_embeddings ? table : w.matrix("lm_head", c.vocab_size, c.hidden_size);
  plan.stages.push_back({"lm_head", -1, Head{w.norm("model.norm", c.hidden_size), head}});
  return plan;
}

}  // namespace moefuse
