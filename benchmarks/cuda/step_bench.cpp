// The decode step on a CUDA device at true geometry with random weights: compared with the CPU's
// executor on the first layers, its bits under batch, graph and overlap, one long generation with
// and without overlap, then tokens a second and each kernel. Speed does not depend on the values.
// Tokens are chosen in the graph; apart: by MLX's graph, from logits, as under mlx-lm.
//   step_bench qwen|glm [check] [time] [apart] [long=N] [layers=N] [context=N,N] [rows=N,N]
//              [tokens=N]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/mlx.h"
#include "moefuse/decoder.h"
#include "moefuse/ops.h"

namespace mx = mlx::core;
using moefuse::Accumulate;
using Clock = std::chrono::steady_clock;

namespace {

struct Options {
  std::string family;
  bool check = false, time = false, apart = false;
  int layers = 0, tokens = 200, generation = 0;
  std::vector<int> contexts = {1024}, rows = {1};
};

std::vector<int> numbers(const std::string& list) {
  std::vector<int> out;
  std::stringstream in(list);
  for (std::string item; std::getline(in, item, ',');) out.push_back(std::stoi(item));
  return out;
}

// Random weights by mlx-lm's names, in bfloat16 with 4-bit matrices in groups of 64. `gain` is the
// root mean square of a product with a vector of ones' size.
class RandomModel {
 public:
  RandomModel(const std::string& config, int layers) : model{moefuse::parse_config(config), {}} {
    model.config.num_hidden_layers = layers;
    model.config.sparse.resize(layers);
  }
  void quantized(const std::string& name, int count, int rows, int cols, float gain = 1.0f,
                 int bits = 4) {
    const int top = (1 << bits) - 1;
    const float scale = gain / (top / std::sqrt(12.0f) * std::sqrt(float(cols)));
    mx::Shape words = {count, rows, cols * bits / 32}, groups = {count, rows, cols / 64};
    if (count == 1) words.erase(words.begin()), groups.erase(groups.begin());
    put(name + ".weight", mx::random::bits(words, 4, next_key()));
    const mx::array spread = mx::random::uniform(0.75f, 1.25f, groups, mx::float32, next_key());
    put(name + ".scales", mx::astype(spread * scale, mx::bfloat16));
    put(name + ".biases", mx::astype(spread * (-scale * top / 2), mx::bfloat16));
  }
  void norm(const std::string& name, int width) {
    put(name + ".weight",
        mx::astype(mx::random::uniform(0.8f, 1.2f, {width}, mx::float32, next_key()),
                   mx::bfloat16));
  }
  void put(const std::string& name, mx::array a) {
    mx::eval(a);
    model.weights.insert_or_assign(name, a);
  }
  mx::array next_key() { return mx::random::key(++seed_); }
  moefuse::Model model;

 private:
  uint64_t seed_ = 0;
};

RandomModel qwen(int layers) {
  RandomModel m(R"({"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "vocab_size": 151936, "max_position_embeddings": 40960, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "norm_topk_prob": true})",
                layers);
  m.quantized("model.embed_tokens", 1, 151936, 2048, 40.0f);
  m.quantized("lm_head", 1, 151936, 2048, 3.0f);
  m.norm("model.norm", 2048);
  for (int i = 0; i < layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", a = layer + "self_attn.";
    m.norm(layer + "input_layernorm", 2048);
    m.norm(layer + "post_attention_layernorm", 2048);
    m.norm(a + "q_norm", 128);
    m.norm(a + "k_norm", 128);
    m.quantized(a + "q_proj", 1, 4096, 2048);
    m.quantized(a + "k_proj", 1, 512, 2048);
    m.quantized(a + "v_proj", 1, 512, 2048);
    m.quantized(a + "o_proj", 1, 2048, 4096, 0.5f);
    m.quantized(layer + "mlp.gate", 1, 128, 2048, 2.0f, 8);
    m.quantized(layer + "mlp.switch_mlp.gate_proj", 128, 768, 2048);
    m.quantized(layer + "mlp.switch_mlp.up_proj", 128, 768, 2048);
    m.quantized(layer + "mlp.switch_mlp.down_proj", 128, 2048, 768);
  }
  return m;
}

