// CUDA's own kernel texts in the emulator, through the committed checkpoints: whole tokens by the
// walk that an H100 takes, beside the CPU's executor with fp32 activations.
#include "tensor_kernels.h"
// The texts come first.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "../metal/true_shapes.h"
#include "collect_calls.h"
#include "cuda/tensor_walk.h"
#include "emulated_backend.h"
#include "moefuse/decoder.h"

namespace {

namespace mx = mlx::core;
namespace metal = moefuse::metal;
using moefuse::Accumulate;

constexpr int kSlots = 6;

struct Common {
  using T = bfloat16_t;
  using A = float;
  static constexpr int ROWS = 1, BITS = 4, GROUP = 64, H = 192, STRIDE = 192, D = 192, N = 192;
  static constexpr int V = 2048, I = 64, COMBINE = 1, TILES = 1, DEPTH = 1, WARPS = 8;
  static constexpr bool NORM = true, SOFTMAX = true, SHARED = false;
};
struct Head : Common {
  static constexpr int N = 2048;
};
struct Qwen : Common {
  static constexpr int DEPTH = 2, NQ = 256, NK = 128, NV = 128, E = 40, K = 8;
};
struct QwenDown : Qwen {
  static constexpr int WARPS = 1, DEPTH = 0;
};
struct QwenOut : Common {
  static constexpr int HEADS = 4, KV_HEADS = 2, D = 64, SPLITS = 1, E = 40;
};
struct QwenFold : Common {
  static constexpr int E = 40, K = 256;
};
struct Glm : Common {
  static constexpr int DEPTH = 2, NQ = 128, NK = 160, NV = 0, E = 48, K = 4;
  static constexpr bool SOFTMAX = false, SHARED = true;
};
struct GlmDown : Glm {
  static constexpr int WARPS = 1, DEPTH = 0;
};
struct GlmQuery : Common {
  static constexpr int H = 128, STRIDE = 288, NQ = 384, NK = 0, NV = 0;
};
struct GlmHeads : Common {
  static constexpr int TILES = 8, HEADS = 4, X_HEAD = 96, PART = 64, N = 128;
};
struct GlmUnembed : Common {
  static constexpr int TILES = 4, HEADS = 4, LORA = 128, V = 64, SPLITS = 1;
};
struct GlmAttention : GlmUnembed {
  static constexpr int N = 8, NOPE = 64, ROPE = 32, KV_STRIDE = 288, KV_OFFSET = 128;
};
struct GlmOut : Common {
  static constexpr int COLS = 256, E = 48;
};
struct GlmOutDense : Common {
  static constexpr int COLS = 256, E = 0;
};
struct GlmFold : Common {
  static constexpr int E = 48, K = 256;
};
struct GlmDense : Common {
  static constexpr int I = 512, COLS = 512, E = 0;
};

const kernels::Sizes kSizes = {.rows = 1, .capacity = kSlots, .batches = 0, .sequences = 1};
#define ADD_STAGE(backend, name, params) \
  backend.add(#name, emulated::match_##name<params>, emulated::run_##name<params>, kSizes)

void add_kernels(emulated::Backend& backend) {
  ADD_STAGE(backend, embed, Common);
  ADD_STAGE(backend, grid_project, Qwen);
  ADD_STAGE(backend, cluster_attention_gqa, QwenOut);
  ADD_STAGE(backend, grid_attention_out, QwenOut);
  ADD_STAGE(backend, fold_router, QwenFold);
  ADD_STAGE(backend, grid_gate_up, Qwen);
  ADD_STAGE(backend, grid_down, QwenDown);
  ADD_STAGE(backend, grid_head, Head);
  ADD_STAGE(backend, grid_project, Glm);
  ADD_STAGE(backend, grid_project, GlmQuery);
  ADD_STAGE(backend, grid_heads, GlmHeads);
  ADD_STAGE(backend, cluster_attention_mla, GlmAttention);
  ADD_STAGE(backend, grid_unembed, GlmUnembed);
  ADD_STAGE(backend, grid_linear_residual, GlmOut);
  ADD_STAGE(backend, grid_linear_residual, GlmOutDense);
  ADD_STAGE(backend, grid_linear_residual, GlmDense);
  ADD_STAGE(backend, grid_gate_up_dense, GlmDense);
  ADD_STAGE(backend, fold_router, GlmFold);
  ADD_STAGE(backend, grid_gate_up, Glm);
  ADD_STAGE(backend, grid_down, GlmDown);
}

mx::array in_fp32(const mx::array& a) {
  return mx::astype(a, mx::float32);
}
// The tensor walk's token, in the emulator.
mx::array tensor_logits(const moefuse::Plan& plan, emulated::Backend& backend,
                        const std::vector<moefuse::LayerCache>& caches, uint32_t token, int slot) {
  metal::Constants constants;
  moefuse::cuda::FoldedRouters routers(std::ref(backend));
  const std::vector<moefuse::StepRow> rows = {{token, 0, slot, 0, slot}};
  const auto ids = metal::tokens_of(rows), places = metal::places_of(rows, kSlots);
  const auto angles = metal::angles_of(rows, metal::rope_of(plan));
  const metal::WalkInputs inputs = {
      1, caches, mx::array(ids.begin(), {1}, mx::uint32),
      mx::array(places.begin(), {1, 4}, mx::uint32),
      mx::array(angles.begin(), {1, int(angles.size())}, mx::float32)};
  return in_fp32(moefuse::cuda::TensorWalk(plan, Accumulate::fp32_no_fma, constants, routers,
                                           inputs, std::ref(backend), 132, 1)
                     .walk());
}

void compare_tokens(const std::string& name) {
  const moefuse::Model model = moefuse::load_model(std::string(MODELS) + "/" + name);
  const moefuse::Plan plan = moefuse::make_plan(model);
  ASSERT_EQ(moefuse::cuda::tensor_refusal(plan), "");
  moefuse::Decoder cpu(model, Accumulate::fp32_no_fma);
  const auto empty = [&] {
    std::vector<moefuse::LayerCache> caches;
    const auto c = plan.cache;
    for (int i = 0; i < model.config.num_hidden_layers; ++i) {
      caches.push_back({mx::zeros({1, c.kv_heads, kSlots, c.key_dim}, mx::bfloat16),
                        mx::zeros({1, c.kv_heads, kSlots, c.value_dim}, mx::bfloat16)});
      mx::eval(caches.back().keys, caches.back().values);
    }
    return caches;
  };
  auto caches = empty(), cpu_caches = empty();
  emulated::Backend backend;
  add_kernels(backend);
  uint32_t token = 300;
  for (int slot = 0; slot < 2; ++slot) {
    backend.order = slot % 2 ? emulator::Order::shuffled : emulator::Order::forward;
    const mx::array got = tensor_logits(plan, backend, caches, token, slot);
    mx::array want = cpu.step({{token, 0, slot, 0, slot}}, cpu_caches);
    mx::array difference = mx::sqrt(mx::sum(mx::square(got - want)) / mx::sum(mx::square(want)));
    mx::eval(difference);
    // Queries go to the tensor cores as bfloat16, activations to a grid of 16 bits; the CPU's do
    // not.
    EXPECT_LT(difference.item<float>(), 0x1p-10) << slot;
    token = mx::argmax(want).item<uint32_t>();
  }
}

int argument(const metal::Call& call, const std::string& name) {
  const auto& names = call.kernel->template_names;
  const auto at = std::find(names.begin(), names.end(), name) - names.begin();
  return std::get<int>(call.args.at(at));
}

// Several rows' experts: all blocks run at once, every tile has a block, and each block the threads
// that finish its rows.
void expect_at_once(const moefuse::Model& model, int experts_width) {
  const moefuse::Plan plan = moefuse::make_plan(model);
  for (int rows = 2; rows <= 4; ++rows) {
    int seen = 0;
    for (const metal::Call& call : calls_of(plan, rows, 1)) {
      const bool down = call.kernel->name == "moefuse_grid_down";
      if (!down && call.kernel->name != "moefuse_grid_gate_up") continue;
      ++seen;
      const int tiles = argument(call, "TILES");
      const int tile_count = (down ? plan.config.hidden_size : experts_width) / 16;
      EXPECT_LE(call.groups.x * call.groups.y * call.groups.z, 132 * call.resident) << rows;
      EXPECT_EQ(call.groups.x, metal::blocks(tile_count, tiles)) << rows;
      EXPECT_EQ(down ? call.groups.y : call.groups.z, rows);
      EXPECT_GE(call.threads, down ? 64 * tiles : 256) << rows;
    }
    EXPECT_EQ(seen, 2) << rows;
  }
}

TEST(TensorWalk, SeveralRowsExpertsRunAtOnce) {
  expect_at_once(true_shapes::qwen().model, 768);
  expect_at_once(true_shapes::glm().model, 1536);
}

TEST(TensorWalk, SaysWhichRouterItDoesNotTake) {
  const moefuse::Model model = moefuse::load_model(std::string(MODELS) + "/qwen3-moe-tiny");
  moefuse::Plan plan = moefuse::make_plan(model);
  for (moefuse::Stage& stage : plan.stages)
    if (auto* router = std::get_if<moefuse::Router>(&stage.work); router && stage.layer == 2)
      router->experts = 12 * 8 + 1;  // 12 blocks of the output projection, 8 experts each
  EXPECT_EQ(moefuse::cuda::tensor_refusal(plan),
            "layers.2, router: more experts than the output projection's blocks take");
}
TEST(TensorWalk, QwenTokens) {
  compare_tokens("qwen3-moe-tiny");
}
TEST(TensorWalk, GlmTokens) {
  compare_tokens("glm4-moe-lite-tiny");
}

}  // namespace
