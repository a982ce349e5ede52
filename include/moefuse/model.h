// A checkpoint: its configuration, typed, and its weights by name. The arrays are MLX's own.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "mlx/mlx.h"

namespace moefuse {

namespace mx = mlx::core;

// What config.json says, under its own names; a field that the family does not have is zero.
struct ModelConfig {
  std::string model_type;  // "qwen3_moe" or "glm4_moe_lite"
  int hidden_size = 0, num_hidden_layers = 0, vocab_size = 0, max_position_embeddings = 0;
  int num_attention_heads = 0, num_key_value_heads = 0, head_dim = 0;
  int intermediate_size = 0, moe_intermediate_size = 0, num_experts = 0, num_experts_per_tok = 0;
  float rms_norm_eps = 0, rope_theta = 0;
  bool norm_topk_prob = false, tie_word_embeddings = false;
  std::vector<bool> sparse;  // [num_hidden_layers], which layers route to experts
  // glm4_moe_lite
  int q_lora_rank = 0, kv_lora_rank = 0, qk_nope_head_dim = 0, qk_rope_head_dim = 0;
  int v_head_dim = 0, n_shared_experts = 0, n_group = 1, topk_group = 1;
  float routed_scaling_factor = 1;
};

// Reads the text of a config.json. Throws std::invalid_argument "[config] field: expected ..., got
// ..." on an unknown model_type, a missing or ill-typed field, or a value out of range.
ModelConfig parse_config(const std::string& json);

// By mlx-lm's names, for example "model.layers.0.self_attn.q_proj.weight".
using Weights = std::unordered_map<std::string, mx::array>;

struct Model {
  ModelConfig config;
  Weights weights;
};

// Opens a folder in mlx-lm's layout: config.json and *.safetensors, of which
// model.safetensors.index.json names the parts where it exists. Every file is checked against its
// own header, and all of them against the machine's memory, before a tensor is touched. Throws
// std::invalid_argument naming the file or tensor.
Model load_model(const std::string& folder);

// Bytes that new work can have without swapping, as Linux estimates them; none elsewhere.
std::optional<uint64_t> available_memory();

// Throws std::invalid_argument with the estimate (weights and 5 %) and what there is, when the
// first does not fit into the second. Unknown memory is taken to do.
void check_memory(const std::string& model, uint64_t weight_bytes,
                  std::optional<uint64_t> available);

}  // namespace moefuse
