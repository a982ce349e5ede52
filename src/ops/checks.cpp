#include "ops/checks.h"

#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "metal/launch.h"
#include "mlx/backend/common/utils.h"
#include "mlx/dtype_utils.h"

namespace moefuse {

namespace {
std::mutex counter_mutex;
std::map<std::string, int64_t>& counters() {
  static std::map<std::string, int64_t> map;
  return map;
}
}  // namespace

std::string describe(const mx::Shape& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

std::string describe(mx::Dtype dtype) {
  std::ostringstream text;
  text << dtype;
  return text.str();
}

void check_float(const std::string& op, const std::string& what, const mx::array& a) {
  auto t = a.dtype();
  if (t != mx::float32 && t != mx::float16 && t != mx::bfloat16)
    fail(op, what, "float32, float16 or bfloat16", describe(t));
}

void check_dtype(const std::string& op, const std::string& what, const mx::array& a,
                 mx::Dtype dtype) {
  if (a.dtype() != dtype) fail(op, what, describe(dtype), describe(a.dtype()));
}

void check_shape(const std::string& op, const std::string& what, const mx::array& a,
                 const mx::Shape& shape) {
  if (a.shape() != shape) fail(op, what, "shape " + describe(shape), describe(a.shape()));
}

void check_integer(const std::string& op, const std::string& what, const mx::array& a) {
  if (!mx::issubdtype(a.dtype(), mx::integer)) fail(op, what, "integers", describe(a.dtype()));
}

void check_quantization(const std::string& op, int group_size, int bits, const std::string& of) {
  if (bits != 4 && bits != 8) fail(op, of + "bits", "4 or 8", std::to_string(bits));
  if (group_size != 32 && group_size != 64 && group_size != 128)
    fail(op, of + "group_size", "32, 64 or 128", std::to_string(group_size));
}

namespace {

template <class Enum, size_t n>
Enum named(const std::string& op, const std::string& what, const std::string& name,
           const std::pair<const char*, Enum> (&choices)[n]) {
  std::string all;
  for (auto& [text, value] : choices) {
    if (name == text) return value;
    all += (all.empty() ? "'" : ", '") + std::string(text) + "'";
  }
  fail(op, what, "one of " + all, "'" + name + "'");
}

}  // namespace

Quantization::Quantization(const std::string& op, const std::string& mode, int group_size, int bits)
    : format(named<cpu::Format>(op, "mode", mode,
                                {{"affine", cpu::Format::affine},
                                 {"mxfp4", cpu::Format::mxfp4},
                                 {"nvfp4", cpu::Format::nvfp4}})),
      group_size(group_size),
      bits(bits) {
  if (format == cpu::Format::affine) {
    check_quantization(op, group_size, bits);
    return;
  }
  const int groups = format == cpu::Format::mxfp4 ? 32 : 16;
  if (bits != 4) fail(op, "bits", "4 for " + mode, std::to_string(bits));
  if (group_size != groups)
    fail(op, "group_size", std::to_string(groups) + " for " + mode, std::to_string(group_size));
}

ExpertShape check_experts(const std::string& op, const std::string& what, const QuantizedExperts& w,
                          mx::Dtype dtype, const Quantization& quantization) {
  const int group_size = quantization.group_size, bits = quantization.bits;
  const bool affine = quantization.format == cpu::Format::affine;
  check_dtype(op, what + ".weight", w.weight, mx::uint32);
  check_dtype(op, what + ".scales", w.scales, affine ? dtype : mx::uint8);
  if (affine != w.biases.has_value())
    fail(op, what + ".biases", affine ? "an array in mode 'affine'" : "none in an fp4 mode",
         affine ? "none" : describe(w.biases->shape()));
  if (affine) check_dtype(op, what + ".biases", *w.biases, dtype);
  if (w.weight.ndim() != 3)
    fail(op, what + ".weight", "rank 3 [experts, N, words]", describe(w.weight.shape()));
  const int experts = w.weight.shape(0), rows = w.weight.shape(1);
  const int cols = w.weight.shape(2) * (32 / bits);
  if (cols % group_size != 0 || cols == 0)
    fail(op, what + ".weight", "K a multiple of group_size " + std::to_string(group_size),
         "K " + std::to_string(cols) + " at " + std::to_string(bits) + " bits");
  const mx::Shape groups = {experts, rows, cols / group_size};
  check_shape(op, what + ".scales", w.scales, groups);
  if (affine) check_shape(op, what + ".biases", *w.biases, groups);
  return {experts, rows, cols};
}

mx::array row_contiguous(const mx::array& a, mx::StreamOrDevice s) {
  if (a.is_available() && a.flags().row_contiguous) return a;
  return mx::contiguous(a, false, s);
}

cpu::Dtype cpu_dtype(mx::Dtype dtype) {
  if (dtype == mx::float32) return cpu::Dtype::float32;
  return dtype == mx::float16 ? cpu::Dtype::float16 : cpu::Dtype::bfloat16;
}

void append_experts(std::vector<mx::array>& inputs, const QuantizedExperts& w,
                    mx::StreamOrDevice s) {
  inputs.push_back(row_contiguous(w.weight, s));
  inputs.push_back(row_contiguous(w.scales, s));
  if (w.biases) inputs.push_back(row_contiguous(*w.biases, s));
}

cpu::ExpertStack expert_stack(const std::vector<mx::array>& inputs, int first, int i,
                              const Quantization& quantization, mx::Dtype dtype) {
  const auto [format, group_size, bits] = quantization;
  const bool affine = format == cpu::Format::affine;
  const mx::array* part = &inputs[first + i * (affine ? 3 : 2)];
  const mx::array& weight = part[0];
  return {
      {weight.data<uint32_t>(), part[1].data<char>(), affine ? part[2].data<char>() : nullptr,
       cpu_dtype(dtype), weight.shape(1), weight.shape(2) * (32 / bits), group_size, bits, format},
      weight.shape(0)};
}

// The grid is finer than bfloat16 and float16 activations need and coarser than float32's own.
cpu::Arithmetic cpu_arithmetic(Accumulate accumulate, mx::Dtype dtype) {
  if (dtype != mx::float32) return {accumulate == Accumulate::exact, cpu::Dot::grid};
  return {accumulate == Accumulate::exact,
          accumulate == Accumulate::fp32 ? cpu::Dot::fma : cpu::Dot::separate};
}

namespace {

template <class T>
void check_index(const std::string& op, int64_t i, T value, int experts) {
  if (std::cmp_less(value, 0) || std::cmp_greater_equal(value, experts))
    fail(op, "indices[" + std::to_string(i) + "]", "less than " + std::to_string(experts),
         std::to_string(value));
}

}  // namespace

// A negative index has come here as its 32 bits.
void check_indices(const std::string& op, const uint32_t* indices, int64_t size, int experts) {
  for (int64_t i = 0; i < size; ++i) check_index(op, i, static_cast<int32_t>(indices[i]), experts);
}

void check_known_indices(const std::string& op, const mx::array& indices, int experts) {
  if (!indices.is_available()) return;
  mx::dispatch_int_types(indices.dtype(), op, [&](auto type) {
    const auto* values = indices.data<MLX_GET_TYPE(type)>();
    for (int i = 0; i < static_cast<int>(indices.size()); ++i)
      check_index(op, i, values[mx::elem_to_loc(i, indices)], experts);
  });
}

void count(const std::string& op, const std::string& how) {
  std::lock_guard lock(counter_mutex);
  ++counters()[op + "/" + how];
}

Path choose_path(const std::string& op, mx::StreamOrDevice s, const std::string& metal_refusal) {
  const bool on_metal = metal::serves(s);
  if (on_metal && metal_refusal.empty()) return Path::metal;
  if (!on_metal && mx::to_stream(s).device == mx::Device::cpu) {
    cpu::check_settings();
    return Path::cpu;
  }
  count(op, "stock: " + (on_metal ? metal_refusal : "no kernel for this GPU"));
  return Path::stock;
}

std::map<std::string, int64_t> op_counters() {
  std::lock_guard lock(counter_mutex);
  return counters();
}

std::string cpu_isa() {
  return cpu::kernels().isa;
}

Accumulate accumulate_from(const std::string& name) {
  return named<Accumulate>("moefuse", "accumulate", name,
                           {{"exact", Accumulate::exact},
                            {"fp32_no_fma", Accumulate::fp32_no_fma},
                            {"fp32", Accumulate::fp32}});
}

Scoring scoring_from(const std::string& name) {
  return named<Scoring>("moefuse", "scoring", name,
                        {{"softmax", Scoring::softmax}, {"sigmoid", Scoring::sigmoid}});
}

RouterMode router_mode_from(const std::string& name) {
  return named<RouterMode>("moefuse", "mode", name,
                           {{"exact", RouterMode::exact}, {"logits", RouterMode::logits}});
}

PrefillForm prefill_form_from(const std::string& name) {
  return named<PrefillForm>("moefuse", "form", name,
                            {{"device", PrefillForm::device},
                             {"kernels", PrefillForm::kernels},
                             {"blocks", PrefillForm::blocks}});
}

std::string to_string(Accumulate accumulate) {
  switch (accumulate) {
    case Accumulate::exact:
      return "exact";
    case Accumulate::fp32_no_fma:
      return "fp32_no_fma";
    default:
      return "fp32";
  }
}

}  // namespace moefuse
