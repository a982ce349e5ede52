// Configurations and tensors that may not suit each other. The plan refuses them in the house's
// form, or each of its stages takes what the one before hands on, from tensors that are as they
// should be.
#include <stdexcept>

#include "cpu/kernels.h"
#include "decode/plan.h"
#include "metal/launch.h"
#include "model_from_bytes.h"

// The checks' file asks for the device too, elsewhere than in a plan: its kernels are not built
// here.
bool moefuse::metal::serves(mx::StreamOrDevice) {
  __builtin_trap();
}
const moefuse::cpu::Kernels& moefuse::cpu::kernels() {
  __builtin_trap();
}
void moefuse::cpu::check_settings() {
  __builtin_trap();
}

namespace {

using namespace moefuse;

void demand(bool truth) {
  if (!truth) __builtin_trap();
}

// Walks a plan's stages as a token does: members are what is at hand between two of them.
class Walk {
 public:
  explicit Walk(const Plan& plan) : plan_(plan), hidden_(plan.config.hidden_size) {}

  void operator()(const Embed& s) { matrix(s.table, plan_.config.vocab_size, hidden_); }
  void operator()(const GroupedProjection& s) {
    norm(s.norm, hidden_);
    matrix(s.q, s.q.rows, hidden_);
    matrix(s.k, s.k.rows, hidden_);
    matrix(s.v, s.k.rows, hidden_);
    queries_ = s.q.rows, keys_ = s.k.rows;
  }
  void operator()(const GroupedAttention& s) {
    norm(s.q_norm, s.head_dim);
    norm(s.k_norm, s.head_dim);
    demand(s.heads * s.head_dim == queries_ && s.kv_heads * s.head_dim == keys_);
    demand(s.heads % s.kv_heads == 0 && s.rope.dims == s.head_dim && s.head_dim % 2 == 0);
    demand(plan_.cache.kv_heads == s.kv_heads && plan_.cache.key_dim == s.head_dim &&
           plan_.cache.value_dim == s.head_dim);
    attended_ = queries_;
  }
  void operator()(const LatentProjection& s) {
    norm(s.norm, hidden_);
    matrix(s.q_a, s.q_a.rows, hidden_);
    matrix(s.kv_a, s.kv_a.rows, hidden_);
    queries_ = s.q_a.rows, keys_ = s.kv_a.rows;
  }
  void operator()(const LatentQuery& s) {
    demand(keys_ == s.latent_dim + s.rope_dim && s.rope.dims == s.rope_dim && s.rope_dim % 2 == 0);
    norm(s.q_a_norm, queries_);
    norm(s.kv_a_norm, s.latent_dim);
    matrix(s.q_b, s.heads * (s.nope_dim + s.rope_dim), queries_);
    matrix(s.embed_q, s.latent_dim, s.nope_dim, s.heads);
    heads_ = s.heads, latent_ = s.latent_dim;
    demand(plan_.cache.kv_heads == 1 && plan_.cache.key_dim == latent_ &&
           plan_.cache.value_dim == s.rope_dim);
  }
  void operator()(const LatentAttention& s) {
    demand(s.heads == heads_ && s.latent_dim == latent_ && s.latent_dim + s.rope_dim == keys_);
  }
  void operator()(const LatentOutput& s) {
    matrix(s.unembed, s.unembed.rows, latent_, heads_);
    attended_ = heads_ * s.unembed.rows;
  }
  void operator()(const OutputProjection& s) { matrix(s.o, hidden_, attended_); }
  void operator()(const Router& s) {
    norm(s.norm, hidden_);
    demand(s.quantized_gate.has_value() != s.dense_gate.has_value());
    if (s.quantized_gate) matrix(*s.quantized_gate, s.experts, hidden_);
    if (s.dense_gate) dense(*s.dense_gate, {s.experts, hidden_}, plan_.dtype);
    if (s.correction_bias) dense(*s.correction_bias, {s.experts}, mx::float32);
    demand(1 <= s.top_k && s.top_k <= s.experts);
    demand(1 <= s.options.topk_group && s.options.topk_group <= s.options.n_group);
    experts_ = s.experts;
  }
  void operator()(const ExpertsGateUp& s) {
    pair(s.gate, s.up, experts_);
    width_ = s.gate.rows;
    demand(s.shared_gate.has_value() == s.shared_up.has_value());
    if (s.shared_gate) pair(*s.shared_gate, *s.shared_up, 1);
    shared_width_ = s.shared_gate ? s.shared_gate->rows : 0;
  }
  void operator()(const ExpertsDown& s) {
    matrix(s.down, hidden_, width_, experts_);
    demand(s.shared_down.has_value() == (shared_width_ > 0));
    if (s.shared_down) matrix(*s.shared_down, hidden_, shared_width_);
  }
  void operator()(const DenseGateUp& s) {
    norm(s.norm, hidden_);
    pair(s.gate, s.up, 1);
    width_ = s.gate.rows;
  }
  void operator()(const DenseDown& s) { matrix(s.down, hidden_, width_); }
  void operator()(const Head& s) {
    norm(s.norm, hidden_);
    matrix(s.lm_head, plan_.config.vocab_size, hidden_);
  }

