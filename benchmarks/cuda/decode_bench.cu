// Qwen3-30B-A3B's true geometry with random weights in MLX's layout: checks every stage against
// fp64, checks that neither the number of SMs nor the tokens of a launch change a bit, then times
// whole tokens and each stage. Speed does not depend on the values.
//   decode_bench [check|time|all] [contexts, e.g. 1024,16384]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>

#include "../../src/cuda/decode_step.h"
#include "../../tests/cuda/oracle.h"

namespace mc = moefuse::cuda;
using G = mc::Qwen3_30B_A3B;
using Step = mc::DecodeStep<G>;

namespace {

__host__ __device__ uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
__global__ void fill_words(uint32_t* p, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n;
       i += size_t{gridDim.x} * blockDim.x) {
    p[i] = mix(static_cast<uint32_t>(i) * 2654435761u ^ seed ^ mix(static_cast<uint32_t>(i >> 32)));
  }
}
// uniform in mean * (1 - spread) .. mean * (1 + spread), or around zero where mean is 0
__global__ void fill_values(uint16_t* p, size_t n, float mean, float spread, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n;
       i += size_t{gridDim.x} * blockDim.x) {
    const float u = (mix(static_cast<uint32_t>(i) ^ seed) >> 8) / 8388608.f - 1.f;
    const float v = mean != 0.f ? mean * (1.f + spread * u) : spread * u;
    p[i] = static_cast<uint16_t>((__float_as_uint(v) + 0x8000u) >> 16);
  }
}

struct Model {
  std::vector<void*> owned;
  mc::ModelPointers pointers;
  size_t bytes = 0;
  uint32_t seed = 1;

  template <class T>
  T* make(size_t n) {
    void* p = nullptr;
    mc::check(cudaMalloc(&p, n * sizeof(T)), "memory");
    owned.push_back(p), bytes += n * sizeof(T);
    return static_cast<T*>(p);
  }
  uint16_t* values(size_t n, float mean, float spread) {
    uint16_t* p = make<uint16_t>(n);
    fill_values<<<1024, 256>>>(p, n, mean, spread, mix(++seed));
    return p;
  }
  mc::Matrix matrix(size_t rows, int K, int bits, float scale) {
    const size_t words = rows * K * bits / 32, groups = rows * K / mc::kGroupSize;
    uint32_t* w = make<uint32_t>(words);
    fill_words<<<2048, 256>>>(w, words, mix(++seed));
    return {w, values(groups, scale, 0.25f),
            values(groups, -scale * (bits == 4 ? 7.5f : 127.5f), 0.05f)};
  }
  explicit Model(int layers, int stride) {
    const size_t kv_rows = G::kKvHeads * G::kHeadDim, cache = kv_rows * stride;
    const size_t expert_rows = static_cast<size_t>(G::kExperts) * G::kWidth;
    for (int i = 0; i < layers; ++i) {
      pointers.layers.push_back(
          {matrix(G::kContext, G::kHidden, 4, 0.005f), matrix(kv_rows, G::kHidden, 4, 0.005f),
           matrix(kv_rows, G::kHidden, 4, 0.005f), matrix(G::kHidden, G::kContext, 4, 0.01f),
           matrix(G::kExperts, G::kHidden, 8, 0.0005f), matrix(expert_rows, G::kHidden, 4, 0.005f),
           matrix(expert_rows, G::kHidden, 4, 0.005f),
           matrix(static_cast<size_t>(G::kExperts) * G::kHidden, G::kWidth, 4, 0.008f),
           values(G::kHidden, 1.f, 0.2f), values(G::kHidden, 1.f, 0.2f),
           values(G::kHeadDim, 1.3f, 0.3f), values(G::kHeadDim, 1.3f, 0.3f),
           values(cache, 0.f, 1.7f), values(cache, 0.f, 1.7f)});
    }
    pointers.embed = matrix(G::kVocab, G::kHidden, 4, 0.2f);
    pointers.lm_head = matrix(G::kVocab, G::kHidden, 4, 0.005f);
    pointers.final_norm = values(G::kHidden, 1.f, 0.2f);
    std::vector<float> rope(static_cast<size_t>(stride) * G::kHeadDim);
    for (size_t i = 0; i < rope.size() / 2; ++i) {
      const double a =
          static_cast<double>(i / 64) * std::pow(1e6, -static_cast<double>(i % 64) / 64);
      rope[2 * i] = static_cast<float>(std::cos(a)),
               rope[2 * i + 1] = static_cast<float>(std::sin(a));
    }
    float* table = make<float>(rope.size());
    mc::check(cudaMemcpy(table, rope.data(), rope.size() * 4, cudaMemcpyHostToDevice), "memory");
    pointers.rope = table, pointers.cache_stride = stride, pointers.eps = 1e-6f;
    mc::check(cudaDeviceSynchronize(), "fill");
  }
  ~Model() {
    for (void* p : owned) cudaFree(p);
  }
};

