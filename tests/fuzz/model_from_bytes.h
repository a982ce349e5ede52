// Any bytes as a model: a configuration, and the tensors that it promises, in shapes and dtypes
// that the bytes may have spoilt. No byte at all is a model with nothing wrong.
#pragma once

#include <sys/mman.h>

#include <map>
#include <string>
#include <vector>

#include "moefuse/model.h"

namespace moefuse::test {

namespace mx = mlx::core;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool left() const { return size_ > 0; }
  int next() { return size_ ? --size_, *data_++ : 0; }
  template <class T, size_t n>
  T pick(const T (&choices)[n]) {
    return choices[next() % n];
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Numbers of a config.json under their own names.
using Numbers = std::map<std::string, int64_t>;

inline Numbers good_numbers(bool qwen) {
  Numbers all = {
      {"hidden_size", 64},           {"num_hidden_layers", 1},       {"vocab_size", 96},
      {"num_attention_heads", 4},    {"intermediate_size", 96},      {"num_experts_per_tok", 2},
      {"moe_intermediate_size", 64}, {"max_position_embeddings", 64}};
  if (qwen)
    all.merge(Numbers{{"num_key_value_heads", 2},
                      {"head_dim", 32},
                      {"num_experts", 8},
                      {"decoder_sparse_step", 1}});
  else
    all.merge(Numbers{{"q_lora_rank", 32},
                      {"kv_lora_rank", 64},
                      {"qk_nope_head_dim", 32},
                      {"qk_rope_head_dim", 16},
                      {"v_head_dim", 32},
                      {"n_routed_experts", 8},
                      {"n_shared_experts", 1},
                      {"n_group", 2},
                      {"topk_group", 1},
                      {"first_k_dense_replace", 0},
                      {"moe_layer_freq", 1}});
  return all;
}

inline void spoil(Numbers& numbers, Bytes& bytes) {
  for (int changes = bytes.next() % 4; changes > 0; --changes) {
    int64_t& value = std::next(numbers.begin(), bytes.next() % numbers.size())->second;
    const int64_t pool[] = {value * 2,
                            value / 2,
                            value + 1,
                            value - 1,
                            0,
                            1,
                            2,
                            3,
                            32,
                            128,
                            512,
                            1 << 12,
                            1 << 16,
                            1 << 24,
                            -value,
                            INT32_MAX,
                            bytes.next() * 8,
                            bytes.next()};
    value = bytes.pick(pool);
  }
}

inline std::string config_text(bool qwen, const Numbers& numbers, bool tied) {
  std::string text = qwen ? R"({"model_type":"qwen3_moe","norm_topk_prob":true)"
                          : R"({"model_type":"glm4_moe_lite","routed_scaling_factor":1.8)";
  text += R"(,"rms_norm_eps":1e-6,"rope_theta":1e4)";
  if (tied) text += R"(,"tie_word_embeddings":true)";
  for (const auto& [name, value] : numbers) text += ",\"" + name + "\":" + std::to_string(value);
  return text + "}";
}

struct Tensor {
  std::vector<int64_t> shape;
  mx::Dtype dtype;
  bool strided = false;
};

// The tensors that mlx-lm's checkpoints of a family have, of the first layers alone.
class Promised {
 public:
  Promised(const ModelConfig& config, Bytes& bytes) : c_(config) {
    dtype_ = bytes.pick({mx::bfloat16, mx::float16, mx::float32});
    bits_ = bytes.pick({4, 8, 4, 8, 2, 3, 5, 6});
    group_ = bytes.pick({32, 64, 128, 16});
    matrix("model.embed_tokens", {c_.vocab_size, c_.hidden_size});
    if (!c_.tie_word_embeddings) matrix("lm_head", {c_.vocab_size, c_.hidden_size});
    dense("model.norm.weight", {c_.hidden_size});
    for (int i = 0; i < std::min(c_.num_hidden_layers, 2); ++i) {
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      dense(layer + "input_layernorm.weight", {c_.hidden_size});
      dense(layer + "post_attention_layernorm.weight", {c_.hidden_size});
      qwen() ? grouped(layer + "self_attn.") : latent(layer + "self_attn.");
      c_.sparse[i] ? experts(layer + "mlp.", bytes)
                   : gated(layer + "mlp.", {}, c_.intermediate_size);
    }
  }
  std::map<std::string, Tensor> tensors;

 private:
  using Sizes = std::vector<int64_t>;
  bool qwen() const { return c_.model_type == "qwen3_moe"; }
  void dense(const std::string& name, Sizes shape) { tensors.insert({name, {shape, dtype_}}); }
  void matrix(const std::string& name, Sizes shape) {
    const int64_t cols = shape.back();
    shape.back() = cols * bits_ / 32;
    tensors.insert({name + ".weight", {shape, mx::uint32}});
    shape.back() = cols / group_;
    dense(name + ".scales", shape);
    dense(name + ".biases", shape);
  }
  // gate_proj, up_proj and down_proj, each of as many matrices as `stack` says.
  void gated(const std::string& at, Sizes stack, int64_t width) {
    const auto of = [&](int64_t rows, int64_t cols) {
      Sizes shape = stack;
      shape.insert(shape.end(), {rows, cols});
      return shape;
    };
    matrix(at + "gate_proj", of(width, c_.hidden_size));
    matrix(at + "up_proj", of(width, c_.hidden_size));
    matrix(at + "down_proj", of(c_.hidden_size, width));
  }
  void grouped(const std::string& at) {
    const int64_t dim = c_.head_dim, hidden = c_.hidden_size;
    matrix(at + "q_proj", {c_.num_attention_heads * dim, hidden});
    matrix(at + "k_proj", {c_.num_key_value_heads * dim, hidden});
    matrix(at + "v_proj", {c_.num_key_value_heads * dim, hidden});
    matrix(at + "o_proj", {hidden, c_.num_attention_heads * dim});
    dense(at + "q_norm.weight", {dim});
    dense(at + "k_norm.weight", {dim});
  }
  void latent(const std::string& at) {
    const int64_t heads = c_.num_attention_heads, nope = c_.qk_nope_head_dim;
    const int64_t rope = c_.qk_rope_head_dim, q = c_.q_lora_rank, kv = c_.kv_lora_rank;
    matrix(at + "q_a_proj", {q, c_.hidden_size});
    matrix(at + "kv_a_proj_with_mqa", {kv + rope, c_.hidden_size});
    matrix(at + "q_b_proj", {heads * (nope + rope), q});
    matrix(at + "embed_q", {heads, kv, nope});
    matrix(at + "unembed_out", {heads, c_.v_head_dim, kv});
    matrix(at + "o_proj", {c_.hidden_size, heads * c_.v_head_dim});
    dense(at + "q_a_layernorm.weight", {q});
    dense(at + "kv_a_layernorm.weight", {kv});
  }
  void experts(const std::string& at, Bytes& bytes) {
    gated(at + "switch_mlp.", {c_.num_experts}, c_.moe_intermediate_size);
    if (qwen() && bytes.next() % 2)
      matrix(at + "gate", {c_.num_experts, c_.hidden_size});
    else
      dense(at + "gate.weight", {c_.num_experts, c_.hidden_size});
    if (qwen()) return;
    dense(at + "gate.e_score_correction_bias", {c_.num_experts});
    if (c_.n_shared_experts)
      gated(at + "shared_experts.", {}, int64_t(c_.moe_intermediate_size) * c_.n_shared_experts);
  }

  const ModelConfig& c_;
  mx::Dtype dtype_ = mx::float32;
  int bits_, group_;
};

inline void spoil(Tensor& tensor, Bytes& bytes) {
  std::vector<int64_t>& shape = tensor.shape;
  const int way = bytes.next() % 6;
  const size_t axis = shape.empty() ? 0 : bytes.next() % shape.size();
  if (way == 0)
    tensor.dtype = bytes.pick({mx::float32, mx::float16, mx::bfloat16, mx::uint32, mx::int32,
                               mx::uint8, mx::int64, mx::bool_});
  if (way == 1) tensor.strided = true;
  if (way == 2) shape.insert(shape.begin() + axis, bytes.next());
  if (shape.empty()) return;
  int64_t& size = shape[axis];
  if (way == 3) shape.erase(shape.begin() + axis);
  if (way == 4) size = bytes.next() * (bytes.next() % 9);
  if (way == 5) size = bytes.pick({size * 2, size / 2, size + 1, size - 1, int64_t(INT32_MAX)});
}

inline void spoil(std::map<std::string, Tensor>& tensors, Bytes& bytes) {
  for (int changes = 0; changes < 8 && bytes.left() && !tensors.empty(); ++changes) {
    const auto any = [&] { return std::next(tensors.begin(), bytes.next() % tensors.size()); };
    const auto at = any();
    switch (bytes.next() % 8) {
      case 0:
        tensors.erase(at);
        break;
      case 1:
        at->second = any()->second;
        break;
      case 2:
        tensors.insert({at->first.substr(0, at->first.rfind('.')) + ".bias", at->second});
        break;
      default:
        spoil(at->second, bytes);
    }
  }
}

// An array of that shape without the memory. A plan reads the routers' biases at most, 65536
// numbers: those are zeros, and a read beyond them is a crash.
inline mx::array unread(const Tensor& tensor) {
  constexpr size_t kZeros = (1 << 16) * sizeof(float) + 4096, kGuard = 1 << 20;
  static void* const zeros = [] {
    void* all = mmap(nullptr, kZeros + kGuard, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(static_cast<char*>(all) + kZeros, kGuard, PROT_NONE);
    return all;
  }();
  using mx::allocator::Buffer;
  const auto data = [] { return mx::allocator::Data(Buffer(zeros), [](Buffer) {}); };
  const mx::Shape shape(tensor.shape.begin(), tensor.shape.end());
  mx::array a(data(), shape, tensor.dtype);
  if (tensor.strided) a.set_data(data(), a.data_size(), a.strides(), {false, false, false});
  return a;
}

// Arrays that no memory could hold are left out: their bytes are no number of 64 bits.
inline Model model_from_bytes(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const bool qwen = bytes.next() % 2 == 0, tied = bytes.next() % 4 == 1;
  Numbers numbers = good_numbers(qwen);
  spoil(numbers, bytes);
  Model model{parse_config(config_text(qwen, numbers, tied)), {}};
  auto tensors = Promised(model.config, bytes).tensors;
  spoil(tensors, bytes);
  for (const auto& [name, tensor] : tensors) {
    double elements = 1;
    bool fits = true;
    for (int64_t n : tensor.shape) {
      elements *= double(std::max<int64_t>(n, 1));
      fits &= n >= 0 && n <= INT32_MAX;
    }
    if (fits && elements < double(int64_t{1} << 48)) model.weights.emplace(name, unread(tensor));
  }
  return model;
}

}  // namespace moefuse::test
