// CUDA functions by their text, compiled once for all models of the process.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "metal/launch.h"

namespace moefuse::cuda {

namespace mx = mlx::core;

// A call's text: a function named @ with the kernel's parameters and the template arguments as
// constants. Where output `result` goes stands in memory: it changes from launch to launch.
std::string text_of(const metal::Call& call, int result = -1);

// All of these behind the dialect and the helpers, each under a name in the place of its @.
std::string assemble(const std::vector<std::string>& texts, const std::vector<std::string>& names);

// Compiles those that no model of the process has used yet.
void compile_missing(const std::set<std::string>& texts);
// Of a text that was compiled.
Function function_of(const std::string& text);

}  // namespace moefuse::cuda
