#include "metal/launch.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "mlx/backend/cuda/cuda.h"

namespace moefuse::metal {

namespace {

Backend& backend() {
  static Backend instance;
  return instance;
}

int64_t key_of(const mx::fast::TemplateArg& arg) {
  if (auto* i = std::get_if<int>(&arg)) return *i;
  if (auto* b = std::get_if<bool>(&arg)) return *b;
  return static_cast<int64_t>(std::get<mx::Dtype>(arg).val());
}

// Everything that MLX bakes into the node: the text, its arguments, the grid, the stream, and of
// each input its dtype and whether it is small enough to come as `constant` (fewer than 8
// elements).
std::vector<int64_t> key_of(const Call& call, const mx::Stream& s) {
  std::vector<int64_t> key = {reinterpret_cast<int64_t>(call.kernel),
                              s.index,
                              call.groups.x,
                              call.groups.y,
                              call.groups.z,
                              call.threads};
  for (const auto& arg : call.args) key.push_back(key_of(arg));
  for (const auto& in : call.inputs) {
    key.push_back(static_cast<int64_t>(in.dtype().val()) * 4 + (in.size() < 8) * 2 +
                  (in.ndim() == 0));
  }
  return key;
}

mx::fast::CustomKernelFunction& function_of(const KernelText& k) {
  static std::map<const KernelText*, mx::fast::CustomKernelFunction> built;
  auto found = built.find(&k);
  if (found == built.end()) {
    found = built
                .emplace(&k, mx::cu::is_available()
                                 ? mx::fast::cuda_kernel(k.name, k.input_names, k.output_names,
                                                         k.cuda_body, k.cuda_header)
                                 : mx::fast::metal_kernel(k.name, k.input_names, k.output_names,
                                                          k.metal_body, k.metal_header))
                .first;
  }
  return found->second;
}

std::vector<mx::array> build(const Call& call, mx::StreamOrDevice s) {
  std::vector<std::pair<std::string, mx::fast::TemplateArg>> args;
  for (size_t i = 0; i < call.args.size(); ++i) {
    args.emplace_back(call.kernel->template_names[i], call.args[i]);
  }
  const auto& g = call.groups;
  return function_of(*call.kernel)(call.inputs, call.shapes, call.dtypes,
                                   {g.x * call.threads, g.y, g.z}, {call.threads, 1, 1},
                                   std::move(args), std::nullopt, false, s);
}

void check(const Call& call) {
  const KernelText& k = *call.kernel;
  if (call.args.size() != k.template_names.size() || call.inputs.size() != k.input_names.size() ||
      call.shapes.size() != k.output_names.size() || call.dtypes.size() != call.shapes.size()) {
    throw std::invalid_argument("[metal] " + k.name + ": expected as many arguments as its " +
                                "signature has, got others");
  }
}

}  // namespace

bool available() {
  return backend() != nullptr || mx::metal::is_available() || mx::cu::is_available();
}

bool emulated() {
  return backend() != nullptr;
}

bool serves(mx::StreamOrDevice s) {
  if (backend() != nullptr) return true;
  return available() && mx::to_stream(s).device == mx::Device::gpu;
}

void set_backend(Backend b) {
  backend() = std::move(b);
}

std::vector<mx::array> launch(const Call& call, mx::StreamOrDevice s) {
  check(call);
  if (backend()) return backend()(call);
  // Without a GPU, MLX records the node where it exports a function, and throws elsewhere.
  if (!available()) return build(call, s);
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, std::shared_ptr<mx::Primitive>> nodes;
  const mx::Stream stream = std::holds_alternative<std::monostate>(s)
                                ? mx::default_stream(mx::Device::gpu)
                                : mx::to_stream(s);
  std::lock_guard lock(mutex);
  auto& node = nodes[key_of(call, stream)];
  if (node) return mx::array::make_arrays(call.shapes, call.dtypes, node, call.inputs);
  auto outputs = build(call, stream);
  node = outputs.front().primitive_ptr();
  return outputs;
}

}  // namespace moefuse::metal
