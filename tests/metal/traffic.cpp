// Bytes and dispatches of one decoded token, from the executor's own plan and run at the true
// geometry, and what published bandwidths would make of them. Estimates: nothing here was measured
// on Apple hardware. With a file as argument: exit code 1 unless the file holds what this prints.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <set>
#include <sstream>
#include <stdexcept>

#include "metal/metal_step.h"
#include "true_shapes.h"

using moefuse::metal::Dispatch;
using true_shapes::Shapes;

namespace {

constexpr int kContext = 1024;
struct Machine {
  const char* name;
  double bandwidth;  // published, GB/s
};
constexpr Machine kMachines[] = {{"M1 Max", 400},
                                 {"M2 Max", 400},
                                 {"M3 Max (40 cores)", 400},
                                 {"M4 Max (40 cores)", 546},
                                 {"M5 Max (40 cores)", 614}};
// Assumed, not measured: the share of that bandwidth that a decode reaches, and the seconds from
// the end of one dependent dispatch to the start of the next in one command buffer.
constexpr double kShare = 0.75, kGap = 2e-6;

std::string line(const char* format, auto... values) {
  char text[256];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

// One call of the executor: its threadgroups, and the bytes of activations that it reads (what an
// earlier call wrote) and writes.
struct Activations {
  std::string kernel;
  int64_t groups, read, written;
};

// The calls of one token of one row, from the executor's own run; nothing is computed.
std::vector<Activations> walk(Shapes& shapes, moefuse::metal::MetalStep& step,
                              const moefuse::CacheShape& cache, size_t layers) {
  std::vector<Activations> calls;
  std::set<std::uintptr_t> written;
  moefuse::metal::set_backend([&](const moefuse::metal::Call& call) {
    const auto& g = call.groups;
    Activations a{call.kernel->name, int64_t(g.x) * g.y * g.z, 0, 0};
    for (const auto& in : call.inputs)
      if (written.count(in.id())) a.read += in.nbytes();
    std::vector<true_shapes::mx::array> outputs;
    for (size_t i = 0; i < call.shapes.size(); ++i) {
      outputs.push_back(shapes.unread(call.shapes[i], call.dtypes[i]));
      written.insert(outputs.back().id());
      a.written += outputs.back().nbytes();
    }
    calls.push_back(a);
    return outputs;
  });
  const auto type = true_shapes::mx::bfloat16;
  const moefuse::LayerCache slots{
      shapes.unread({1, cache.kv_heads, kContext + 1, cache.key_dim}, type),
      shapes.unread({1, cache.kv_heads, kContext + 1, cache.value_dim}, type)};
  step.run({{.token = 0, .sequence = 0, .position = kContext, .first = 0, .slot = kContext}},
           std::vector(layers, slots));
  moefuse::metal::set_backend(nullptr);
  return calls;
}

std::string machines(double bytes, int dispatches) {
  std::string text =
      "| machine | GB/s, published | bound, tok/s | estimate, tok/s |\n|---|---|---|---|\n";
  for (const Machine& m : kMachines) {
    const double bound = bytes / m.bandwidth / 1e9, estimate = bound / kShare + dispatches * kGap;
    text += line("| %s | %.0f | %.0f | %.0f |\n", m.name, m.bandwidth, 1 / bound, 1 / estimate);
  }
  return text + "\n";
}

// layers: how often each of the plan's layers stands in the model. limit: dispatches of a layer.
std::string report(const char* name, Shapes shapes, const std::vector<int>& layers, int limit) {
  const moefuse::Plan plan = moefuse::make_plan(shapes.model);
  moefuse::metal::MetalStep step(plan, moefuse::Accumulate::exact);
  const std::vector<Dispatch> planned = step.dispatches(kContext);
  const std::vector<Activations> called = walk(shapes, step, plan.cache, layers.size());
  if (planned.size() != called.size()) throw std::runtime_error("the plan and the run differ");
  std::string text = line("### %s, 4 bits, %d cached tokens\n\n", name, kContext);
  text +=
      "| where | dispatch | threadgroups | MB of weights | MB of cache | KB read | "
      "KB written |\n|---|---|---|---|---|---|---|\n";
  double bytes = 0.0;
  int dispatches = 0;
  std::vector<int> in_layer(layers.size());
  std::vector<double> layer_bytes(layers.size());
  for (size_t i = 0; i < planned.size(); ++i) {
    const Dispatch& d = planned[i];
    const Activations& a = called[i];
    if ("moefuse_" + d.kernel != a.kernel)
      throw std::runtime_error(d.kernel + " planned, ran " + a.kernel);
    const int times = d.layer < 0 ? 1 : layers[d.layer];
    const std::string where = d.layer < 0  ? "once"
                              : times == 1 ? "the dense layer"
                                           : line("%d layers", times);
    text += line("| %s | `%s` | %d | %.2f | %.2f | %.1f | %.1f |\n", where.c_str(),
                 d.kernel.c_str(), int(a.groups), d.weight_bytes / 1e6, d.cache_bytes / 1e6,
                 a.read / 1e3, a.written / 1e3);
    bytes += times * double(d.weight_bytes + d.cache_bytes);
    dispatches += times;
    if (d.layer < 0) continue;
    layer_bytes[d.layer] += d.weight_bytes + d.cache_bytes;
    if (++in_layer[d.layer] > limit) throw std::runtime_error("too many dispatches in a layer");
  }
  text += line("\nA layer: %d dispatches, %.2f MB. ", in_layer.back(), layer_bytes.back() / 1e6);
  text += line("A token: %.2f GB in %d dispatches.\n\n", bytes / 1e9, dispatches);
  return text + machines(bytes, dispatches);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string text = report("Qwen3-30B-A3B", true_shapes::qwen(), {48}, 6) +
                           report("GLM-4.7-Flash", true_shapes::glm(), {1, 46}, 8);
  std::cout << text;
  if (count < 2) return 0;
  std::ostringstream file;
  file << std::ifstream(arguments[1]).rdbuf();
  const bool held = file.str().find(text.substr(0, text.size() - 1)) != std::string::npos;
  if (!held) std::cerr << arguments[1] << ": expected these tables, got others\n";
  return held ? 0 : 1;
}
