// CUDA's own kernel texts in the emulator, through the committed checkpoints: whole tokens by the
// walk that an H100 takes, beside the CPU's executor with fp32 activations. The attention's kernels
// need clusters or matrix products of halves: the host computes them here, a GPU in run_on_gpu.sh.
#include "tensor_kernels.h"
// The texts come first.
#include <gtest/gtest.h>

#include <cmath>

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
  static constexpr int ROWS = 1, BITS = 4, GROUP = 64, H = 192, STRIDE = 192, D = 192, N = 192;
  static constexpr int V = 2048, I = 64, COMBINE = 1, TILES = 1, DEPTH = 1, WARPS = 1;
  static constexpr bool NORM = true, SOFTMAX = true, SHARED = false;
};
struct Head : Common {
  static constexpr int N = 2048;
};
struct Qwen : Common {
  static constexpr int DEPTH = 4, NQ = 256, NK = 128, NV = 128, E = 40, K = 8;
};
struct QwenOut : Common {
  static constexpr int HEADS = 4, D = 64, SPLITS = 4;
};
struct Glm : Common {
  static constexpr int DEPTH = 4, NQ = 128, NK = 160, NV = 0, E = 48, K = 4;
  static constexpr bool SOFTMAX = false, SHARED = true;
};
struct GlmQuery : Common {
  static constexpr int H = 128, STRIDE = 288, NQ = 384, NK = 0, NV = 0;
};
struct GlmHeads : Common {
  static constexpr int HEADS = 4, X_HEAD = 96, PART = 64, N = 128;
};
struct GlmUnembed : Common {
  static constexpr int HEADS = 4, LORA = 128, V = 64, SPLITS = 64;
};
struct GlmOut : Common {
  static constexpr int COLS = 256;
};
struct GlmDense : Common {
  static constexpr int I = 512, COLS = 512;
};

