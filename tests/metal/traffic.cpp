// Bytes and dispatches of one decoded token, from the executor's own plan at the true geometry, and
// what published bandwidths would make of them. Estimates: nothing here was measured on Apple
// hardware. With a file as argument: exit code 1 unless the file holds what this prints.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include "metal/metal_step.h"

namespace mx = mlx::core;
using moefuse::metal::Dispatch;

namespace {

constexpr int kContext = 1024;
struct Machine {
  const char* name;
  double bandwidth;  // published, GB/s
};
constexpr Machine kMachines[] = {{"M1 Max", 400},
                                 {"M2 Max", 400},
                                 {"M3 Max (40 cores)", 400},
                                 {"M4 Max (40 cores)", 546},
                                 {"M5 Max (40 cores)", 614}};
// Assumed, not measured: the share of that bandwidth that a decode reaches, and the seconds from
// the end of one dependent dispatch to the start of the next in one command buffer.
constexpr double kShare = 0.75, kGap = 2e-6;

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

Shapes qwen() {
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

Shapes glm() {
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

std::string line(const char* format, auto... values) {
  char text[256];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

// layers: how often each of the plan's layers stands in the model.
std::string report(const char* name, Shapes shapes, const std::vector<int>& layers) {
  const moefuse::Plan plan = moefuse::make_plan(shapes.model);
  const moefuse::metal::MetalStep step(plan, moefuse::Accumulate::exact);
  std::string text = line("### %s, 4 bits, %d cached tokens\n\n", name, kContext);
  text += "| where | dispatch | MB of weights | MB of cache |\n|---|---|---|---|\n";
  double bytes = 0.0;
  int dispatches = 0;
  for (const Dispatch& d : step.dispatches(kContext)) {
    const int times = d.layer < 0 ? 1 : layers[d.layer];
    const std::string where = d.layer < 0  ? "once"
                              : times == 1 ? "the dense layer"
                                           : line("%d layers", times);
    text += line("| %s | `%s` | %.2f | %.2f |\n", where.c_str(), d.kernel.c_str(),
                 d.weight_bytes / 1e6, d.cache_bytes / 1e6);
    bytes += times * double(d.weight_bytes + d.cache_bytes);
    dispatches += times;
  }
  text += line("\nA token: %.2f GB in %d dispatches.\n\n", bytes / 1e9, dispatches);
  text += "| machine | GB/s, published | bound, tok/s | estimate, tok/s |\n|---|---|---|---|\n";
  for (const Machine& m : kMachines) {
    const double bound = bytes / m.bandwidth / 1e9, estimate = bound / kShare + dispatches * kGap;
    text += line("| %s | %.0f | %.0f | %.0f |\n", m.name, m.bandwidth, 1 / bound, 1 / estimate);
  }
  return text + "\n";
}

}  // namespace

int main(int count, char** arguments) {
  const std::string text =
      report("Qwen3-30B-A3B", qwen(), {48}) + report("GLM-4.7-Flash", glm(), {1, 46});
  std::cout << text;
  if (count < 2) return 0;
  std::ostringstream file;
  file << std::ifstream(arguments[1]).rdbuf();
  const bool held = file.str().find(text.substr(0, text.size() - 1)) != std::string::npos;
  if (!held) std::cerr << arguments[1] << ": expected these tables, got others\n";
  return held ? 0 : 1;
}
