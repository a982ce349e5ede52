#include "moefuse/decoder.h"

#include <variant>

#include "cuda/cuda_step.h"
#include "decode/cpu_step.h"
#include "metal/metal_step.h"
#include "moefuse/ops.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

constexpr const char* kWhere = "step";

void check_geometry(const Model& model) {
  const ModelConfig& c = model.config;
  if (c.num_experts > 0 && c.num_experts_per_tok > kMaxTopK)
    fail(kWhere, "num_experts_per_tok", "at most " + std::to_string(kMaxTopK),
         std::to_string(c.num_experts_per_tok));
}

}  // namespace

struct Decoder::Impl {
  using Executor = std::variant<CpuStep<float>, CpuStep<mx::bfloat16_t>, CpuStep<mx::float16_t>>;

  Impl(Plan p, Accumulate accumulate) : plan(std::move(p)), exact(accumulate == Accumulate::exact) {
    if (metal::serves({}) && cuda::can_replay())
      cuda_step = std::make_unique<cuda::CudaStep>(plan, accumulate);
    else if (metal::serves({}))
      metal_step = std::make_unique<metal::MetalStep>(plan, accumulate);
    else if (!exact)
      executor = std::make_unique<Executor>(std::in_place_index<0>, plan, accumulate);
    else if (plan.dtype == mx::bfloat16)
      executor = std::make_unique<Executor>(std::in_place_index<1>, plan, accumulate);
    else if (plan.dtype == mx::float16)
      executor = std::make_unique<Executor>(std::in_place_index<2>, plan, accumulate);
    else  // stock multiplies float32 activations with a BLAS, whose order is its own
      fail(kWhere, "accumulate", "fp32_no_fma or fp32 for a float32 model", "exact");
  }

  void check_row(const StepRow& row, const LayerCache& cache, int index) const {
    const std::string where = "rows[" + std::to_string(index) + "]";
    const ModelConfig& c = plan.config;
    const auto within = [&](const char* field, int64_t value, int64_t low, int64_t high) {
      if (value < low || value > high)
        fail(kWhere, where + "." + field, std::to_string(low) + " to " + std::to_string(high),
             std::to_string(value));
    };
    within("token", row.token, 0, c.vocab_size - 1);
    within("sequence", row.sequence, 0, cache.keys.shape(0) - 1);
    within("slot", row.slot, 0, cache.keys.shape(2) - 1);
    within("first", row.first, 0, row.slot);
    within("position", row.position, 0, c.max_position_embeddings - 1);
  }

  void check_array(const mx::array& a, const std::string& name, int dim, const mx::Shape& first) {
    check_dtype(kWhere, name, a, plan.dtype);
    if (a.ndim() != 4) fail(kWhere, name, "rank 4", describe(a.shape()));
    check_shape(kWhere, name, a, {first[0], plan.cache.kv_heads, first[2], dim});
    if (!a.is_available() || !a.flags().row_contiguous)
      fail(kWhere, name, "an evaluated row contiguous array", "another");
  }

  void check(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches) {
    const int layers = plan.config.num_hidden_layers;
    if (rows.empty() || rows.size() > kMaxRows)
      fail(kWhere, "rows", "1 to " + std::to_string(kMaxRows), std::to_string(rows.size()));
    if (static_cast<int>(caches.size()) != layers)
      fail(kWhere, "caches", "one for each of " + std::to_string(layers) + " layers",
           std::to_string(caches.size()));
    if (caches[0].keys.ndim() != 4)
      fail(kWhere, "caches[0].keys", "rank 4", describe(caches[0].keys.shape()));
    for (int i = 0; i < layers; ++i) {
      const std::string name = "caches[" + std::to_string(i) + "]";
      const mx::Shape& shape = caches[0].keys.shape();
      check_array(caches[i].keys, name + ".keys", plan.cache.key_dim, shape);
      check_array(caches[i].values, name + ".values", plan.cache.value_dim, shape);
    }
    for (size_t i = 0; i < rows.size(); ++i) check_row(rows[i], caches[0], i);
  }

  mx::array run(const std::vector<StepRow>& rows, std::vector<LayerCache>& caches,
                const std::optional<mx::array>& tokens, bool greedy);
  // By the CPU's executor: logits.
  mx::array run_here(const std::vector<StepRow>& rows, std::vector<LayerCache>& caches);

