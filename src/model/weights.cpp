#include "model/weights.h"

#include "ops/checks.h"

namespace moefuse {

namespace {

constexpr const char* kWhere = "model";

// A kernel reads the very buffer, so it has to exist and to be in order.
const mx::array& readable(const std::string& name, const mx::array& a) {
  try {
    const_cast<mx::array&>(a).eval();
  } catch (const std::exception& error) {  // read only now, from a file that may have changed
    fail(kWhere, name, "data that can be read", error.what());
  }
  if (!a.flags().row_contiguous) fail(kWhere, name, "a row contiguous array", "a strided view");
  return a;
}

}  // namespace

WeightReader::WeightReader(const Model& model) : model_(model), dtype_(mx::float32) {
  const std::string scales = "model.embed_tokens.scales";
  if (!has(scales)) fail(kWhere, scales, "affine-quantised weights", "no such tensor");
  if (!has("model.embed_tokens.biases"))
    fail(kWhere, "model.embed_tokens", "affine quantisation (weight, scales, biases)", "no biases");
  check_float(kWhere, scales, tensor(scales));
  dtype_ = tensor(scales).dtype();
}

bool WeightReader::has(const std::string& name) const {
  return model_.weights.count(name) > 0;
}

const mx::array& WeightReader::tensor(const std::string& name) const {
  const auto found = model_.weights.find(name);
  if (found == model_.weights.end()) fail(kWhere, name, "a tensor", "none of that name");
  return found->second;
}

Matrix WeightReader::quantized(const std::string& name, mx::Shape shape) const {
  if (has(name + ".bias")) fail(kWhere, name + ".bias", "no bias", "one");
  const mx::array& weight = readable(name + ".weight", tensor(name + ".weight"));
  if (!has(name + ".scales")) fail(kWhere, name, "affine-quantised weights", "dense ones");
  if (!has(name + ".biases"))
    fail(kWhere, name, "affine quantisation (weight, scales, biases)", "no biases");
  const mx::array& scales = readable(name + ".scales", tensor(name + ".scales"));
  const mx::array& biases = readable(name + ".biases", tensor(name + ".biases"));
  check_dtype(kWhere, name + ".weight", weight, mx::uint32);
  check_dtype(kWhere, name + ".scales", scales, dtype_);
  check_dtype(kWhere, name + ".biases", biases, dtype_);

  const int cols = shape.back();
  const int64_t words = weight.ndim() ? weight.shape(-1) : 0;
  const int64_t groups = scales.ndim() ? scales.shape(-1) : 0;
  const int bits = static_cast<int>(words * 32 / cols);
  const int group_size = groups > 0 ? static_cast<int>(cols / groups) : 0;
  if (words * 32 != int64_t(bits) * cols || groups * group_size != cols)
    fail(kWhere, name, std::to_string(cols) + " columns",
         describe(weight.shape()) + " words and scales " + describe(scales.shape()));
  check_quantization(kWhere, group_size, bits, name + " ");
  shape.back() = static_cast<int>(words);
  check_shape(kWhere, name + ".weight", weight, shape);
  shape.back() = static_cast<int>(groups);
  check_shape(kWhere, name + ".scales", scales, shape);
  check_shape(kWhere, name + ".biases", biases, shape);
  const int count = shape.size() == 3 ? shape[0] : 1;
  return {weight, scales, biases, count, shape[shape.size() - 2], cols, group_size, bits};
}

Matrix WeightReader::matrix(const std::string& name, int rows, int cols) const {
  return quantized(name, {rows, cols});
}

Matrix WeightReader::stack(const std::string& name, int count, int rows, int cols) const {
  return quantized(name, {count, rows, cols});
}

mx::array WeightReader::dense(const std::string& name, const mx::Shape& shape) const {
  const mx::array& a = readable(name, tensor(name));
  check_dtype(kWhere, name, a, dtype_);
  check_shape(kWhere, name, a, shape);
  return a;
}

mx::array WeightReader::floats(const std::string& name, const mx::Shape& shape) const {
  check_float(kWhere, name, tensor(name));
  check_shape(kWhere, name, tensor(name), shape);
  return readable(name, mx::contiguous(mx::astype(tensor(name), mx::float32, mx::Device::cpu),
                                       false, mx::Device::cpu));
}

Norm WeightReader::norm(const std::string& name, int size) const {
  return {dense(name + ".weight", {size}), model_.config.rms_norm_eps};
}

}  // namespace moefuse
