#include "decode/cpu_step.h"

#include <chrono>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "decode/cpu_attention.inl"
#include "decode/cpu_mlp.inl"
#include "decode/cpu_projection.inl"

namespace moefuse {

namespace {

template <class A>
mx::Dtype mlx_dtype();
template <>
mx::Dtype mlx_dtype<float>() {
  return mx::float32;
}
template <>
mx::Dtype mlx_dtype<mx::bfloat16_t>() {
  return mx::bfloat16;
}
template <>
mx::Dtype mlx_dtype<mx::float16_t>() {
  return mx::float16;
}

// Norms are a few kilobytes: converted once, they need no dtype of their own in the stages.
template <class A>
Plan converted(Plan plan) {
  const auto convert = [](Norm& norm) {
    norm.weight = mx::contiguous(mx::astype(norm.weight, mlx_dtype<A>(), mx::Device::cpu), false,
                                 mx::Device::cpu);
    norm.weight.eval();
  };
  for (Stage& stage : plan.stages)
    std::visit(
        [&](auto& s) {
          if constexpr (requires { s.norm; }) convert(s.norm);
          if constexpr (requires { s.q_norm; }) convert(s.q_norm), convert(s.k_norm);
          if constexpr (requires { s.q_a_norm; }) convert(s.q_a_norm), convert(s.kv_a_norm);
        },
        stage.work);
  return plan;
}

Rope rope_of(const Plan& plan) {
  for (const Stage& stage : plan.stages) {
    if (const auto* s = std::get_if<GroupedAttention>(&stage.work)) return s->rope;
    if (const auto* s = std::get_if<LatentQuery>(&stage.work)) return s->rope;
  }
  return {2, 1.0f, false};
}

// The widest vector of each kind that the plan's stages hand on.
struct Widths {
  int64_t q = 0, kv = 0, q_latent = 0, q_rope = 0, attended = 0, inner = 0, shared_inner = 0;
  int experts = 0;

  void of(const GroupedProjection& s) { q = s.q.rows, kv = s.k.rows; }
  void of(const LatentProjection& s) { q = s.q_a.rows, kv = s.kv_a.rows; }
  void of(const LatentQuery& s) {
    q_latent = int64_t(s.heads) * s.latent_dim, q_rope = int64_t(s.heads) * s.rope_dim;
  }
  void of(const OutputProjection& s) { attended = s.o.cols; }
  void of(const Router& s) { experts = std::max(experts, s.experts), top_k = s.top_k; }
  void of(const ExpertsGateUp& s) {
    inner = std::max<int64_t>(inner, int64_t(top_k) * s.gate.rows);
    if (s.shared_gate) shared_inner = s.shared_gate->rows;
  }
  void of(const DenseGateUp& s) { inner = std::max<int64_t>(inner, s.gate.rows); }
  template <class Other>
  void of(const Other&) {}

