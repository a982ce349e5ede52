#pragma once

#include <vector>

#include "cuda/tensor_walk.h"

// The calls of a step of so many rows, none of which is run, as for 132 multiprocessors.
inline std::vector<moefuse::metal::Call> calls_of(const moefuse::Plan& plan, int rows, int splits,
                                                  bool greedy = false) {
  namespace mx = mlx::core;
  namespace metal = moefuse::metal;
  std::vector<metal::Call> calls;
  const auto collect = [&](const metal::Call& call) {
    calls.push_back(call);
    std::vector<mx::array> out;
    for (size_t i = 0; i < call.shapes.size(); ++i)
      out.push_back(mx::zeros(call.shapes[i], call.dtypes[i]));
    return out;
  };
  std::vector<moefuse::LayerCache> caches;
  const auto& c = plan.cache;
  for (int i = 0; i < plan.config.num_hidden_layers; ++i)
    caches.push_back({mx::zeros({rows, c.kv_heads, 64, c.key_dim}, plan.dtype),
                      mx::zeros({rows, c.kv_heads, 64, c.value_dim}, plan.dtype)});
  metal::Constants constants;
  moefuse::cuda::FoldedRouters routers(collect);
  const metal::WalkInputs inputs = {rows, caches, mx::zeros({16}, mx::uint32),
                                    mx::zeros({rows, 4}, mx::uint32),
                                    mx::zeros({rows, metal::rope_of(plan).dims})};
  moefuse::cuda::TensorWalk(plan, moefuse::Accumulate::fp32_no_fma, constants, routers, inputs,
                            collect, 132, splits, greedy)
      .walk();
  return calls;
}