const kernels::Sizes kSizes = {.rows = 1, .capacity = kSlots, .batches = 0, .sequences = 1};
#define ADD_STAGE(backend, name, params) \
  backend.add(#name, emulated::match_##name<params>, emulated::run_##name<params>, kSizes)

void add_kernels(emulated::Backend& backend) {
  ADD_STAGE(backend, embed, Common);
  ADD_STAGE(backend, grid_project, Qwen);
  ADD_STAGE(backend, grid_attention_out, QwenOut);
  ADD_STAGE(backend, grid_router, Qwen);
  ADD_STAGE(backend, grid_gate_up, Qwen);
  ADD_STAGE(backend, grid_down, Qwen);
  ADD_STAGE(backend, grid_head, Head);
  ADD_STAGE(backend, grid_project, Glm);
  ADD_STAGE(backend, grid_project, GlmQuery);
  ADD_STAGE(backend, grid_heads, GlmHeads);
  ADD_STAGE(backend, grid_unembed, GlmUnembed);
  ADD_STAGE(backend, grid_linear_residual, GlmOut);
  ADD_STAGE(backend, grid_linear_residual, GlmDense);
  ADD_STAGE(backend, grid_gate_up_dense, GlmDense);
  ADD_STAGE(backend, grid_router_dense, Glm);
  ADD_STAGE(backend, grid_gate_up, Glm);
  ADD_STAGE(backend, grid_down, Glm);
}

mx::array in_fp32(const mx::array& a) {
  return mx::astype(a, mx::float32);
}
// RMS norm of the last dimension.
mx::array norm(const mx::array& x, const mx::array& weight, const mx::array& eps) {
  const mx::array scale = mx::rsqrt(mx::mean(mx::square(x), -1, true) + mx::take(eps, 0));
  return x * scale * in_fp32(weight);
}
// angles: (cos, sin) pairs; halves: element i pairs with i + half, else with its neighbour.
mx::array rotate(const mx::array& x, const mx::array& angles, bool halves) {
  const int n = x.shape(-1);
  const mx::array pairs = mx::reshape(angles, {n / 2, 2});
  const mx::array c = mx::take(pairs, 0, 1), s = mx::take(pairs, 1, 1);
  const mx::array grid = mx::reshape(x, halves ? mx::Shape{-1, 2, n / 2} : mx::Shape{-1, n / 2, 2});
  const int axis = halves ? 1 : 2;
  const mx::array a = mx::take(grid, 0, axis), b = mx::take(grid, 1, axis);
  return mx::reshape(mx::stack({a * c - b * s, b * c + a * s}, axis), x.shape());
}

// One stretch holds it all: stats of the others stay as they are.
std::vector<mx::array> one_stretch(const mx::array& out, const metal::Call& call) {
  mx::array partial = mx::zeros(call.shapes[0], mx::float32);
  partial = mx::slice_update(partial, mx::reshape(out, {1, out.shape(0), 1, out.shape(1)}),
                             mx::Shape{0, 0, 0, 0}, mx::Shape{1, out.shape(0), 1, out.shape(1)});
  return {partial, mx::ones(call.shapes[1], mx::float32)};
}
// q [heads, dim], keys and values [positions, dim].
mx::array attend(const mx::array& q, const mx::array& keys, const mx::array& values) {
  return mx::matmul(mx::softmax(mx::matmul(q, mx::transpose(keys)), -1, true), values);
}
void write(const mx::array& cache, int at, const mx::array& row) {
  const mx::array values = mx::contiguous(mx::astype(row, mx::bfloat16));
  mx::eval(values);
  std::memcpy(const_cast<bfloat16_t*>(cache.data<bfloat16_t>()) + size_t(at) * values.size(),
              values.data<bfloat16_t>(), values.nbytes());
}

std::vector<mx::array> attention_gqa(const metal::Call& call) {
  const int heads = std::get<int>(call.args[1]), kv_heads = std::get<int>(call.args[2]);
  const int dim = std::get<int>(call.args[3]), per = heads / kv_heads;
  const auto& in = call.inputs;
  const mx::array all = mx::reshape(in_fp32(in[0]), {heads + 2 * kv_heads, dim});
  const auto part = [&](int from, int to) { return mx::slice(all, {from, 0}, {to, dim}); };
  const mx::array q = rotate(norm(part(0, heads), in[1], in[3]), in[5], true);
  const mx::array k = rotate(norm(part(heads, heads + kv_heads), in[2], in[3]), in[5], true);
  mx::eval(in[6]);
  const int slot = int(in[6].data<uint32_t>()[2]);
  std::vector<mx::array> outs;
  for (int h = 0; h < kv_heads; ++h) {
    write(in[7], h * kSlots + slot, mx::slice(k, {h, 0}, {h + 1, dim}));
    write(in[8], h * kSlots + slot, part(heads + kv_heads + h, heads + kv_heads + h + 1));
    const auto cached = [&](const mx::array& cache) {
      return mx::reshape(in_fp32(mx::slice(cache, {0, h, 0, 0}, {1, h + 1, slot + 1, dim})),
                         {slot + 1, dim});
    };
    outs.push_back(attend(mx::slice(q, {h * per, 0}, {h * per + per, dim}) * mx::take(in[4], 0),
                          cached(in[7]), cached(in[8])));
  }
  return one_stretch(mx::concatenate(outs, 0), call);
}

std::vector<mx::array> attention_mla(const metal::Call& call) {
  const int heads = std::get<int>(call.args[1]), nope = std::get<int>(call.args[2]);
  const int rope = std::get<int>(call.args[3]), latent = std::get<int>(call.args[4]);
  const int offset = std::get<int>(call.args[7]);
  const auto& in = call.inputs;
  const mx::array q = mx::reshape(in_fp32(in[1]), {heads, nope + rope});
  const mx::array q_rope = rotate(mx::slice(q, {0, nope}, {heads, nope + rope}), in[6], false);
  const mx::array queries =
      mx::concatenate({mx::reshape(in_fp32(in[0]), {heads, latent}), q_rope}, 1);
  const mx::array kv = mx::reshape(in_fp32(in[2]), {1, -1});
  const mx::array newest = norm(mx::slice(kv, {0, offset}, {1, offset + latent}), in[3], in[4]);
  const mx::array key = mx::slice(kv, {0, offset + latent}, {1, offset + latent + rope});
  mx::eval(in[7]);
  const int slot = int(in[7].data<uint32_t>()[2]);
  write(in[8], slot, newest);
  write(in[9], slot, rotate(key, in[6], false));
  const auto cached = [&](const mx::array& cache, int dim) {
    return mx::reshape(in_fp32(mx::slice(cache, {0, 0, 0, 0}, {1, 1, slot + 1, dim})),
                       {slot + 1, dim});
  };
  const mx::array latents = cached(in[8], latent);
  const mx::array keys = mx::concatenate({latents, cached(in[9], rope)}, 1);
  return one_stretch(attend(queries * mx::take(in[5], 0), keys, latents), call);
}

// The tensor walk's token, in the emulator.
mx::array tensor_logits(const moefuse::Plan& plan, emulated::Backend& backend,
                        const std::vector<moefuse::LayerCache>& caches, uint32_t token, int slot) {
  metal::Constants constants;
  const std::vector<moefuse::StepRow> rows = {{token, 0, slot, 0, slot}};
  const auto ids = metal::tokens_of(rows), places = metal::places_of(rows, kSlots);
  const auto angles = metal::angles_of(rows, metal::rope_of(plan));
  const metal::WalkInputs inputs = {
      1, caches, mx::array(ids.begin(), {1}, mx::uint32),
      mx::array(places.begin(), {1, 4}, mx::uint32),
      mx::array(angles.begin(), {1, int(angles.size())}, mx::float32)};
  const auto launch = [&](const metal::Call& call) {
    auto out = call.kernel->name == "moefuse_cluster_attention_gqa"  ? attention_gqa(call)
               : call.kernel->name == "moefuse_staged_attention_mla" ? attention_mla(call)
                                                                     : backend(call);
    mx::eval(out);
    return out;
  };
  return in_fp32(
      moefuse::cuda::TensorWalk(plan, Accumulate::fp32_no_fma, constants, inputs, launch, 132, 4)
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
    EXPECT_LT(difference.item<float>(), 0x1p-5) << slot;
    token = mx::argmax(want).item<uint32_t>();
  }
}

TEST(TensorWalk, QwenTokens) {
  compare_tokens("qwen3-moe-tiny");
}
TEST(TensorWalk, GlmTokens) {
  compare_tokens("glm4-moe-lite-tiny");
}

}  // namespace