 private:
  void dense(const mx::array& a, const mx::Shape& shape, mx::Dtype dtype) {
    demand(a.shape() == shape && a.dtype() == dtype);
    demand(a.is_available() && a.flags().row_contiguous);
  }
  void norm(const Norm& n, int size) { dense(n.weight, {size}, plan_.dtype); }
  void matrix(const Matrix& m, int rows, int cols, int count = 1) {
    demand(m.rows == rows && m.cols == cols && m.count == count);
    demand((m.bits == 4 || m.bits == 8) && cols * int64_t(m.bits) % 32 == 0);
    demand(m.group_size % 32 == 0 && cols % m.group_size == 0);
    mx::Shape shape{count, rows, static_cast<int>(cols * int64_t(m.bits) / 32)};
    if (m.weight.ndim() == 2 && count == 1) shape = {shape[1], shape[2]};
    dense(m.weight, shape, mx::uint32);
    shape.back() = cols / m.group_size;
    dense(m.scales, shape, plan_.dtype);
    dense(m.biases, shape, plan_.dtype);
  }
  void pair(const Matrix& gate, const Matrix& up, int count) {
    matrix(gate, gate.rows, hidden_, count);
    matrix(up, gate.rows, hidden_, count);
  }

  const Plan& plan_;
  const int hidden_;
  int queries_ = 0, keys_ = 0, heads_ = 0, latent_ = 0, attended_ = 0;
  int experts_ = 0, width_ = 0, shared_width_ = 0;
};

void check(const Plan& plan) {
  Walk walk(plan);
  int layer = -1;
  for (const Stage& stage : plan.stages) {
    std::visit(walk, stage.work);
    demand(plan.describe(stage).weight_bytes >= 0);
    demand(stage.layer == -1 || stage.layer == layer || stage.layer == layer + 1);
    layer = std::max(layer, stage.layer);
  }
  demand(layer + 1 == plan.config.num_hidden_layers);
  demand(std::holds_alternative<Embed>(plan.stages.front().work));
  demand(std::holds_alternative<Head>(plan.stages.back().work));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool on_cpu = (mx::set_default_device(mx::Device::cpu), true);
  demand(on_cpu);
  try {
    check(make_plan(moefuse::test::model_from_bytes(data, size)));
    return 0;
  } catch (const std::invalid_argument& error) {
    const std::string said = error.what();
    demand(size > 0);  // nothing is wrong with no bytes
    demand(said.rfind("[config] ", 0) == 0 || said.rfind("[model] ", 0) == 0);
    demand(said.find(": expected ") != std::string::npos);
    demand(said.find(", got ") != std::string::npos);
  }
  return 0;
}