RandomModel glm(int layers) {
  RandomModel m(R"({"model_type": "glm4_moe_lite", "hidden_size": 2048, "num_hidden_layers": 47,
    "vocab_size": 154880, "max_position_embeddings": 202752, "num_attention_heads": 20,
    "intermediate_size": 10240, "moe_intermediate_size": 1536, "n_routed_experts": 64,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "norm_topk_prob": true,
    "routed_scaling_factor": 1.8})",
                layers);
  m.quantized("model.embed_tokens", 1, 154880, 2048, 40.0f);
  m.quantized("lm_head", 1, 154880, 2048, 3.0f);
  m.norm("model.norm", 2048);
  for (int i = 0; i < layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", a = layer + "self_attn.";
    m.norm(layer + "input_layernorm", 2048);
    m.norm(layer + "post_attention_layernorm", 2048);
    m.norm(a + "q_a_layernorm", 768);
    m.norm(a + "kv_a_layernorm", 512);
    m.quantized(a + "q_a_proj", 1, 768, 2048);
    m.quantized(a + "q_b_proj", 1, 5120, 768);
    m.quantized(a + "kv_a_proj_with_mqa", 1, 576, 2048);
    m.quantized(a + "embed_q", 20, 512, 192);
    m.quantized(a + "unembed_out", 20, 256, 512);
    m.quantized(a + "o_proj", 1, 2048, 5120, 0.5f);
    const std::string mlp = layer + "mlp.";
    const auto part = [&](const std::string& to, int count, int width) {
      m.quantized(to + "gate_proj", count, width, 2048);
      m.quantized(to + "up_proj", count, width, 2048);
      m.quantized(to + "down_proj", count, 2048, width);
    };
    if (i == 0) {
      part(mlp, 1, 10240);
      continue;
    }
    m.put(mlp + "gate.weight",
          mx::astype(mx::random::normal({64, 2048}, mx::float32, 0.0f, 0.05f, m.next_key()),
                     mx::bfloat16));
    m.put(mlp + "gate.e_score_correction_bias",
          mx::random::uniform(-0.1f, 0.1f, {64}, mx::float32, m.next_key()));
    part(mlp + "switch_mlp.", 64, 1536);
    part(mlp + "shared_experts.", 1, 1536);
  }
  return m;
}

std::vector<moefuse::LayerCache> caches_of(const moefuse::Decoder& decoder, int rows, int slots,
                                           mx::Device where) {
  std::vector<moefuse::LayerCache> caches;
  const auto c = decoder.cache_shape();
  uint64_t seed = 1000;
  const auto fill = [&](int dim) {
    const mx::array one =
        mx::astype(mx::random::normal({1, c.kv_heads, slots, dim}, mx::float32, 0.0f, 1.0f,
                                      mx::random::key(++seed), mx::Device::gpu),
                   decoder.dtype(), mx::Device::gpu);
    return mx::contiguous(mx::repeat(one, rows, 0, mx::Device::gpu), false, mx::Device::gpu);
  };
  for (int i = 0; i < decoder.config().num_hidden_layers; ++i) {
    caches.push_back({fill(c.key_dim), fill(c.value_dim)});
    mx::eval(caches.back().keys, caches.back().values);
    if (where == mx::Device::cpu) {  // memory of the host's own
      for (mx::array* a : {&caches.back().keys, &caches.back().values}) {
        *a = mx::copy(*a, mx::Device::cpu);
        a->eval();
      }
    }
  }
  return caches;
}

std::vector<float> values(const mx::array& a) {
  mx::array f = mx::contiguous(mx::astype(a, mx::float32, mx::Device::gpu), false, mx::Device::gpu);
  f.eval();
  mx::synchronize(mx::default_stream(mx::Device::gpu));
  return {f.data<float>(), f.data<float>() + f.size()};
}

double relative(const std::vector<float>& got, const std::vector<float>& want) {
  double top = 0, sum = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    top += std::pow(double(got[i]) - want[i], 2);
    sum += std::pow(double(want[i]), 2);
  }
  return std::sqrt(top / sum);
}

constexpr int kSlots = 17000;  // of the caches that check() fills

// Neighbours of row 0 are half as far, much further, and at the next slot.
std::vector<moefuse::StepRow> rows_at(int rows, int slot) {
  const int slots[] = {slot, slot / 2, std::min(slot + 3000, kSlots - 1), slot + 1};
  std::vector<moefuse::StepRow> list;
  for (int r = 0; r < rows; ++r)
    list.push_back({uint32_t(1000 + 77 * r + slot), r, slots[r], 0, slots[r]});
  return list;
}

// The tensor walk's fp32 activations differ from the CPU's by queries in bfloat16; the shared texts
// round each of two layers' stages to it, and an expert may change (0.034 was seen).
constexpr double kNear = 0x1p-8, kNearShared = 0.1;

