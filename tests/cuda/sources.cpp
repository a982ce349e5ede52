// Writes the CUDA source of a decode step at a true geometry, as NVRTC would be given it, for a
// compiler on a machine without a GPU:  cuda_sources qwen|glm ROWS > step.cu
#include <cstdio>
#include <string>

#include "../metal/true_shapes.h"
#include "cuda/replay.h"
#include "cuda/tensor_walk.h"

namespace mx = mlx::core;
namespace metal = moefuse::metal;

int main(int argc, char** argv) {
  const bool qwen = argc > 1 && std::string(argv[1]) == "qwen";
  const int rows = argc > 2 ? std::stoi(argv[2]) : 1;
  const true_shapes::Shapes shapes = qwen ? true_shapes::qwen() : true_shapes::glm();
  const moefuse::Plan plan = moefuse::make_plan(shapes.model);
  if (const auto why = moefuse::cuda::tensor_refusal(plan); !why.empty()) {
    std::fprintf(stderr, "refused: %s\n", why.c_str());
    return 1;
  }
  std::vector<moefuse::LayerCache> caches;
  const auto& c = plan.cache;
  for (int i = 0; i < plan.config.num_hidden_layers; ++i)
    caches.push_back(
        {true_shapes::Shapes{}.unread({rows, c.kv_heads, 64, c.key_dim}, plan.dtype),
         true_shapes::Shapes{}.unread({rows, c.kv_heads, 64, c.value_dim}, plan.dtype)});
  std::vector<metal::Call> calls;
  metal::Constants constants;
  const int angles = metal::rope_of(plan).dims;
  const metal::WalkInputs inputs = {rows, caches, mx::zeros({16}, mx::uint32),
                                    mx::zeros({rows, 4}, mx::uint32), mx::zeros({rows, angles})};
  const auto collect = [&](const metal::Call& call) {
    calls.push_back(call);
    std::vector<mx::array> out;
    for (size_t i = 0; i < call.shapes.size(); ++i)
      out.push_back(mx::zeros(call.shapes[i], call.dtypes[i]));
    return out;
  };
  moefuse::cuda::FoldedRouters routers(collect);
  moefuse::cuda::TensorWalk walk(plan, moefuse::Accumulate::fp32_no_fma, constants, routers, inputs,
                                 collect, 132, 4);
  walk.walk();
  for (const metal::Call& call : calls)
    std::fprintf(stderr, "%-32s %4d x %3d x %2d blocks of %4d threads\n", call.kernel->name.c_str(),
                 call.groups.x, call.groups.y, call.groups.z, call.threads);
  std::fputs(moefuse::cuda::source_of(calls).c_str(), stdout);
}
