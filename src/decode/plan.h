// A token as a list of stages. A stage is what runs between two meetings of all workers: it reads
// each of its weights once, for all rows. Device independent: executors give the stages their code.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "model/weights.h"
#include "moefuse/decoder.h"

namespace moefuse {

struct Rope {
  int dims;
  float base;
  bool traditional;  // pairs are neighbours, not halves
};

// hidden = table[token]
struct Embed {
  Matrix table;
};

// q, k, v = projections of norm(hidden)
struct GroupedProjection {
  Norm norm;
  Matrix q, k, v;
};

// Norms and rotates q and k, appends k and v to the cache, attends.
struct GroupedAttention {
  Norm q_norm, k_norm;
  int heads, kv_heads, head_dim;
  float scale;
  Rope rope;
};

// compressed query and latent = projections of norm(hidden)
struct LatentProjection {
  Norm norm;
  Matrix q_a, kv_a;
};

// q = q_b norm(compressed query), its first part taken to the latent space; appends to the cache.
struct LatentQuery {
  Norm q_a_norm, kv_a_norm;
  Matrix q_b, embed_q;  // embed_q: one matrix for each head
  int heads, nope_dim, rope_dim, latent_dim;
  Rope rope;
};

struct LatentAttention {
  int heads, latent_dim, rope_dim;
  float scale;
};

// Each head's attended latent to its values.
struct LatentOutput {
  Matrix unembed;  // one matrix for each head
};

// hidden += o attended
struct OutputProjection {
  Matrix o;
};

// Expert indices and weights from norm(hidden).
struct Router {
  Norm norm;
  std::optional<Matrix> quantized_gate;
  std::optional<mx::array> dense_gate, correction_bias;
  int experts, top_k;
  RouterOptions options;
};

// silu(gate x) * (up x) for the chosen experts and the shared one.
struct ExpertsGateUp {
  Matrix gate, up;
  std::optional<Matrix> shared_gate, shared_up;
};

// hidden += weighted sum of down, plus the shared expert's
struct ExpertsDown {
  Matrix down;
  std::optional<Matrix> shared_down;
};

struct DenseGateUp {
  Norm norm;
  Matrix gate, up;
};

// hidden += down
struct DenseDown {
  Matrix down;
};

// logits = lm_head norm(hidden)
struct Head {
  Norm norm;
  Matrix lm_head;
};

using Work = std::variant<Embed, GroupedProjection, GroupedAttention, LatentProjection, LatentQuery,
                          LatentAttention, LatentOutput, OutputProjection, Router, ExpertsGateUp,
                          ExpertsDown, DenseGateUp, DenseDown, Head>;

struct Stage {
  std::string name;
  int layer;  // -1 outside the layers
  Work work;
};

struct Plan {
  ModelConfig config;
  mx::Dtype dtype;
  CacheShape cache;
  std::vector<Stage> stages;

  // Shapes and bytes of one stage, for print-outs; the times are zero.
  StageInfo describe(const Stage& stage) const;
};

// One family each: src/model/.
Plan qwen3_moe_plan(const Model& model);
Plan glm4_moe_lite_plan(const Model& model);

// The plan of the model's family.
Plan make_plan(const Model& model);

}  // namespace moefuse