using Logits = std::vector<std::vector<float>>;

// Steps from each of `starts` (slots), two tokens each: logits.
Logits trace(const RandomModel& m, int rows, const std::vector<int>& starts) {
  moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
  auto caches = caches_of(decoder, rows, kSlots, mx::Device::gpu);
  Logits out;
  for (int start : starts)
    for (int i = 0; i < 2; ++i)
      out.push_back(values(decoder.step(rows_at(rows, start + i), caches)));
  return out;
}

// One graph for two generations in turns, each with caches of its own.
bool check_new_caches(const Options& o, const RandomModel& m) {
  moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
  auto one = caches_of(decoder, 1, 2048, mx::Device::gpu);
  std::vector<moefuse::LayerCache> longer;
  for (const moefuse::LayerCache& c : one) {
    const auto more = [](const mx::array& a) {
      return mx::pad(a, {{0, 0}, {0, 0}, {0, 256}, {0, 0}}, mx::array(0, a.dtype()));
    };
    longer.push_back({more(c.keys), more(c.values)});
    mx::eval(longer.back().keys, longer.back().values);
  }
  const auto step = [&](std::vector<moefuse::LayerCache>& caches, int slot) {
    return values(decoder.step(rows_at(1, slot), caches));
  };
  Logits in_one, in_longer;
  for (int slot = 1000; slot < 1003; ++slot) {
    in_one.push_back(step(one, slot));
    in_longer.push_back(step(longer, slot));
  }
  const bool same = in_one == in_longer;
  std::printf("%s: the same bits in longer caches, step by step in turns: %s\n", o.family.c_str(),
              same ? "yes" : "NO");
  return same;
}

// Logits that a caller keeps are still those of their own step when more have come than the step
// has arrays for.
bool check_kept_logits(const Options& o, const RandomModel& m) {
  std::vector<mx::array> kept;
  Logits at_once, later;
  for (const bool keep : {false, true}) {
    moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
    auto caches = caches_of(decoder, 1, 2048, mx::Device::gpu);
    for (int slot = 1000; slot < 1012; ++slot) {
      mx::array logits = decoder.step(rows_at(1, slot), caches);
      if (keep)
        kept.push_back(logits);
      else
        at_once.push_back(values(logits));
    }
  }
  for (const mx::array& logits : kept) later.push_back(values(logits));
  const bool same = at_once == later;
  std::printf("%s: logits kept for twelve steps are those of each: %s\n", o.family.c_str(),
              same ? "yes" : "NO");
  return same;
}

// Greedy tokens as MLX's, in bfloat16 among many equal ones, with what is not a number too.
bool check_sampling(const Options& o) {
  bool same = true;
  for (const mx::Dtype dtype : {mx::float32, mx::bfloat16, mx::float16})
    for (const int n : {1, 151936, 154880, 70001}) {
      mx::array x = mx::astype(mx::random::uniform(-9.0f, 9.0f, {4, n}), dtype);
      const mx::array odd = mx::astype(mx::greater(x, mx::array(8.5f, dtype)), mx::bool_);
      x = mx::concatenate({x, mx::where(odd, mx::array(NAN, dtype), x)}, 0);
      const mx::array equal = mx::all(mx::equal(moefuse::sample_greedy(x), mx::argmax(x, -1)));
      same = mx::array(equal).item<bool>() && same;
    }
  std::printf("%s: greedy tokens are those of MLX's argmax: %s\n", o.family.c_str(),
              same ? "yes" : "NO");
  return same;
}