  int top_k = 1;
};

}  // namespace

template <class A>
CpuStep<A>::Shared::Shared(const Plan& plan, Accumulate accumulate, int threads)
    : team(threads),
      accumulate(accumulate),
      dot(cpu_arithmetic(accumulate, plan.dtype).dot),
      cache_dtype(cpu_dtype(plan.dtype)),
      cache_shape(plan.cache),
      rope(rope_of(plan)) {
  Widths width;
  for (const Stage& stage : plan.stages)
    std::visit([&](const auto& s) { width.of(s); }, stage.work);
  hidden.resize(kMaxRows * plan.config.hidden_size);
  q.resize(kMaxRows * width.q);
  k.resize(kMaxRows * width.kv);
  v.resize(kMaxRows * width.kv);
  q_latent.resize(kMaxRows * width.q_latent);
  q_rope.resize(kMaxRows * width.q_rope);
  attended.resize(kMaxRows * width.attended);
  latents.resize(kMaxRows * width.q_latent);
  router_logits.resize(kMaxRows * width.experts);
  inner.resize(kMaxRows * width.inner);
  shared_inner.resize(kMaxRows * width.shared_inner);
}

template <class A>
CpuStep<A>::Worker::Worker(const Plan& plan, Shared& shared, int thread)
    : config_(plan.config),
      shared_(shared),
      team_(shared.team),
      thread_(thread),
      x_(shared.dot),
      inner_(shared.dot),
      shared_inner_(shared.dot),
      combine_(cpu::CombineSteps::dtype) {}

template <class A>
CpuStep<A>::CpuStep(const Plan& plan, Accumulate accumulate)
    : plan_(converted<A>(plan)), times_(plan.stages.size()) {
  cpu::check_settings();
  shared_ = std::make_unique<Shared>(plan_, accumulate, cpu::num_threads());
  for (int t = 0; t < shared_->team.threads(); ++t)
    workers_.push_back(std::make_unique<Worker>(plan_, *shared_, t));
}

template <class A>
CpuStep<A>::~CpuStep() = default;

// A page is looked up for every 4 kB of a cache otherwise. One layer's a step, so that no token
// waits for all of them; and none so short that it is replaced before the move has paid: 16 MB take
// some 26 ms, what a long cache gives back within about 30 tokens.
constexpr int64_t kLeastMoved = 8 << 20;  // bytes

template <class A>
void CpuStep<A>::put_a_cache_in_huge_pages() {
  const CacheShape& shape = plan_.cache;
  int sequences = 0;
  for (const StepRow& row : shared_->rows) sequences = std::max(sequences, row.sequence + 1);
  in_huge_pages_.resize(shared_->caches.size());
  for (size_t layer = 0; layer < in_huge_pages_.size(); ++layer) {
    const CacheView &now = shared_->caches[layer], &then = in_huge_pages_[layer];
    if (now.keys == then.keys && now.values == then.values && now.slots == then.slots) continue;
    in_huge_pages_[layer] = now;
    const int64_t heads =
        sequences * shape.kv_heads * now.slots * cpu::itemsize(shared_->cache_dtype);
    const int64_t keys = heads * shape.key_dim, values = heads * shape.value_dim;
    if (keys >= kLeastMoved) cpu::use_huge_pages(now.keys, keys);
    if (values >= kLeastMoved) cpu::use_huge_pages(now.values, values);
    if (std::max(keys, values) >= kLeastMoved) return;
  }
}

template <class A>
void CpuStep<A>::run(const std::vector<StepRow>& rows, const std::vector<CacheView>& caches,
                     A* logits) {
  shared_->rows = rows;
  shared_->caches = caches;
  shared_->logits = logits;
  put_a_cache_in_huge_pages();
  int last = 0;
  for (const StepRow& row : rows) last = std::max(last, row.position);
  shared_->rope.reserve(last + 1, mlx_dtype<A>());
  if constexpr (!kExact<A>) {
    const int dim = std::max(plan_.cache.key_dim, plan_.cache.value_dim);
    const size_t size =
        rows.size() * plan_.config.num_attention_heads * kMostChunks * size_t(dim + 2);
    if (shared_->partial.size() < size) shared_->partial.resize(size);
  }
  const auto work = [&](int thread) {
    Worker& worker = *workers_[thread];
    auto since = std::chrono::steady_clock::now();
    for (size_t i = 0; i < plan_.stages.size(); ++i) {
      worker.set_layer(plan_.stages[i].layer);
      std::visit([&](const auto& s) { worker.run(s); }, plan_.stages[i].work);
      if (thread != 0) continue;
      const auto now = std::chrono::steady_clock::now();
      times_[i].seconds += std::chrono::duration<double>(now - since).count();
      times_[i].calls += 1;
      since = now;
    }
  };
  cpu::on_threads(shared_->team.threads(), work);
}

template class CpuStep<float>;
template class CpuStep<mx::bfloat16_t>;
template class CpuStep<mx::float16_t>;

}  // namespace moefuse
