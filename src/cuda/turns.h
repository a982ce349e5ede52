// Device memory for what our own launches give to MLX's graph, without asking for it each time.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "mlx/mlx.h"

namespace moefuse::cuda {

namespace mx = mlx::core;

inline mx::array device_zeros(const mx::Shape& shape, mx::Dtype dtype) {
  return mx::zeros(shape, dtype, mx::Device::gpu);
}

// Arrays of one kind, each taken again when nobody has it still: whoever read it is in front of
// what is launched next on the same stream.
class Turns {
 public:
  Turns(mx::Shape shape, mx::Dtype dtype, size_t most)
      : shape_(std::move(shape)), dtype_(dtype), most_(most) {}

  // Evaluated, or on its way. A caller who keeps many gets as many, of which `most` come back.
  mx::array take() {
    for (const mx::array& a : arrays_)
      if (a.is_donatable()) return a;
    mx::array fresh = device_zeros(shape_, dtype_);
    mx::async_eval(fresh);
    if (arrays_.size() < most_) arrays_.push_back(fresh);
    return fresh;
  }
  // Whether its memory stays when its last user has gone.
  bool keeps(const mx::array& a) const {
    const auto same = [&](const mx::array& kept) {
      return kept.buffer().ptr() == a.buffer().ptr();
    };
    return std::any_of(arrays_.begin(), arrays_.end(), same);
  }

 private:
  mx::Shape shape_;
  mx::Dtype dtype_;
  size_t most_;
  std::vector<mx::array> arrays_;
};

}  // namespace moefuse::cuda
