// Every GPU kernel of the library: its text and the order of its arguments.
#pragma once

#include <string>
#include <vector>

namespace moefuse::metal {

// Blocks of a cluster, as in cuda/kernels/attend.h.
constexpr int kCluster = 16;

struct KernelText {
  std::string name;
  std::vector<std::string> template_names, input_names, output_names;
  // header: dialect and helpers; body: what fast::metal_kernel or fast::cuda_kernel wraps.
  std::string metal_header, metal_body, cuda_header, cuda_body;
  int cluster = 1;  // blocks along x that meet in a cluster, in CUDA's step
};

// Throws std::invalid_argument on a name that is not in the table.
const KernelText& kernel_text(const std::string& name);

std::vector<std::string> kernel_names();

// CUDA's dialect and every helper: the header of all the texts at once.
std::string cuda_header();

}  // namespace moefuse::metal
