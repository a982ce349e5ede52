// The fused ops against the stock MLX graphs they replace, in one run, at the layer geometry of
// Qwen3-30B-A3B: 8 of 128 experts, 768 x 2048, 4 bits, group 64.
//
//   bench_ops [--benchmark_filter=...]
//
// Columns: us per call; GB/s of the bytes a call must read; read_share, those GB/s as a share of
// the read bandwidth measured at the start of this run with the same threads; vs_stock, the time of
// the stock graph measured just before, over this one. The experts change with every call, so that
// the weights come from memory and not from a cache.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "decode/read_bandwidth.h"
#include "mlx/mlx.h"
#include "moefuse/ops.h"
#include "ops/stock.h"

namespace {

namespace mx = mlx::core;
using moefuse::Accumulate;

constexpr int kExperts = 128, kTopK = 8, kHidden = 2048, kWidth = 768;
constexpr int kGroupSize = 64, kBits = 4;

double bandwidth = 0;
std::map<std::string, double> stock_seconds;  // the latest stock time of each kind of call

struct Layer {
  mx::Dtype dtype;
  moefuse::QuantizedExperts gate, up, down;
  mx::array x, weights, logits;
  std::vector<mx::array> indices;  // a cycle of choices that touches every expert

  explicit Layer(mx::Dtype dtype)
      : dtype(dtype),
        gate(stack(kWidth, kHidden)),
        up(stack(kWidth, kHidden)),
        down(stack(kHidden, kWidth)),
        x(mx::astype(mx::random::normal({1, kHidden}), dtype)),
        weights(mx::astype(mx::full({1, kTopK}, 0.125f), dtype)),
        logits(mx::astype(mx::random::normal({1, kExperts}), dtype)) {
    for (uint32_t first = 0; first < kExperts; first += kTopK)
      indices.push_back(mx::reshape(mx::arange(first, first + kTopK, mx::uint32), {1, kTopK}));
    mx::eval(x, weights, logits);
    mx::eval(indices);
  }

  moefuse::QuantizedExperts stack(int rows, int cols) const {
    auto w = mx::random::normal({kExperts, rows, cols}, dtype, 0, 0.02);
    auto q = mx::quantize(w, kGroupSize, kBits);
    mx::eval(q);
    for (const mx::array& a : q) moefuse::use_huge_pages(a);  // as moefuse.patch() does
    return {q[0], q[1], q[2]};
  }
  double bytes() const {  // of the experts that one row reads
    const double scale_bytes = 2.0 * dtype.size() / kGroupSize;
    return 3.0 * kTopK * kHidden * kWidth * (kBits / 8.0 + scale_bytes);
  }
};

Layer& layer(mx::Dtype dtype) {
  static std::map<std::string, Layer> layers;
  const std::string key = dtype == mx::bfloat16 ? "bfloat16" : "float32";
  return layers.try_emplace(key, dtype).first->second;
}

void report(benchmark::State& state, const std::string& kind, bool is_stock, double seconds,
            double bytes) {
  const double each = seconds / state.iterations();
  if (is_stock) stock_seconds[kind] = each;
  state.counters["us"] = each * 1e6;
  state.counters["GB/s"] = bytes / each / 1e9;
  state.counters["read_share"] = bytes / each / bandwidth;
  if (stock_seconds.count(kind)) state.counters["vs_stock"] = stock_seconds[kind] / each;
}

template <class Call>
void measure(benchmark::State& state, const std::string& kind, bool is_stock, double bytes,
             Call&& call) {
  double seconds = 0;
  size_t i = 0;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    call(i++).eval();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(taken.count());
    seconds += taken.count();
  }
  report(state, kind, is_stock, seconds, bytes);
}

void experts(benchmark::State& state, mx::Dtype dtype, const char* mode) {
  auto& l = layer(dtype);
  const bool is_stock = !std::strcmp(mode, "stock");
  const auto accumulate = moefuse::accumulate_from(is_stock ? "exact" : mode);
  const std::string kind = dtype == mx::bfloat16 ? "experts/bf16" : "experts/fp32";
  measure(state, kind, is_stock, l.bytes(), [&](size_t i) {
    const auto& chosen = l.indices[i % l.indices.size()];
    return is_stock
               ? moefuse::stock::moe_experts(l.x, l.gate, l.up, l.down, chosen, l.weights,
                                             accumulate, kGroupSize, kBits)
               : moefuse::moe_gather_qmm_swiglu_downproj_combine(
                     l.x, l.gate, l.up, l.down, chosen, l.weights, accumulate, kGroupSize, kBits);
  });
}

void combine(benchmark::State& state, const char* mode) {
  auto& l = layer(mx::bfloat16);
  auto y = mx::astype(mx::random::normal({1, kTopK, kHidden}), mx::bfloat16);
  y.eval();
  const bool is_stock = !std::strcmp(mode, "stock");
  const auto accumulate = moefuse::accumulate_from(is_stock ? "exact" : mode);
  measure(state, "combine", is_stock, 2.0 * (kTopK + 1) * kHidden, [&](size_t) {
    return is_stock ? moefuse::stock::moe_combine(y, l.weights, accumulate)
                    : moefuse::moe_combine_weighted_sum_fp32_no_fma(y, l.weights, accumulate);
  });
}

void router(benchmark::State& state, const char* mode) {
  auto& l = layer(mx::bfloat16);
  const bool is_stock = !std::strcmp(mode, "stock");
  moefuse::RouterOptions options;
  if (!is_stock) options.mode = moefuse::router_mode_from(mode);
  measure(state, "router", is_stock, 2.0 * kExperts, [&](size_t) {
    return is_stock ? moefuse::stock::moe_router(l.logits, kTopK, options, std::nullopt).second
                    : moefuse::moe_router_argpartition_logits_topk(l.logits, kTopK, options).second;
  });
}

void add(const std::string& name, void (*f)(benchmark::State&, mx::Dtype, const char*),
         mx::Dtype dtype, const char* mode) {
  benchmark::RegisterBenchmark(name.c_str(), f, dtype, mode)->UseManualTime();
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  mx::set_default_device(mx::Device::cpu);
  bandwidth = moefuse::read_bandwidth(int64_t{1} << 30);
  benchmark::AddCustomContext("read bandwidth", std::to_string(bandwidth / 1e9) + " GB/s");
  benchmark::AddCustomContext("threads", std::to_string(moefuse::cpu::num_threads()));
  benchmark::AddCustomContext("instruction set", moefuse::cpu_isa());
  for (const char* mode : {"stock", "exact", "fp32_no_fma", "fp32"}) {
    add(std::string("experts/bf16/") + mode, experts, mx::bfloat16, mode);
    add(std::string("experts/fp32/") + mode, experts, mx::float32, mode);
    benchmark::RegisterBenchmark((std::string("combine/") + mode).c_str(), combine, mode)
        ->UseManualTime();
  }
  for (const char* mode : {"stock", "exact", "logits"})
    benchmark::RegisterBenchmark((std::string("router/") + mode).c_str(), router, mode)
        ->UseManualTime();
  benchmark::RunSpecifiedBenchmarks();
}
