#include "cuda/texts.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <variant>

namespace moefuse::cuda {

namespace {

const char* type_name(mx::Dtype dtype) {
  if (dtype == mx::bfloat16) return "bfloat16_t";
  if (dtype == mx::float16) return "float16_t";
  if (dtype == mx::float32) return "float";
  if (dtype == mx::uint32) return "uint";
  throw std::invalid_argument("[cuda step] dtype: expected a float or uint32, got another");
}

// Behind the function's name: parameters, constants, body.
std::string signature_and_body(const metal::Call& call, int result) {
  const metal::KernelText& k = *call.kernel;
  std::string text = "(";
  for (size_t i = 0; i < call.inputs.size(); ++i)
    text +=
        std::string("const ") + type_name(call.inputs[i].dtype()) + "* " + k.input_names[i] + ", ";
  for (size_t i = 0; i < call.dtypes.size(); ++i)
    text += std::string(i ? ", " : "") + type_name(call.dtypes[i]) +
            (int(i) == result ? "* const* result_at" : "* " + k.output_names[i]);
  text += ") {\n";
  if (result >= 0) text += "auto* " + k.output_names[result] + " = *result_at;\n";
  for (size_t i = 0; i < call.args.size(); ++i) {
    const auto& arg = call.args[i];
    const std::string& name = k.template_names[i];
    if (auto* type = std::get_if<mx::Dtype>(&arg))
      text += "using " + name + " = " + type_name(*type) + ";\n";
    else if (auto* n = std::get_if<int>(&arg))
      text += "constexpr int " + name + " = " + std::to_string(*n) + ";\n";
    else
      text += "constexpr bool " + name + " = " + (std::get<bool>(arg) ? "true" : "false") + ";\n";
  }
  const bool waits = k.cuda_body.find("wait_for_inputs") != std::string::npos;  // CUDA's own texts
  return text + (waits ? "" : "let_next_start();\nwait_for_inputs();\n") + k.cuda_body + "}\n";
}

std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> built;
  return built;
}

}  // namespace

std::string text_of(const metal::Call& call, int result) {
  const int cluster = call.kernel->cluster;
  std::string attributes = "__launch_bounds__(" + std::to_string(call.threads) + ", " +
                           std::to_string(call.resident) + ") ";
  if (cluster > 1)
    attributes = "__cluster_dims__(" + std::to_string(cluster) + ", 1, 1) " + attributes;
  return "extern \"C\" __global__ void " + attributes + "@" + signature_and_body(call, result);
}

std::string assemble(const std::vector<std::string>& texts, const std::vector<std::string>& names) {
  std::string source = metal::cuda_header();
  for (size_t i = 0; i < texts.size(); ++i) {
    const size_t at = texts[i].find('@');
    source += texts[i].substr(0, at) + names[i] + texts[i].substr(at + 1);
  }
  return source;
}

void compile_missing(const std::set<std::string>& texts) {
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  std::vector<std::string> missing, names;
  for (const std::string& text : texts) {
    if (functions().count(text)) continue;
    names.push_back("kernel" + std::to_string(missing.size()));
    missing.push_back(text);
  }
  if (missing.empty()) return;
  const std::vector<Function> built = compile(assemble(missing, names), names);
  for (size_t i = 0; i < missing.size(); ++i) functions()[missing[i]] = built[i];
}

Function function_of(const std::string& text) {
  return functions().at(text);
}

}  // namespace moefuse::cuda
