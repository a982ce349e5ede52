// The Metal executor of the decode step, its dispatches run in the emulator: whole tokens against
// fp64 inside a computed bound, and against the CPU's executor.
#include <array>

#include "emulated_backend.h"
#include "metal/metal_step.h"
#include "step_oracle.h"

namespace {

using namespace harness;
namespace metal = moefuse::metal;
using moefuse::Accumulate;
using moefuse::StepRow;

struct Emulated {
  explicit Emulated(emulated::Backend& backend) {
    metal::set_backend([&backend](const metal::Call& call) { return backend(call); });
  }
  ~Emulated() { metal::set_backend(nullptr); }
};

constexpr size_t kRows = 3, kSlots = 8;
const kernels::Sizes kSizes = {.rows = kRows, .capacity = kSlots, .batches = 0, .sequences = 4};

#define ADD_STAGE(backend, name, params) \
  backend.add(#name, emulated::match_##name<params>, emulated::run_##name<params>, kSizes)

// ---- a Qwen3-MoE of two layers, the second one dense ----

struct Common {
  using T = float;
  using A = T;
  using U = float;
  using W = float;
  static constexpr int BITS = 4, GROUP = 32, H = 96, STRIDE = 96, D = 96, ROWS = 96;
  static constexpr int SPLITS = 8, V = 70, COMBINE = 1;
  static constexpr bool NORM = true, STEPS = true;
};
struct Qwen : Common {
  static constexpr int NQ = 128, NK = 64, NV = 64, E = 10, K = 3, I = 64;
};
struct QwenAttention : Common {
  static constexpr int HEADS = 4, KV_HEADS = 2, D = 32;
};
struct QwenRouter : Qwen {
  static constexpr int BITS = 8;
};
struct QwenDense : Common {
  static constexpr int I = 160;
};
struct QwenDenseDown : Common {
  static constexpr int COLS = 160;
};
struct Head : Common {
  static constexpr int NQ = 70, NK = 0, NV = 0;
};

void add_qwen(emulated::Backend& backend) {
  ADD_STAGE(backend, embed, Common);
  ADD_STAGE(backend, norm_qkv, Qwen);
  ADD_STAGE(backend, norm_qkv, Head);
  ADD_STAGE(backend, attention_gqa, QwenAttention);
  ADD_STAGE(backend, attention_out, QwenAttention);
  ADD_STAGE(backend, norm_router_softmax, QwenRouter);
  ADD_STAGE(backend, moe_experts_gate_up, Qwen);
  ADD_STAGE(backend, moe_experts_down_residual, Qwen);
  ADD_STAGE(backend, norm_gate_up, QwenDense);
  ADD_STAGE(backend, linear_residual, QwenDenseDown);
}

RandomModel qwen() {
  RandomModel m(R"({"model_type": "qwen3_moe", "hidden_size": 96, "num_hidden_layers": 2,
    "vocab_size": 70, "max_position_embeddings": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160,
    "moe_intermediate_size": 64, "num_experts": 10, "num_experts_per_tok": 3,
    "decoder_sparse_step": 1, "mlp_only_layers": [1], "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "norm_topk_prob": true})");
  m.quantized("model.embed_tokens", 1, 70, 96, 12.0f);
  m.quantized("lm_head", 1, 70, 96, 0.2f);
  m.norm("model.norm", 96);
  for (int i = 0; i < 2; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", a = layer + "self_attn.";
    m.norm(layer + "input_layernorm", 96);
    m.norm(layer + "post_attention_layernorm", 96);
    m.norm(a + "q_norm", 32, 0.2f);
    m.norm(a + "k_norm", 32, 0.2f);
    m.quantized(a + "q_proj", 1, 128, 96);
    m.quantized(a + "k_proj", 1, 64, 96);
    m.quantized(a + "v_proj", 1, 64, 96, 0.3f);
    m.quantized(a + "o_proj", 1, 96, 128, 0.1f);
  }
  m.quantized("model.layers.0.mlp.gate", 1, 10, 96, 1.0f / 16, 8);
  m.quantized("model.layers.0.mlp.switch_mlp.gate_proj", 10, 64, 96, 0.4f);
  m.quantized("model.layers.0.mlp.switch_mlp.up_proj", 10, 64, 96, 0.4f);
  m.quantized("model.layers.0.mlp.switch_mlp.down_proj", 10, 96, 64, 0.1f);
  m.quantized("model.layers.1.mlp.gate_proj", 1, 160, 96, 0.4f);
  m.quantized("model.layers.1.mlp.up_proj", 1, 160, 96, 0.4f);
  m.quantized("model.layers.1.mlp.down_proj", 1, 96, 160, 0.1f);
  return m;
}

// ---- a GLM-lite of two layers, the first one dense ----

struct GlmLatent : Common {
  static constexpr int NQ = 64, NK = 80, NV = 0;
};
struct GlmQuery : Common {
  static constexpr int H = 64, STRIDE = 144, NQ = 144, NK = 0, NV = 0;
};
struct GlmAttention : Common {
  static constexpr int HEADS = 3, NOPE = 32, ROPE = 16, LORA = 64, KV_STRIDE = 144, KV_OFFSET = 64;
  static constexpr int V = 64;
};
struct GlmOutput : Common {
  static constexpr int COLS = 192;
};
struct Glm : Common {
  static constexpr int E = 9, K = 2, I = 64;
};

void add_glm(emulated::Backend& backend) {
  ADD_STAGE(backend, embed, Common);
  ADD_STAGE(backend, norm_qkv, GlmLatent);
  ADD_STAGE(backend, norm_qkv, GlmQuery);
  ADD_STAGE(backend, norm_qkv, Head);
  ADD_STAGE(backend, attention_mla, GlmAttention);
  ADD_STAGE(backend, mla_unembed, GlmAttention);
  ADD_STAGE(backend, linear_residual, GlmOutput);
  ADD_STAGE(backend, linear_residual, QwenDenseDown);
  ADD_STAGE(backend, norm_gate_up, QwenDense);
  ADD_STAGE(backend, norm_router_sigmoid, Glm);
  ADD_STAGE(backend, moe_experts_gate_up_shared, Glm);
  ADD_STAGE(backend, moe_experts_down_shared, Glm);
}

RandomModel glm() {
  RandomModel m(R"({"model_type": "glm4_moe_lite", "hidden_size": 96, "num_hidden_layers": 2,
    "vocab_size": 70, "max_position_embeddings": 64, "num_attention_heads": 3,
    "intermediate_size": 160, "moe_intermediate_size": 64, "n_routed_experts": 9,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "routed_scaling_factor": 1.8})");
  m.quantized("model.embed_tokens", 1, 70, 96, 12.0f);
  m.quantized("lm_head", 1, 70, 96, 0.2f);
  m.norm("model.norm", 96);
  for (int i = 0; i < 2; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", a = layer + "self_attn.";
    m.norm(layer + "input_layernorm", 96);
    m.norm(layer + "post_attention_layernorm", 96);
    m.norm(a + "q_a_layernorm", 64);
    m.norm(a + "kv_a_layernorm", 64, 0.2f);
    m.quantized(a + "q_a_proj", 1, 64, 96);
    m.quantized(a + "q_b_proj", 1, 144, 64, 0.15f);
    m.quantized(a + "kv_a_proj_with_mqa", 1, 80, 96);
    m.quantized(a + "embed_q", 3, 64, 32, 0.2f);
    m.quantized(a + "unembed_out", 3, 64, 64, 0.2f);
    m.quantized(a + "o_proj", 1, 96, 192, 0.04f);
  }
  m.quantized("model.layers.0.mlp.gate_proj", 1, 160, 96, 0.4f);
  m.quantized("model.layers.0.mlp.up_proj", 1, 160, 96, 0.4f);
  m.quantized("model.layers.0.mlp.down_proj", 1, 96, 160, 0.1f);
  const std::string mlp = "model.layers.1.mlp.";
  m.dense(mlp + "gate.weight", {9, 96}, -0.02f, 0.02f);
  // Spaced so that the choice holds inside the bound of a whole token.
  std::vector<float> bias;
  for (int i = 0; i < 9; ++i) bias.push_back(0.1f * (i * 4 % 9));
  m.given(mlp + "gate.e_score_correction_bias", {9}, bias);
  for (const std::string stack : {"switch_mlp.", "shared_experts."}) {
    const int count = stack == "switch_mlp." ? 9 : 1;
    m.quantized(mlp + stack + "gate_proj", count, 64, 96, 0.4f);
    m.quantized(mlp + stack + "up_proj", count, 64, 96, 0.4f);
    m.quantized(mlp + stack + "down_proj", count, 96, 64, 0.1f);
  }
  return m;
}

// ---- both ----

std::vector<moefuse::LayerCache> empty_caches(const moefuse::Decoder& decoder) {
  std::vector<moefuse::LayerCache> caches;
  const auto c = decoder.cache_shape();
  for (int i = 0; i < decoder.config().num_hidden_layers; ++i) {
    caches.push_back({mx::full({4, c.kv_heads, int(kSlots), c.key_dim}, NAN),
                      mx::full({4, c.kv_heads, int(kSlots), c.value_dim}, NAN)});
    mx::eval(caches.back().keys, caches.back().values);
  }
  return caches;
}

// Three sequences of four tokens each, one of them padded on its left.
std::vector<StepRow> rows_at(int step) {
  const uint32_t token = 17 * step;
  return {{token % 70, 2, step, 0, step},
          {(token + 23) % 70, 0, step, 3, step + 3},
          {(token + 41) % 70, 3, step + 20, 1, step + 1}};
}

// The hidden states of a token among the results of its dispatches: the outputs that a residual
// goes into, and the embedding.
std::vector<mx::array> hidden_states(const emulated::Backend& backend) {
  std::vector<mx::array> states;
  for (size_t i = 0; i < backend.dispatched.size(); ++i) {
    const std::string& name = backend.dispatched[i];
    for (const char* one : {"embed", "attention_out", "linear_residual",
                            "moe_experts_down_residual", "moe_experts_down_shared"})
      if (name == one) states.push_back(backend.results[i]);
  }
  return states;
}

void check_logits(const mx::array& logits, size_t row, const Vector& want, const char* what) {
  for (size_t n = 0; n < want.size(); ++n)
    expect_near(logits.data<float>()[row * want.size() + n], want[n], what, n);
}

void check_tokens(const RandomModel& m, void (*add)(emulated::Backend&), size_t stages) {
  moefuse::Decoder cpu(m.model, Accumulate::fp32_no_fma);
  auto cpu_caches = empty_caches(cpu);
  emulated::Backend backend;
  add(backend);
  Emulated guard(backend);
  moefuse::Decoder on_metal(m.model, Accumulate::fp32_no_fma);
  auto caches = empty_caches(on_metal);
  // One oracle takes the executor's hidden state at each meeting, and so says much of each block;
  // the other runs on its own from the token to the logits.
  size_t row = 0, state = 0;
  std::vector<mx::array> states;
  StepOracle whole(m), blocks_of(m, [&](Vector&hidden) {
    const float* got = states.at(state++).data<float>() + row * hidden.size();
    for (size_t i = 0; i < hidden.size(); ++i) {
      expect_near(got[i], hidden[i], "hidden", i);
      ASSERT_LT(hidden[i].error, 1e-3 * (1 + std::abs(hidden[i].value))) << "a bound says little";
      hidden[i] = {got[i], 0};
    }
  });
  for (int step = 0; step < 4; ++step) {
    const auto rows = rows_at(step);
    backend.order = std::array{emulator::Order::forward, emulator::Order::reverse,
                               emulator::Order::shuffled}[step % 3];
    backend.dispatched.clear();
    backend.results.clear();
    const mx::array got = on_metal.step(rows, caches), other = cpu.step(rows, cpu_caches);
    EXPECT_EQ(backend.dispatched.size(), stages);
    ASSERT_EQ(got.shape(), (mx::Shape{kRows, 70}));
    states = hidden_states(backend);
    for (row = 0; row < kRows; ++row) {
      state = 0;
      check_logits(got, row, blocks_of.step(rows[row]), "logits");
      const Vector want = whole.step(rows[row]);
      check_logits(got, row, want, "logits from the token");
      check_logits(other, row, want, "the CPU's logits");
    }
  }
}

TEST(MetalStep, QwenTokens) {
  check_tokens(qwen(), add_qwen, 2 + 6 + 5);
}
TEST(MetalStep, GlmTokens) {
  check_tokens(glm(), add_glm, 2 + 7 + 8);
}

template <typename T>
void expect_same_array(const mx::array& a, const mx::array& b) {
  ASSERT_EQ(a.nbytes(), b.nbytes());
  EXPECT_EQ(std::memcmp(a.data<T>(), b.data<T>(), a.nbytes()), 0);
}

// Rows together and one at a time: the same logits and caches, bit for bit.
void check_rows_alone(const RandomModel& m, void (*add)(emulated::Backend&)) {
  emulated::Backend backend;
  add(backend);
  Emulated guard(backend);
  moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
  auto caches = empty_caches(decoder), alone = empty_caches(decoder);
  for (int step = 0; step < 2; ++step) {
    const auto rows = rows_at(step);
    backend.rows.reset();
    const mx::array together = decoder.step(rows, caches);
    backend.rows = 1;
    for (size_t r = 0; r < kRows; ++r) {
      const mx::array one = decoder.step({rows[r]}, alone);
      EXPECT_EQ(std::memcmp(one.data<float>(), together.data<float>() + r * 70, 70 * 4), 0);
    }
  }
  for (size_t i = 0; i < caches.size(); ++i) {
    expect_same_array<float>(caches[i].keys, alone[i].keys);
    expect_same_array<float>(caches[i].values, alone[i].values);
  }
}

TEST(MetalStep, QwenRowsHaveTheBitsThatTheyHaveAlone) {
  check_rows_alone(qwen(), add_qwen);
}
TEST(MetalStep, GlmRowsHaveTheBitsThatTheyHaveAlone) {
  check_rows_alone(glm(), add_glm);
}

// The message with which the executor refuses a plan that `change` has altered.
template <class Stage, class Change>
std::string refusal(const RandomModel& m, const Change& change) {
  moefuse::Plan plan = moefuse::make_plan(m.model);
  for (moefuse::Stage& stage : plan.stages)
    if (auto* work = std::get_if<Stage>(&stage.work)) change(*work);
  try {
    metal::MetalStep step(plan, Accumulate::exact);
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "taken";
}

TEST(MetalStep, RefusesWhatItsKernelsDoNotTake) {
  using namespace moefuse;
  const RandomModel q = qwen(), g = glm();
  EXPECT_EQ(refusal<moefuse::Head>(q, [](auto&) {}), "taken");
  EXPECT_EQ(refusal<GroupedAttention>(q, [](auto& s) { s.head_dim = 48; }),
            "[step on Metal] layers.0, attention, head_dim: expected a multiple of 32, got 48");
  EXPECT_EQ(refusal<GroupedProjection>(q, [](auto& s) { s.k.bits = 8; }),
            "[step on Metal] layers.0, qkv, matrices: expected 4 bits and group_size 32 for all, "
            "got 8 and 32");
  EXPECT_EQ(refusal<Router>(q, [](auto& s) { s.quantized_gate.reset(); }),
            "[step on Metal] layers.0, router, mlp.gate: expected a quantised gate, got the other "
            "kind");
  EXPECT_EQ(refusal<Router>(g, [](auto& s) { s.options.n_group = 3; }),
            "[step on Metal] layers.1, router, n_group: expected 1, got 3");
  EXPECT_EQ(refusal<moefuse::Head>(g, [](auto& s) { s.lm_head.cols = 8192; }),
            "[step on Metal] lm_head, bytes of threadgroup memory: expected at most 32768, got "
            "32800");
  EXPECT_EQ(refusal<ExpertsGateUp>(g, [](auto& s) { s.shared_gate->rows = 128; }),
            "[step on Metal] layers.1, experts_gate_up, shared expert: expected the experts' width "
            "64, got 128");
}

TEST(MetalStep, RefusesTwoRowsOfOneSequence) {
  emulated::Backend backend;
  Emulated guard(backend);
  const RandomModel m = qwen();
  moefuse::Decoder decoder(m.model, Accumulate::exact);
  auto caches = empty_caches(decoder);
  try {
    decoder.step({{1, 2, 0, 0, 0}, {2, 2, 1, 0, 1}}, caches);
    FAIL() << "no error";
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(),
                 "[step] rows: expected one row of each sequence on a GPU, got two of sequence 2");
  }
  EXPECT_TRUE(backend.dispatched.empty());
}

}  // namespace