void fetch(void* to, const void* from, size_t bytes) {
  mc::check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "fetch");
}

// the first `layers` layers at `position`, the last of them stage by stage
bool check_stages(const Model& model, int layers, int position) {
  mc::ModelPointers some = model.pointers;
  some.layers.resize(layers);
  Step step(some);
  step.seek(position, 11, nullptr);
  step.run(1, nullptr);
  const int token = step.sampled(nullptr)[0];
  std::printf("layer %d of %d, %d cached tokens\n", layers - 1, layers, position);
  mc::oracle::Oracle o{fetch, step.params(), {}};
  mc::oracle::check_layer<G>(o, some.layers.back(), layers - 1, layers - 1, position);
  for (size_t row : {size_t{0}, size_t{75000}, size_t{G::kVocab - 256}}) {
    mc::oracle::check_logits<G>(o, layers, row, 256);
  }
  const auto logits = o.get<float>(step.logits(), G::kVocab);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  const bool ok = o.verdict.ok && best == token;
  std::printf("  greedy on the host %td, on the device %d -> %s\n", best, token,
              ok ? "ok" : "FAILED");
  return ok;
}

struct Trace {
  std::vector<int> tokens;
  std::vector<float> logits;
  bool operator==(const Trace& o) const {
    return tokens == o.tokens &&
           std::memcmp(logits.data(), o.logits.data(), logits.size() * sizeof(float)) == 0;
  }
};
Trace trace(const Model& model, int blocks, int tokens, int at_once, int position) {
  Step step(model.pointers, blocks);
  Trace t;
  step.seek(position, 11, nullptr);
  for (int i = 0; i < tokens; i += at_once) {
    step.run(at_once, nullptr);
    for (int token : step.sampled(nullptr)) t.tokens.push_back(token);
  }
  t.logits.resize(G::kVocab);
  fetch(t.logits.data(), step.logits(), t.logits.size() * sizeof(float));
  return t;
}

bool check_bits(const Model& model) {
  const Trace once = trace(model, 0, 16, 16, 1024), again = trace(model, 0, 16, 16, 1024);
  const Trace singly = trace(model, 0, 16, 1, 1024), fewer = trace(model, 128, 16, 8, 1024);
  const bool ok = once == again && once == singly && once == fewer;
  std::printf("16 tokens, again, one a launch, on 128 SMs: %s %s %s; tokens %d %d %d ... %d\n",
              once == again ? "same" : "DIFFERENT", once == singly ? "same" : "DIFFERENT",
              once == fewer ? "same" : "DIFFERENT", once.tokens[0], once.tokens[1], once.tokens[2],
              once.tokens[15]);
  return ok;
}

double median_ms(int repeats, const std::function<void()>& f) {
  cudaEvent_t a, b;
  mc::check(cudaEventCreate(&a), "time"), mc::check(cudaEventCreate(&b), "time");
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    mc::check(cudaEventRecord(a), "time");
    f();
    mc::check(cudaEventRecord(b), "time");
    mc::check(cudaEventSynchronize(b), "time");
    float ms = 0;
    mc::check(cudaEventElapsedTime(&ms, a, b), "time");
    if (i >= 2) times.push_back(ms);
  }
  cudaEventDestroy(a), cudaEventDestroy(b);
  std::sort(times.begin(), times.end());
  std::printf("  [%.4f .. %.4f]", times.front(), times.back());
  return times[times.size() / 2];
}

