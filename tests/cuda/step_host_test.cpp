// The persistent kernel's text on the host: a tiny geometry, every stage against fp64 inside a
// computed bound, the same bits for every number of SMs and tokens a launch.
#define MOEFUSE_CUDA_HOST
#include "../../src/cuda/step_kernel.cuh"

#include <random>

#include "../../src/cuda/layout.h"
#include "oracle.h"

namespace mc = moefuse::cuda;
using G = mc::TinyMoe;

namespace {

struct Model {
  std::mt19937 random{7};
  std::vector<std::unique_ptr<std::vector<uint32_t>>> arrays;
  std::vector<mc::Layer> layers;
  std::vector<float> rope, logits = std::vector<float>(G::kVocab);
  std::vector<int> sampled = std::vector<int>(16);
  mc::State state{0, 0, 0, 5};
  mc::StepParams p{};

  template <class T>
  T* make(size_t bytes, uint32_t fill) {
    arrays.push_back(std::make_unique<std::vector<uint32_t>>(bytes / 4 + 4, fill));
    auto at = reinterpret_cast<uintptr_t>(arrays.back()->data());
    return reinterpret_cast<T*>((at + 15) / 16 * 16);
  }
  uint16_t* values(size_t n, float mean, float spread) {
    uint16_t* v = make<uint16_t>(2 * n, 0);
    std::normal_distribution<float> d(mean, spread);
    for (size_t i = 0; i < n; ++i) v[i] = static_cast<uint16_t>(mc::bf16_bits(d(random)));
    return v;
  }
  mc::Matrix matrix(size_t rows, int K, int bits, float scale) {
    uint32_t* w = make<uint32_t>(rows * K * bits / 8, 0);
    for (size_t i = 0; i < rows * K * bits / 32; ++i) w[i] = random();
    const float middle = bits == 4 ? -7.5f : -127.5f;
    const size_t groups = rows * K / mc::kGroupSize;
    return {w, values(groups, scale, scale / 8), values(groups, scale * middle, scale / 4)};
  }
  void fill(int count, int position, int stride) {
    for (int i = 0; i < count; ++i) {
      const size_t kv = static_cast<size_t>(G::kKvHeads) * stride * G::kHeadDim;
      layers.push_back(
          {matrix(G::kContext, G::kHidden, 4, 0.01f),
           matrix(G::kKvHeads * G::kHeadDim, G::kHidden, 4, 0.01f),
           matrix(G::kKvHeads * G::kHeadDim, G::kHidden, 4, 0.01f),
           matrix(G::kHidden, G::kContext, 4, 0.01f), matrix(G::kExperts, G::kHidden, 8, 0.0006f),
           matrix(G::kExperts * G::kWidth, G::kHidden, 4, 0.01f),
           matrix(G::kExperts * G::kWidth, G::kHidden, 4, 0.01f),
           matrix(G::kExperts * G::kHidden, G::kWidth, 4, 0.01f), values(G::kHidden, 1.f, 0.1f),
           values(G::kHidden, 1.f, 0.1f), values(G::kHeadDim, 1.3f, 0.2f),
           values(G::kHeadDim, 1.3f, 0.2f), values(kv, 0.f, 1.f), values(kv, 0.f, 1.f)});
    }
    rope.resize(static_cast<size_t>(stride) * G::kHeadDim);
    for (size_t i = 0; i < rope.size() / 2; ++i) {
      const double a = i / 64 * std::pow(1e6, -double(i % 64) / 64);
      rope[2 * i] = std::cos(a), rope[2 * i + 1] = std::sin(a);
    }
    p.embed = matrix(G::kVocab, G::kHidden, 4, 0.2f),
    p.lm_head = matrix(G::kVocab, G::kHidden, 4, 0.01f);
    p.final_norm = values(G::kHidden, 1.f, 0.1f);
    p.layers = layers.data(), p.num_layers = count, p.cache_stride = stride, p.eps = 1e-6f;
    p.rope = rope.data(), p.state = &state, p.logits = logits.data(), p.sampled = sampled.data();
    p.fault = &mc::host::fault;
    state.position = position;
  }
  void prepare(int blocks) {
    const mc::RingWords n = mc::ring_words<G>(blocks);
    auto ring = [&](size_t words) { return make<uint32_t>(4 * words, mc::kEmpty); };
    p.x = {ring(n.hidden),  ring(n.middle), ring(n.qkv),
           ring(n.partial), ring(n.range),  ring(n.context),
           ring(n.scores),  ring(n.act),    make<uint64_t>(4 * n.keys, 0)};
    p.blocks = blocks, p.splits = std::min(mc::kSplits, blocks / G::kKvHeads);
    p.layout = mc::make_layout<G>(blocks, 227 << 10);
    state.clock = state.sampled = 0;
  }
  void run(int tokens) {
    p.tokens = tokens;
    mc::host::launch(p.blocks, mc::kThreads, p.layout.total,
                     [&](int thread, int block) { mc::step<G>(p, thread, block); });
  }
};

bool check_stages(int position, int layers) {
  Model m;
  m.fill(layers, position, 512);
  m.prepare(16);
  m.run(1);
  mc::oracle::Oracle o{
      [](void* to, const void* from, size_t n) { std::memcpy(to, from, n); }, m.p, {}};
  std::printf("layer %d of %d at position %d\n", layers - 1, layers, position);
  mc::oracle::check_layer<G>(o, m.layers.back(), m.state.clock - 1, m.state.clock - 1, position);
  mc::oracle::check_logits<G>(o, m.state.clock, 0, G::kVocab);
  const int best = std::max_element(m.logits.begin(), m.logits.end()) - m.logits.begin();
  const bool ok = o.verdict.ok && best == m.sampled[0];
  std::printf("  token %d, greedy %d -> %s\n", m.sampled[0], best, ok ? "ok" : "FAILED");
  return ok;
}

// tokens and last logits of one launch of four, four launches of one, and fewer blocks
bool check_repeatable() {
  std::vector<std::vector<float>> logits;
  std::vector<std::vector<int>> tokens;
  for (int kind = 0; kind < 3; ++kind) {
    Model m;
    m.fill(2, 21, 64);
    m.prepare(kind == 2 ? 24 : 16);
    m.p.splits = 16;
    std::vector<int> got;
    for (int i = 0; i < (kind == 1 ? 4 : 1); ++i) {
      m.run(kind == 1 ? 1 : 4);
      got.insert(got.end(), m.sampled.begin(), m.sampled.begin() + (kind == 1 ? 1 : 4));
    }
    logits.push_back(m.logits), tokens.push_back(got);
  }
  auto same = [&](int a, int b) {
    return tokens[a] == tokens[b] &&
           std::memcmp(logits[a].data(), logits[b].data(), sizeof(float) * G::kVocab) == 0;
  };
  const bool ok = same(0, 1) && same(0, 2);
  std::printf("4 tokens at once, one by one, on more SMs: %d %d %d %d -> %s\n", tokens[0][0],
              tokens[0][1], tokens[0][2], tokens[0][3], ok ? "same bits" : "DIFFERENT");
  return ok;
}

}  // namespace

int main() {
  bool ok = check_stages(0, 1);
  ok = check_stages(37, 2) && ok;
  ok = check_stages(300, 3) && ok;
  ok = check_repeatable() && ok;
  return ok ? 0 : 1;
}
