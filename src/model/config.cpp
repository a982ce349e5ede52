#include <limits>

#include "model/json.h"
#include "moefuse/model.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

using nlohmann::json;

// Typed reading of one config.json; every complaint names the field.
class Fields {
 public:
  explicit Fields(const json& values) : values_(values) {}

  bool has(const char* name) const { return values_.contains(name) && !values_[name].is_null(); }

  int integer(const char* name, int low, int high) const {
    const json& v = get(name);
    const std::string range =
        "an integer from " + std::to_string(low) + " to " + std::to_string(high);
    if (!v.is_number_integer() || v < low || v > high) fail("config", name, range, excerpt(v));
    return v.get<int>();
  }
  int integer(const char* name, int low, int high, int otherwise) const {
    return has(name) ? integer(name, low, high) : otherwise;
  }
  float positive(const char* name) const {
    const json& v = get(name);
    if (!v.is_number() || v > std::numeric_limits<float>::max() || !(v.get<float>() > 0))
      fail("config", name, "a positive number", excerpt(v));
    return v.get<float>();
  }
  bool boolean(const char* name, bool otherwise) const {
    if (!has(name)) return otherwise;
    const json& v = get(name);
    if (!v.is_boolean()) fail("config", name, "true or false", excerpt(v));
    return v.get<bool>();
  }
  std::string text(const char* name) const {
    const json& v = get(name);
    if (!v.is_string()) fail("config", name, "a string", excerpt(v));
    return v.get<std::string>();
  }
  // A field that would change the computation in a way that no stage knows.
  void must_be_absent(const char* name) const {
    if (has(name) && values_[name] != false) fail("config", name, "none", excerpt(values_[name]));
  }
  const json& get(const char* name) const {
    if (!has(name)) fail("config", name, "a value", "none");
    return values_[name];
  }

 private:
  const json& values_;
};

constexpr int kMost = 1 << 24;  // no dimension of a language model is near it

void common(const Fields& f, ModelConfig& c) {
  c.hidden_size = f.integer("hidden_size", 1, kMost);
  c.num_hidden_layers = f.integer("num_hidden_layers", 1, 1024);
  c.vocab_size = f.integer("vocab_size", 1, kMost);
  c.max_position_embeddings = f.integer("max_position_embeddings", 1, kMost);
  c.num_attention_heads = f.integer("num_attention_heads", 1, 4096);
  c.intermediate_size = f.integer("intermediate_size", 1, kMost);
  c.moe_intermediate_size = f.integer("moe_intermediate_size", 1, kMost);
  c.rms_norm_eps = f.positive("rms_norm_eps");
  c.rope_theta = f.positive("rope_theta");
  c.norm_topk_prob = f.boolean("norm_topk_prob", c.model_type != "qwen3_moe");
  c.tie_word_embeddings = f.boolean("tie_word_embeddings", false);
}

void qwen3_moe(const Fields& f, ModelConfig& c) {
  c.num_key_value_heads = f.integer("num_key_value_heads", 1, c.num_attention_heads);
  c.head_dim = f.integer("head_dim", 2, 4096);
  c.num_experts = f.integer("num_experts", 0, 1 << 16);
  c.num_experts_per_tok = f.integer("num_experts_per_tok", 1, 1 << 16);
  if (c.num_attention_heads % c.num_key_value_heads)
    fail("config", "num_key_value_heads",
         "a divisor of num_attention_heads " + std::to_string(c.num_attention_heads),
         std::to_string(c.num_key_value_heads));
  const int step = f.integer("decoder_sparse_step", 1, kMost);
  c.sparse.resize(c.num_hidden_layers);
  for (int i = 0; i < c.num_hidden_layers; ++i)
    c.sparse[i] = c.num_experts > 0 && (i + 1) % step == 0;
  if (!f.has("mlp_only_layers")) return;
  const json& layers = f.get("mlp_only_layers");
  if (!layers.is_array()) fail("config", "mlp_only_layers", "an array", excerpt(layers));
  for (const json& layer : layers) {
    if (!layer.is_number_integer() || layer < 0)
      fail("config", "mlp_only_layers", "layer numbers", excerpt(layer));
    if (layer < c.num_hidden_layers) c.sparse[layer.get<int>()] = false;
  }
}

// mlx-lm's own rotary embedding of this family takes other frequencies where rope_scaling says so.
void no_rope_scaling(const Fields& f) {
  if (!f.has("rope_scaling")) return;
  const json& scaling = f.get("rope_scaling");
  const char* key = scaling.contains("type") ? "type" : "rope_type";
  if (!scaling.is_object() || (scaling.contains(key) && scaling[key] != "default") ||
      scaling.contains("mscale_all_dim"))
    fail("config", "rope_scaling", "none or the default type", excerpt(scaling));
}

void glm4_moe_lite(const Fields& f, ModelConfig& c) {
  no_rope_scaling(f);
  f.must_be_absent("attention_bias");
  f.must_be_absent("tie_word_embeddings");
  c.q_lora_rank = f.integer("q_lora_rank", 1, kMost);
  c.kv_lora_rank = f.integer("kv_lora_rank", 1, kMost);
  c.qk_nope_head_dim = f.integer("qk_nope_head_dim", 1, 4096);
  c.qk_rope_head_dim = f.integer("qk_rope_head_dim", 2, 4096);
  c.v_head_dim = f.integer("v_head_dim", 1, 4096);
  c.num_experts = f.integer("n_routed_experts", 1, 1 << 16);
  c.num_experts_per_tok = f.integer("num_experts_per_tok", 1, 1 << 16);
  c.n_shared_experts = f.integer("n_shared_experts", 0, 64, 0);
  c.n_group = f.integer("n_group", 1, c.num_experts, 1);
  c.topk_group = f.integer("topk_group", 1, c.n_group, 1);
  c.routed_scaling_factor = f.positive("routed_scaling_factor");
  const int dense = f.integer("first_k_dense_replace", 0, kMost);
  const int every = f.integer("moe_layer_freq", 1, kMost, 1);
  c.sparse.resize(c.num_hidden_layers);
  for (int i = 0; i < c.num_hidden_layers; ++i) c.sparse[i] = i >= dense && i % every == 0;
}

}  // namespace

ModelConfig parse_config(const std::string& text) {
  const json values = parse_object("config", "config.json", text);
  const Fields f(values);
  ModelConfig c;
  c.model_type = f.text("model_type");
  const bool qwen = c.model_type == "qwen3_moe";
  if (!qwen && c.model_type != "glm4_moe_lite")
    fail("config", "model_type", "qwen3_moe or glm4_moe_lite", excerpt(f.get("model_type")));
  common(f, c);
  qwen ? qwen3_moe(f, c) : glm4_moe_lite(f, c);
  if (c.num_experts > 0 && c.num_experts_per_tok > c.num_experts)
    fail("config", "num_experts_per_tok",
         "at most the " + std::to_string(c.num_experts) + " experts",
         std::to_string(c.num_experts_per_tok));
  const int rotary = qwen ? c.head_dim : c.qk_rope_head_dim;
  if (rotary % 2)
    fail("config", qwen ? "head_dim" : "qk_rope_head_dim", "an even number",
         std::to_string(rotary));
  return c;
}

}  // namespace moefuse
