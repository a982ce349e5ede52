// GLM-lite: multi-head latent attention, absorbed (queries go to the latent space, the cache holds
// latents); sigmoid router with a correction bias; a shared expert; the first layers are dense.
#include <cmath>

#include "decode/plan.h"

namespace moefuse {

namespace {

void attention(const WeightReader& w, const ModelConfig& c, int i, Plan& plan) {
  const std::string layer = "model.layers." + std::to_string(i), attn = layer + ".self_attn.";
  const int heads = c.num_attention_heads, latent = c.kv_lora_rank, rotary = c.qk_rope_head_dim;
  const int head_dim = c.qk_nope_head_dim + rotary;
  plan.stages.push_back(
      {"latent", i,
       LatentProjection{w.norm(layer + ".input_layernorm", c.hidden_size),
                        w.matrix(attn + "q_a_proj", c.q_lora_rank, c.hidden_size),
                        w.matrix(attn + "kv_a_proj_with_mqa", latent + rotary, c.hidden_size)}});
  plan.stages.push_back(
      {"query", i,
       LatentQuery{w.norm(attn + "q_a_layernorm", c.q_lora_rank),
                   w.norm(attn + "kv_a_layernorm", latent),
                   w.matrix(attn + "q_b_proj", heads * head_dim, c.q_lora_rank),
                   w.stack(attn + "embed_q", heads, latent, c.qk_nope_head_dim), heads,
                   c.qk_nope_head_dim, rotary, latent, Rope{rotary, c.rope_theta, true}}});
  const auto scale = static_cast<float>(std::pow(double(head_dim), -0.5));
  plan.stages.push_back({"attention", i, LatentAttention{heads, latent, rotary, scale}});
  plan.stages.push_back(
      {"values", i, LatentOutput{w.stack(attn + "unembed_out", heads, c.v_head_dim, latent)}});
  plan.stages.push_back(
      {"output", i,
       OutputProjection{w.matrix(attn + "o_proj", c.hidden_size, heads * c.v_head_dim)}});
}

void dense(const WeightReader& w, const ModelConfig& c, int i, Plan& plan) {
  const std::string layer = "model.layers." + std::to_string(i), mlp = layer + ".mlp.";
  const int width = c.intermediate_size;
  plan.stages.push_back({"gate_up", i,
                         DenseGateUp{w.norm(layer + ".post_attention_layernorm", c.hidden_size),
                                     w.matrix(mlp + "gate_proj", width, c.hidden_size),
                                     w.matrix(mlp + "up_proj", width, c.hidden_size)}});
  plan.stages.push_back({"down", i, DenseDown{w.matrix(mlp + "down_proj", c.hidden_size, width)}});
}

void experts(const WeightReader& w, const ModelConfig& c, int i, Plan& plan) {
  const std::string layer = "model.layers." + std::to_string(i), mlp = layer + ".mlp.";
  const int n = c.num_experts, width = c.moe_intermediate_size, hidden = c.hidden_size;
  plan.stages.push_back({"router", i,
                         Router{w.norm(layer + ".post_attention_layernorm", hidden),
                                {},
                                w.dense(mlp + "gate.weight", {n, hidden}),
                                w.floats(mlp + "gate.e_score_correction_bias", {n}),
                                n,
                                c.num_experts_per_tok,
                                {.scoring = Scoring::sigmoid,
                                 .norm_topk_prob = c.norm_topk_prob,
                                 .scaling_factor = c.routed_scaling_factor,
                                 .n_group = c.n_group,
                                 .topk_group = c.topk_group}}});
  const std::string routed = mlp + "switch_mlp.", shared = mlp + "shared_experts.";
  ExpertsGateUp gate_up{w.stack(routed + "gate_proj", n, width, hidden),
                        w.stack(routed + "up_proj", n, width, hidden),
                        {},
                        {}};
  ExpertsDown down{w.stack(routed + "down_proj", n, hidden, width), {}};
  if (c.n_shared_experts > 0) {
    const int shared_width = width * c.n_shared_experts;
    gate_up.shared_gate = w.matrix(shared + "gate_proj", shared_width, hidden);
    gate_up.shared_up = w.matrix(shared + "up_proj", shared_width, hidden);
    down.shared_down = w.matrix(shared + "down_proj", hidden, shared_width);
  }
  plan.stages.push_back({"experts_gate_up", i, gate_up});
  plan.stages.push_back({"experts_down", i, down});
}

}  // namespace

Plan glm4_moe_lite_plan(const Model& model) {
  const ModelConfig& c = model.config;
  const WeightReader w(model);
  Plan plan{c, w.dtype(), {1, c.kv_lora_rank, c.qk_rope_head_dim}, {}};
  const int vocab = c.vocab_size, hidden = c.hidden_size;
  plan.stages.push_back({"embed", -1, Embed{w.matrix("model.embed_tokens", vocab, hidden)}});
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    attention(w, c, i, plan);
    c.sparse[i] ? experts(w, c, i, plan) : dense(w, c, i, plan);
  }
  plan.stages.push_back(
      {"lm_head", -1, Head{w.norm("model.norm", hidden), w.matrix("lm_head", vocab, hidden)}});
  return plan;
}

}  // namespace moefuse
