// Named tensors as the matrices and vectors of a plan, each checked against the configuration.
#pragma once

#include <string>

#include "moefuse/model.h"

namespace moefuse {

// An affine-quantised matrix [rows, cols] in MLX's layout, or a stack of them: weight uint32
// [count, rows, cols * bits / 32], scales and biases [count, rows, cols / group_size].
struct Matrix {
  mx::array weight, scales, biases;
  int count, rows, cols, group_size, bits;

  int64_t bytes() const {  // of one matrix
    return (weight.nbytes() + scales.nbytes() + biases.nbytes()) / count;
  }
};

struct Norm {
  mx::array weight;
  float eps;
};

class WeightReader {
 public:
  // The model's dtype is that of its embedding's scales.
  explicit WeightReader(const Model& model);

  bool has(const std::string& name) const;
  mx::Dtype dtype() const { return dtype_; }

  // "name.weight", "name.scales" and "name.biases"; bits and group_size follow from their shapes.
  Matrix matrix(const std::string& name, int rows, int cols) const;
  Matrix stack(const std::string& name, int count, int rows, int cols) const;
  // A dense tensor of that shape in the model's dtype.
  mx::array dense(const std::string& name, const mx::Shape& shape) const;
  // The same converted to float32, of any floating dtype.
  mx::array floats(const std::string& name, const mx::Shape& shape) const;
  Norm norm(const std::string& name, int size) const;

 private:
  const mx::array& tensor(const std::string& name) const;
  Matrix quantized(const std::string& name, mx::Shape shape) const;

  const Model& model_;
  mx::Dtype dtype_;
};

}  // namespace moefuse