// bytes a token must read: dense, chosen experts, lm_head; and the cache
double weight_bytes_a_token(int layers) {
  const double bits = 4.5 / 8;
  const double layer = bits * (double{G::kQkvRows} * G::kHidden + double{G::kHidden} * G::kContext +
                               3.0 * G::kTopK * G::kWidth * G::kHidden) +
                       8.5 / 8 * G::kExperts * G::kHidden;
  return layers * layer + bits * G::kVocab * G::kHidden;
}

void time_tokens(const Model& model, int blocks, int position, int at_once) {
  Step step(model.pointers, blocks);
  const int layers = static_cast<int>(model.pointers.layers.size());
  auto run = [&] {
    step.seek(position, 11, nullptr);
    step.run(at_once, nullptr);
  };
  const double ms = median_ms(9, run) / at_once;
  const double bytes = weight_bytes_a_token(layers) +
                       layers * 2.0 * G::kKvHeads * G::kHeadDim * 2 * (position + at_once / 2.0);
  std::printf(
      " ms a launch; context %d, %d SMs, %d a launch: %.4f ms a token, %.1f tok/s, %.0f GB/s\n",
      position, step.params().blocks, at_once, ms, 1e3 / ms, bytes / ms / 1e6);
}

void time_stages(const Model& model, int position) {
  Step step(model.pointers);
  const int layers = static_cast<int>(model.pointers.layers.size()), tokens = 16;
  step.timeline();
  const double ms = median_ms(5,
                              [&] {
                                step.timeline();
                                step.seek(position, 11, nullptr);
                                step.run(tokens, nullptr);
                              }) /
                    tokens;
  const auto cycles = step.timeline();
  double all = 0;
  for (long long c : cycles) all += static_cast<double>(c);
  std::printf(
      "\nstages of block 0 at context %d, us a layer (lm_head and embed: a token), scaled to %.4f "
      "ms\n",
      position, ms);
  for (int s = 0; s < mc::kStages; ++s) {
    double us[mc::kParts], sum = 0;
    const double unit = ms * 1e3 / all / (s < mc::kLmHead ? layers : 1);
    for (int i = 0; i < mc::kParts; ++i) sum += us[i] = cycles[s * mc::kParts + i] * unit;
    std::printf("  %-18s %7.2f   input %5.2f weights %5.2f products %5.2f end %5.2f\n",
                mc::kStageNames[s], sum, us[0], us[1], us[2], us[3]);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string mode = argc > 1 ? argv[1] : "all";
  cudaDeviceProp device;
  mc::check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d SMs, %zu MB of L2\n", device.name, device.multiProcessorCount,
              static_cast<size_t>(device.l2CacheSize) >> 20);
  const int longest = argc > 2 ? std::atoi(argv[2]) : 1024;
  const Model model(48, longest + 64 < 1600 ? 1600 : longest + 64);
  std::printf("%.2f GB resident, %.4f GB of weights a token\n", model.bytes / 1e9,
              weight_bytes_a_token(48) / 1e9);
  bool ok = true;
  if (mode != "time") {
    for (auto [layers, position] : {std::pair{1, 0}, {1, 1024}, {2, 1500}, {48, 1024}}) {
      ok = check_stages(model, layers, position) && ok;
    }
    ok = check_bits(model) && ok;
    std::printf(ok ? "ALL CHECKS PASS\n" : "CHECKS FAILED\n");
  }
  std::fflush(stdout);
  if (mode != "check") {
    for (int i = 0; i < 2; ++i) {
      time_tokens(model, 0, 1024, 32);
      time_tokens(model, 128, 1024, 32);
    }
    time_tokens(model, 0, 1024, 1);
    if (longest > 1024) time_tokens(model, 0, longest, 32);
    time_stages(model, 1024);
  }
  return ok ? 0 : 1;
} catch (const std::exception& e) {
  std::printf("%s\n", e.what());
  return 1;
}
