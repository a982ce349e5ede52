// The committed checkpoints through the Metal executor, its dispatches run in the emulator, in
// their own bfloat16: as near to fp32 activations as stock's arithmetic is.
#include <gtest/gtest.h>

#include <cmath>

#include "emulated_backend.h"
#include "metal/launch.h"
#include "moefuse/decoder.h"

namespace {

namespace mx = mlx::core;
namespace metal = moefuse::metal;
using moefuse::Accumulate;

constexpr size_t kSlots = 10;
const kernels::Sizes kSizes = {.rows = 1, .capacity = kSlots, .batches = 0, .sequences = 1};

#define ADD_STAGE(backend, name, params) \
  backend.add(#name, emulated::match_##name<params>, emulated::run_##name<params>, kSizes)

struct Common {
  using T = bfloat16_t;
  using A = T;
  using U = T;
  using W = T;
  static constexpr int BITS = 4, GROUP = 64, H = 192, STRIDE = 192, D = 192, ROWS = 192;
  static constexpr int SPLITS = 8, V = 2048, COMBINE = 0, I = 64;
  static constexpr bool NORM = true, STEPS = true;
};
struct Head : Common {
  static constexpr int NQ = 2048, NK = 0, NV = 0;
};

struct Qwen : Common {
  static constexpr int NQ = 256, NK = 128, NV = 128, E = 40, K = 8;
};
struct QwenAttention : Common {
  static constexpr int HEADS = 4, KV_HEADS = 2, D = 64;
};
struct QwenRouter : Qwen {
  static constexpr int BITS = 8;
};

struct GlmLatent : Common {
  static constexpr int NQ = 128, NK = 160, NV = 0;
};
struct GlmQuery : Common {
  static constexpr int H = 128, STRIDE = 288, NQ = 384, NK = 0, NV = 0;
};
struct GlmAttention : Common {
  static constexpr int HEADS = 4, NOPE = 64, ROPE = 32, LORA = 128, KV_STRIDE = 288;
  static constexpr int KV_OFFSET = 128, V = 64;
};
struct GlmOutput : Common {
  static constexpr int COLS = 256;
};
struct GlmDense : Common {
  static constexpr int I = 512, COLS = 512;
};
struct QwenInFp32 : Qwen {
  static constexpr int COMBINE = 1;
};
struct Glm : Common {
  static constexpr int E = 48, K = 4, COMBINE = 1;
};

void add_kernels(emulated::Backend& backend) {
  ADD_STAGE(backend, embed, Common);
  ADD_STAGE(backend, norm_qkv, Head);
  ADD_STAGE(backend, norm_qkv, Qwen);
  ADD_STAGE(backend, attention_gqa, QwenAttention);
  ADD_STAGE(backend, attention_out, QwenAttention);
  ADD_STAGE(backend, norm_router_softmax, QwenRouter);
  ADD_STAGE(backend, moe_experts_gate_up, Qwen);
  ADD_STAGE(backend, moe_experts_down_residual, Qwen);
  ADD_STAGE(backend, moe_experts_down_residual, QwenInFp32);
  ADD_STAGE(backend, norm_qkv, GlmLatent);
  ADD_STAGE(backend, norm_qkv, GlmQuery);
  ADD_STAGE(backend, attention_mla, GlmAttention);
  ADD_STAGE(backend, mla_unembed, GlmAttention);
  ADD_STAGE(backend, linear_residual, GlmOutput);
  ADD_STAGE(backend, norm_gate_up, GlmDense);
  ADD_STAGE(backend, linear_residual, GlmDense);
  ADD_STAGE(backend, norm_router_sigmoid, Glm);
  ADD_STAGE(backend, moe_experts_gate_up_shared, Glm);
  ADD_STAGE(backend, moe_experts_down_shared, Glm);
}

// A decoder and its caches: one sequence.
struct Run {
  Run(const moefuse::Model& model, Accumulate accumulate) : decoder(model, accumulate) {
    const auto c = decoder.cache_shape();
    for (int i = 0; i < model.config.num_hidden_layers; ++i) {
      caches.push_back({mx::zeros({1, c.kv_heads, int(kSlots), c.key_dim}, mx::bfloat16),
                        mx::zeros({1, c.kv_heads, int(kSlots), c.value_dim}, mx::bfloat16)});
      mx::eval(caches.back().keys, caches.back().values);
    }
  }
  std::vector<float> step(uint32_t token, int slot) {
    mx::array logits = mx::astype(decoder.step({{token, 0, slot, 0, slot}}, caches), mx::float32);
    logits.eval();
    return {logits.data<float>(), logits.data<float>() + logits.size()};
  }
  moefuse::Decoder decoder;
  std::vector<moefuse::LayerCache> caches;
};

struct Backed {
  explicit Backed(emulated::Backend& backend) {
    metal::set_backend([&backend](const metal::Call& call) { return backend(call); });
  }
  ~Backed() { metal::set_backend(nullptr); }
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Root mean square over the logits of one token.
double rms(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::pow(a[i] - b[i], 2);
  return std::sqrt(sum / a.size());
}

// Greedy tokens of the fp32 reference, forced on all. The median over the tokens: where an
// activation's last bit moves an expert in or out of the choice, one token's error says little.
void compare(const std::string& name, size_t dispatches) {
  const moefuse::Model model = moefuse::load_model(std::string(MODELS) + "/" + name);
  Run reference(model, Accumulate::fp32_no_fma), stock(model, Accumulate::exact);
  emulated::Backend backend;
  add_kernels(backend);
  Backed guard(backend);
  Run exact(model, Accumulate::exact), fp32(model, Accumulate::fp32_no_fma);
  std::vector<double> errors[3];
  uint32_t token = 300;
  for (int slot = 0; slot < int(kSlots); ++slot) {
    const auto want = reference.step(token, slot);
    backend.dispatched.clear();
    errors[0].push_back(rms(exact.step(token, slot), want));
    EXPECT_EQ(backend.dispatched.size(), dispatches);
    errors[1].push_back(rms(fp32.step(token, slot), want));
    errors[2].push_back(rms(stock.step(token, slot), want));
    token = static_cast<uint32_t>(std::max_element(want.begin(), want.end()) - want.begin());
  }
  std::printf("%s: median rms error, exact %.4g, fp32_no_fma %.4g, stock on a CPU %.4g\n",
              name.c_str(), median(errors[0]), median(errors[1]), median(errors[2]));
  EXPECT_GT(median(errors[2]), 0.0);
  EXPECT_LT(median(errors[0]), 2 * median(errors[2]));
  EXPECT_LT(median(errors[1]), median(errors[2]));
}

TEST(MetalCheckpoints, Qwen3Moe) {
  compare("qwen3-moe-tiny", 2 + 5 * 6);
}
TEST(MetalCheckpoints, Glm4MoeLite) {
  compare("glm4-moe-lite-tiny", 2 + 7 + 4 * 8);
}

}  // namespace
