// Writes the CUDA source of a decode step at a true geometry, as NVRTC would be given it, for a
// compiler on a machine without a GPU:  cuda_sources qwen|glm ROWS SPLITS > step.cu
#include <cstdio>
#include <string>

#include "../metal/true_shapes.h"
#include "collect_calls.h"
#include "cuda/replay.h"

namespace metal = moefuse::metal;
namespace mx = mlx::core;

// The logits' part of sample_greedy.
static metal::Call sampling_call(int rows, int vocab) {
  const int parts = metal::blocks(vocab, 2048);
  const mx::array logits = mx::zeros({rows, vocab});
  return {&metal::kernel_text("sample_greedy_parts"),
          {logits},
          {mx::float32, vocab},
          {{rows, parts}, {rows, parts}},
          {mx::uint32, mx::uint32},
          {parts, rows, 1},
          256};
}

int main(int argc, char** argv) {
  const bool qwen = argc > 1 && std::string(argv[1]) == "qwen";
  const int rows = argc > 2 ? std::stoi(argv[2]) : 1, splits = argc > 3 ? std::stoi(argv[3]) : 1;
  const true_shapes::Shapes shapes = qwen ? true_shapes::qwen() : true_shapes::glm();
  const moefuse::Plan plan = moefuse::make_plan(shapes.model);
  if (const auto why = moefuse::cuda::tensor_refusal(plan); !why.empty()) {
    std::fprintf(stderr, "refused: %s\n", why.c_str());
    return 1;
  }
  std::vector<metal::Call> calls = calls_of(plan, rows, splits);
  for (const metal::Call& call : calls_of(plan, rows, splits, true))
    if (call.kernel->name == "moefuse_grid_head_greedy" ||
        call.kernel->name == "moefuse_sample_greedy")
      calls.insert(calls.begin(), call);
  calls.insert(calls.begin(), sampling_call(rows, plan.config.vocab_size));
  for (const metal::Call& call : calls)
    std::fprintf(stderr, "%-32s %4d x %3d x %2d blocks of %4d threads\n", call.kernel->name.c_str(),
                 call.groups.x, call.groups.y, call.groups.z, call.threads);
  std::fputs(moefuse::cuda::source_of(calls).c_str(), stdout);
}
