// Writes the very source that MLX would hand to Apple's compiler, one file for each kernel of the
// ops and of the decode step at the true geometries: fast::metal_kernel generates it while MLX
// exports a function, Metal or not.
//
//     metal_sources FOLDER
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "metal/metal_step.h"
#include "mlx/export.h"
#include "mlx/fast_primitives.h"
#include "moefuse/ops.h"
#include "true_shapes.h"

namespace mx = mlx::core;
namespace metal = moefuse::metal;
using moefuse::Accumulate;

namespace {

mx::array unread(const mx::Shape& shape, mx::Dtype dtype) {
  return true_shapes::Shapes{}.unread(shape, dtype);
}

// Stands in for the device: notes the source of each call and answers with arrays of that shape.
struct Recorder {
  std::filesystem::path folder;
  int written = 0;

  std::vector<mx::array> operator()(const metal::Call& call) {
    metal::set_backend(nullptr);
    std::string name, source;
    mx::export_function((folder / "exported").string(),
                        [&](const std::vector<mx::array>& inputs) {
                          metal::Call traced = call;
                          traced.inputs = inputs;
                          auto outputs = metal::launch(traced, {});
                          const auto& kernel =
                              static_cast<const mx::fast::CustomKernel&>(outputs[0].primitive());
                          name = std::get<0>(kernel.state());
                          source = std::get<1>(kernel.state());
                          return outputs;
                        },
                        call.inputs);
    metal::set_backend(std::ref(*this));
    std::ofstream(folder / (std::to_string(written++) + "_" + call.kernel->name + ".metal"))
        << source;
    std::vector<mx::array> outputs;
    for (size_t i = 0; i < call.shapes.size(); ++i)
      outputs.push_back(unread(call.shapes[i], call.dtypes[i]));
    return outputs;
  }
};

void step(const true_shapes::Shapes& shapes) {
  const moefuse::Plan plan = moefuse::make_plan(shapes.model);
  metal::MetalStep step(plan, Accumulate::exact);
  std::vector<moefuse::LayerCache> caches;
  for (int i = 0; i < plan.config.num_hidden_layers; ++i) {
    const auto cache = [&](int dim) {
      return unread({1, plan.cache.kv_heads, 256, dim}, plan.dtype);
    };
    caches.push_back({cache(plan.cache.key_dim), cache(plan.cache.value_dim)});
  }
  step.run({{7, 0, 20, 0, 20}}, caches);
}

void ops(mx::Dtype dtype, Accumulate accumulate) {
  const auto stack = [&](int rows, int cols) {
    return moefuse::QuantizedExperts{unread({16, rows, cols / 8}, mx::uint32),
                                     unread({16, rows, cols / 64}, dtype),
                                     unread({16, rows, cols / 64}, dtype)};
  };
  moefuse::RouterOptions logits, sigmoid;
  logits.mode = moefuse::RouterMode::logits;
  sigmoid.scoring = moefuse::Scoring::sigmoid;
  const mx::array scores = unread({1, 16}, dtype), x = unread({1, 256}, dtype);
  moefuse::moe_router_argpartition_logits_topk(scores, 4);
  moefuse::moe_router_argpartition_logits_topk(scores, 4, logits);
  moefuse::moe_router_argpartition_logits_topk(scores, 4, sigmoid, unread({16}, mx::float32));
  moefuse::moe_combine_weighted_sum_fp32_no_fma(unread({1, 4, 256}, dtype), unread({1, 4}, dtype),
                                                accumulate);
  moefuse::moe_gather_qmm_swiglu_downproj_combine(x, stack(128, 256), stack(128, 256),
                                                  stack(256, 128), unread({1, 4}, mx::uint32),
                                                  unread({1, 4}, dtype), accumulate);
  moefuse::gather_qmm_swiglu(unread({1, 1, 256}, dtype), stack(128, 256), stack(128, 256),
                             unread({4}, mx::uint32), unread({4}, mx::uint32), true, 64, 4,
                             "affine", accumulate);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: metal_sources FOLDER\n";
    return 2;
  }
  std::filesystem::create_directories(arguments[1]);
  Recorder recorder{arguments[1]};
  metal::set_backend(std::ref(recorder));
  step(true_shapes::qwen());
  step(true_shapes::glm());
  for (const mx::Dtype dtype : {mx::bfloat16, mx::float16, mx::float32})
    for (const Accumulate a : {Accumulate::exact, Accumulate::fp32_no_fma, Accumulate::fp32})
      ops(dtype, a);
  std::filesystem::remove(recorder.folder / "exported");
  std::cout << recorder.written << " sources\n";
}
