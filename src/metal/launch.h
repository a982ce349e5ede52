// One dispatch of a kernel text as a node of MLX's graph.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "metal/kernel_table.h"
#include "mlx/fast.h"
#include "mlx/mlx.h"

namespace moefuse::metal {

namespace mx = mlx::core;

struct Groups {
  int x = 1, y = 1, z = 1;
};

// Threadgroups of `size` that n elements need.
inline int blocks(int n, int size) {
  return (n + size - 1) / size;
}

struct Call {
  const KernelText* kernel;
  std::vector<mx::array> inputs;
  std::vector<mx::fast::TemplateArg> args;  // in the order of kernel->template_names
  std::vector<mx::Shape> shapes;            // of the outputs
  std::vector<mx::Dtype> dtypes;
  Groups groups;
  int threads;  // of a threadgroup, one dimension
  // In the step's graph on CUDA: dynamic threadgroup memory, and how many threadgroups a
  // multiprocessor has to have registers for.
  int shared_bytes = 0, resident = 1;
};

// True where MLX has a GPU, Metal's or CUDA's, or a test's backend stands in.
bool available();
bool emulated();  // a test's backend stands in

// True where ops on this stream run the kernels of this table: its device is a GPU.
// While a test's backend stands in, every stream is such a stream.
bool serves(mx::StreamOrDevice s);

// The outputs, not yet evaluated. The node is built once for each combination of kernel, template
// arguments, dtypes and grid, and used again. Without a GPU MLX throws
// std::runtime_error, except while it exports a function.
std::vector<mx::array> launch(const Call& call, mx::StreamOrDevice s);

// Takes the place of the GPU in tests, where an emulator runs the calls; nullptr restores it.
using Backend = std::function<std::vector<mx::array>(const Call&)>;
void set_backend(Backend backend);

}  // namespace moefuse::metal
