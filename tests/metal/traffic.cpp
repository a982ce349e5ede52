// Bytes and dispatches of one decoded token, from the executor's own plan at the true geometry, and
// what published bandwidths would make of them. Estimates: nothing here was measured on Apple
// hardware. With a file as argument: exit code 1 unless the file holds what this prints.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

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

// layers: how often each of the plan's layers stands in the model.
std::string report(const char* name, Shapes shapes, const std::vector<int>& layers) {
  const moefuse::Plan plan = moefuse::make_plan(shapes.model);
  const moefuse::metal::MetalStep step(plan, moefuse::Accumulate::exact);
  std::string text = line("### %s, 4 bits, %d cached tokens\n\n", name, kContext);
  text += "| where | dispatch | MB of weights | MB of cache |\n|---|---|---|---|\n";
  double bytes = 0.0;
  int dispatches = 0;
  for (const Dispatch& d : step.dispatches(kContext)) {
    const int times = d.layer < 0 ? 1 : layers[d.layer];
    const std::string where = d.layer < 0  ? "once"
                              : times == 1 ? "the dense layer"
                                           : line("%d layers", times);
    text += line("| %s | `%s` | %.2f | %.2f |\n", where.c_str(), d.kernel.c_str(),
                 d.weight_bytes / 1e6, d.cache_bytes / 1e6);
    bytes += times * double(d.weight_bytes + d.cache_bytes);
    dispatches += times;
  }
  text += line("\nA token: %.2f GB in %d dispatches.\n\n", bytes / 1e9, dispatches);
  text += "| machine | GB/s, published | bound, tok/s | estimate, tok/s |\n|---|---|---|---|\n";
  for (const Machine& m : kMachines) {
    const double bound = bytes / m.bandwidth / 1e9, estimate = bound / kShare + dispatches * kGap;
    text += line("| %s | %.0f | %.0f | %.0f |\n", m.name, m.bandwidth, 1 / bound, 1 / estimate);
  }
  return text + "\n";
}

}  // namespace

int main(int count, char** arguments) {
  const std::string text = report("Qwen3-30B-A3B", true_shapes::qwen(), {48}) +
                           report("GLM-4.7-Flash", true_shapes::glm(), {1, 46});
  std::cout << text;
  if (count < 2) return 0;
  std::ostringstream file;
  file << std::ifstream(arguments[1]).rdbuf();
  const bool held = file.str().find(text.substr(0, text.size() - 1)) != std::string::npos;
  if (!held) std::cerr << arguments[1] << ": expected these tables, got others\n";
  return held ? 0 : 1;
}