  Plan plan;
  bool exact;
  std::unique_ptr<Executor> executor;
  // In the executor's place on a GPU.
  std::unique_ptr<metal::MetalStep> metal_step;
  std::unique_ptr<cuda::CudaStep> cuda_step;
};

bool has_executor() {
  return metal::serves({}) || mx::default_device() == mx::Device::cpu;
}

Decoder::Decoder(const Model& model, Accumulate accumulate) {
  check_geometry(model);
  impl_ = std::make_unique<Impl>(make_plan(model), accumulate);
  // Asking a GPU's array for its data would move it to the host.
  if (impl_->executor)
    for (const auto& [name, array] : model.weights) use_huge_pages(array);
}
Decoder::~Decoder() = default;
Decoder::Decoder(Decoder&&) noexcept = default;

mx::array Decoder::step(const std::vector<StepRow>& rows, std::vector<LayerCache>& caches,
                        const std::optional<mx::array>& tokens) {
  return impl_->run(rows, caches, tokens, false);
}
mx::array Decoder::greedy(const std::vector<StepRow>& rows, std::vector<LayerCache>& caches,
                          const std::optional<mx::array>& tokens) {
  return impl_->run(rows, caches, tokens, true);
}

mx::array Decoder::Impl::run(const std::vector<StepRow>& given, std::vector<LayerCache>& caches,
                             const std::optional<mx::array>& tokens, bool greedy) {
  std::vector<StepRow> rows = given;
  std::optional<mx::array> ids;
  if (tokens) {
    check_integer(kWhere, "tokens", *tokens);
    check_shape(kWhere, "tokens", *tokens, {static_cast<int>(rows.size())});
    ids = mx::astype(*tokens, mx::uint32);
  }
  if (ids && !cuda_step) {
    ids->eval();
    for (size_t i = 0; i < rows.size(); ++i) rows[i].token = ids->data<uint32_t>()[i];
  }
  check(rows, caches);
  if (cuda_step) return cuda_step->run(rows, caches, ids, greedy);
  const mx::array logits = metal_step ? metal_step->run(rows, caches) : run_here(rows, caches);
  return greedy ? sample_greedy(logits) : logits;
}

mx::array Decoder::Impl::run_here(const std::vector<StepRow>& rows,
                                  std::vector<LayerCache>& caches) {
  const int vocab = plan.config.vocab_size, count = static_cast<int>(rows.size());
  const mx::Dtype dtype = exact ? plan.dtype : mx::float32;
  mx::array logits(mx::allocator::malloc(size_t(count) * vocab * dtype.size()),
                   mx::Shape{count, vocab}, dtype);
  std::vector<CacheView> views;
  views.reserve(caches.size());
  for (LayerCache& c : caches)
    views.push_back({c.keys.data<char>(), c.values.data<char>(), c.keys.shape(2)});
  std::visit([&]<class A>(CpuStep<A>& step) { step.run(rows, views, logits.data<A>()); },
             *executor);
  return logits;
}

void Decoder::wait() {
  if (impl_->cuda_step) impl_->cuda_step->wait();
}

std::map<std::string, std::pair<int, double>> Decoder::kernel_times(int rows) {
  if (!impl_->cuda_step) fail(kWhere, "device", "a CUDA GPU", "another");
  return impl_->cuda_step->kernel_times(rows);
}

const ModelConfig& Decoder::config() const {
  return impl_->plan.config;
}
mx::Dtype Decoder::dtype() const {
  return impl_->plan.dtype;
}
CacheShape Decoder::cache_shape() const {
  return impl_->plan.cache;
}

std::vector<StageInfo> Decoder::stages() const {
  std::vector<StageInfo> list;
  if (impl_->metal_step || impl_->cuda_step) {
    const int64_t calls = impl_->cuda_step ? impl_->cuda_step->calls() : impl_->metal_step->calls();
    for (const Stage& stage : impl_->plan.stages) {
      list.push_back(impl_->plan.describe(stage));
      list.back().calls = calls;
    }
    return list;
  }
  const auto& times =
      std::visit([](const auto& step) -> const std::vector<StageTime>& { return step.times(); },
                 *impl_->executor);
  for (size_t i = 0; i < times.size(); ++i) {
    StageInfo info = impl_->plan.describe(impl_->plan.stages[i]);
    info.calls = times[i].calls;
    info.seconds = times[i].seconds;
    list.push_back(info);
  }
  return list;
}

}  // namespace moefuse
