// Every Metal kernel of the library: its text and the order of its arguments.
#pragma once

#include <string>
#include <vector>

namespace moefuse::metal {

struct KernelText {
  std::string name;
  std::vector<std::string> template_names, input_names, output_names;
  std::string header, body;  // header: dialect and helpers; body: what fast::metal_kernel wraps
};

// Throws std::invalid_argument on a name that is not in the table.
const KernelText& kernel_text(const std::string& name);

std::vector<std::string> kernel_names();

}  // namespace moefuse::metal