bool check(const Options& o, RandomModel& m) {
  const std::vector<int> starts = {3, 40, 1023, 2500, 8700, 16500};
  const Logits tensor = trace(m, 1, starts);
  const auto again = trace(m, 1, starts);
  setenv("MOEFUSE_CUDA_OVERLAP", "0", 1);
  const auto plain = trace(m, 1, starts);
  unsetenv("MOEFUSE_CUDA_OVERLAP");
  setenv("MOEFUSE_CUDA_TENSOR", "0", 1);
  const Logits shared = trace(m, 1, starts);
  unsetenv("MOEFUSE_CUDA_TENSOR");
  std::printf("%s: same bits again: %s, without overlap: %s\n", o.family.c_str(),
              tensor == again ? "yes" : "NO", tensor == plain ? "yes" : "NO");
  bool passed = tensor == again && tensor == plain;
  passed = check_new_caches(o, m) && passed;
  passed = check_kept_logits(o, m) && passed;
  passed = check_sampling(o) && passed;
  const size_t vocab = tensor[0].size();
  for (int rows : {2, 4}) {
    const Logits many = trace(m, rows, starts);
    bool same = true;
    for (size_t i = 0; i < tensor.size(); ++i)
      same = same && std::memcmp(many[i].data(), tensor[i].data(), vocab * 4) == 0;
    std::printf("%s: row 0 of %d has the bits that it has alone: %s\n", o.family.c_str(), rows,
                same ? "yes" : "NO");
    passed = passed && same;
  }
  std::fflush(stdout);
  mx::set_default_device(mx::Device::cpu);
  moefuse::Decoder cpu(m.model, Accumulate::fp32_no_fma);
  auto caches = caches_of(cpu, 1, kSlots, mx::Device::cpu);
  size_t at = 0;
  for (int start : starts)
    for (int i = 0; i < 2; ++i, ++at) {
      mx::array logits = cpu.step(rows_at(1, start + i), caches);
      const std::vector<float> want(logits.data<float>(), logits.data<float>() + vocab);
      const double off = relative(tensor[at], want), shared_off = relative(shared[at], want);
      std::printf("%s slot %d: off the CPU's fp32 by %.5f (tensor walk), %.5f (shared texts)\n",
                  o.family.c_str(), start + i, off, shared_off);
      passed = passed && off < kNear && shared_off < kNearShared;  // false for NaN too
    }
  mx::set_default_device(mx::Device::gpu);
  return passed;
}

// Greedy tokens from an empty cache on, each fed to the next step without the host in between.
// apart: chosen by MLX's graph.
std::vector<uint32_t> generation(const RandomModel& m, int count, bool apart = false) {
  moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
  auto caches = caches_of(decoder, 1, count, mx::Device::gpu);
  std::vector<mx::array> tokens = {mx::full({1}, 5, mx::uint32)};
  for (int slot = 0; slot < count; ++slot) {
    const std::vector<moefuse::StepRow> row = {{0, 0, slot, 0, slot}};
    tokens.push_back(apart ? moefuse::sample_greedy(decoder.step(row, caches, tokens.back()))
                           : decoder.greedy(row, caches, tokens.back()));
    if (apart || slot % 100 == 99) mx::async_eval(tokens.back());
  }
  mx::array all = mx::concatenate(tokens, 0);
  all.eval();
  mx::synchronize(mx::default_stream(mx::Device::gpu));
  return {all.data<uint32_t>(), all.data<uint32_t>() + all.size()};
}

// Several rows' tokens, read before the next ones and left on their way.
bool check_greedy(const Options& o, const RandomModel& m) {
  bool same = generation(m, 300) == generation(m, 300, true);
  for (int rows : {1, 3}) {
    moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
    auto caches = caches_of(decoder, rows, 2100, mx::Device::gpu);
    std::vector<mx::array> left;
    for (int slot = 2000; slot < 2090; ++slot) {  // a stretch begins in between
      std::vector<moefuse::StepRow> list;
      for (int r = 0; r < rows; ++r) list.push_back({uint32_t(7 * slot + r), r, slot, 0, slot});
      left.push_back(decoder.greedy(list, caches));
      const mx::array want = mx::argmax(decoder.step(list, caches), -1);
      same = mx::array_equal(want, decoder.greedy(list, caches)).item<bool>() && same;
      if (slot % 7 == 0) same = mx::array_equal(want, left.back()).item<bool>() && same;
      left.push_back(want);
    }
    for (size_t i = 0; i < left.size(); i += 2)
      same = mx::array_equal(left[i], left[i + 1]).item<bool>() && same;
  }
  std::printf("%s: tokens chosen in the graph are those of its logits: %s\n", o.family.c_str(),
              same ? "yes" : "NO");
  return same;
}

bool check_generation(const Options& o, const RandomModel& m) {
  const auto tokens = generation(m, o.generation), again = generation(m, o.generation);
  setenv("MOEFUSE_CUDA_OVERLAP", "0", 1);
  const auto plain = generation(m, o.generation);
  unsetenv("MOEFUSE_CUDA_OVERLAP");
  const std::set<uint32_t> different(tokens.begin(), tokens.end());
  std::printf(
      "%s: %d tokens in one generation (%zu different ones), the same again: %s, without overlap: "
      "%s\n",
      o.family.c_str(), o.generation, different.size(), tokens == again ? "yes" : "NO",
      tokens == plain ? "yes" : "NO");
  std::fflush(stdout);
  return tokens == again && tokens == plain;
}

void time_tokens(const Options& o, RandomModel& m, int context, int rows) {
  moefuse::Decoder decoder(m.model, Accumulate::fp32_no_fma);
  auto caches = caches_of(decoder, rows, context + 32 + 2 * o.tokens + 256, mx::Device::gpu);
  int slot = context;
  // Several rows would say the same from the same token on, and have the same experts: theirs are
  // drawn.
  std::mt19937 draw(0);
  const auto next_token = [&] { return uint32_t(draw() % 150000); };
  mx::array token = mx::full({1}, 5, mx::uint32);
  const auto run = [&](int count) {
    for (int i = 0; i < count; ++i, ++slot) {
      std::vector<moefuse::StepRow> list;
      for (int r = 0; r < rows; ++r) list.push_back({next_token(), r, slot, 0, slot});
      std::optional<mx::array> given;
      if (rows == 1) given = token;
      token = o.apart ? moefuse::sample_greedy(decoder.step(list, caches, given))
                      : decoder.greedy(list, caches, given);
      if (o.apart || i % 8 == 7) mx::async_eval(token);
    }
    token.eval();
    mx::synchronize(mx::default_stream(mx::Device::gpu));
  };
  run(32);
  std::vector<double> rates;
  for (int i = 0; i < 3; ++i) {
    const auto start = Clock::now();
    slot = context;
    run(o.tokens);
    rates.push_back(o.tokens / std::chrono::duration<double>(Clock::now() - start).count());
  }
  std::sort(rates.begin(), rates.end());
  std::printf(
      "%s %d layers context %d rows %d%s: %.1f steps/s (%.1f to %.1f), %.1f tok/s, peak %.2f GB\n",
      o.family.c_str(), m.model.config.num_hidden_layers, context, rows,
      o.apart ? ", sampled apart" : "", rates[1], rates[0], rates[2], rates[1] * rows,
      mx::get_peak_memory() / 1e9);
  std::fflush(stdout);
  if (context != o.contexts[0]) return;
  for (const char* what : {"first", "second"}) {  // caches anew
    caches = caches_of(decoder, rows, context + 32 + 2 * o.tokens + 512, mx::Device::gpu);
    const auto start = Clock::now();
    slot = context;
    run(1);
    std::printf("  the first token in the %s new caches: %.2f ms\n", what,
                1e3 * std::chrono::duration<double>(Clock::now() - start).count());
  }
  double total = 0;
  for (const auto& [name, times] : decoder.kernel_times(rows)) {
    std::printf("  %-44s %4d x %7.2f us\n", name.c_str(), times.first, times.second);
    total += times.first * times.second;
  }
  std::printf("  kernels alone %.1f us, a token %.1f us\n", total, 1e6 / rates[1]);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i], value = arg.substr(arg.find('=') + 1);
    if (arg == "check")
      o.check = true;
    else if (arg == "time")
      o.time = true;
    else if (arg == "apart")
      o.apart = true;
    else if (arg.rfind("layers=", 0) == 0)
      o.layers = std::stoi(value);
    else if (arg.rfind("long=", 0) == 0)
      o.generation = std::stoi(value);
    else if (arg.rfind("tokens=", 0) == 0)
      o.tokens = std::stoi(value);
    else if (arg.rfind("context=", 0) == 0)
      o.contexts = numbers(value);
    else if (arg.rfind("rows=", 0) == 0)
      o.rows = numbers(value);
    else
      o.family = arg;
  }
  if (!mx::cu::is_available()) {
    std::printf("skipped: MLX has no CUDA device here\n");
    return 77;
  }
  if (o.family != "qwen" && o.family != "glm") {
    std::fprintf(stderr, "step_bench: family: expected qwen or glm, got '%s'\n", o.family.c_str());
    return 2;
  }
  mx::set_default_device(mx::Device::gpu);
  const bool is_qwen = o.family == "qwen";
  const int layers = o.layers ? o.layers : (is_qwen ? 48 : 47);
  try {
    RandomModel m = is_qwen ? qwen(layers) : glm(layers);
    std::printf("%s, %d layers: %.2f GB\n", o.family.c_str(), layers,
                mx::get_active_memory() / 1e9);
    std::fflush(stdout);
    bool passed = !o.check || (check(o, m) && check_greedy(o, m));
    if (o.generation) passed = check_generation(o, m) && passed;
    if (o.time)
      for (int rows : o.rows)
        for (int context : o.contexts) time_tokens(o, m, context, rows);
    return passed ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "step_bench: %s\n", e.what());
    return 1;
  }
}
