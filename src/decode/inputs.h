// Activation vectors on their way into matrix products. A is the activations' type: a half type
// where the step keeps stock's bits (exact), float in the fp32 modes.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "model/weights.h"
#include "ops/checks.h"

namespace moefuse {

template <class A>
constexpr bool kExact = !std::is_same_v<A, float>;

inline cpu::QuantizedMatrix view(const Matrix& m, int64_t index = 0) {
  const int64_t words = int64_t(m.rows) * m.cols * m.bits / 32;
  const int64_t groups = int64_t(m.rows) * (m.cols / m.group_size) * m.scales.itemsize();
  return {m.weight.data<uint32_t>() + index * words,
          m.scales.data<char>() + index * groups,
          m.biases.data<char>() + index * groups,
          cpu_dtype(m.scales.dtype()),
          m.rows,
          m.cols,
          m.group_size,
          m.bits};
}

// The rows of w from `row` on, as what will be read next.
inline cpu::Ahead ahead(const cpu::QuantizedMatrix& w, int row) {
  const int64_t groups = int64_t(row) * (w.cols / w.group_size) * cpu::itemsize(w.dtype);
  return {w.weight + int64_t(row) * w.cols * w.bits / 32,
          static_cast<const char*>(w.scales) + groups, static_cast<const char*>(w.biases) + groups};
}

template <class A>
class Inputs {
 public:
  explicit Inputs(cpu::Dot dot) : dot_(dot) {}

  // The vectors from[i * cols], i < count. They are read again until the next set().
  void set(const A* from, int count, int cols) {
    from_ = from;
    count_ = count;
    cols_ = cols;
    bits_ = 0;
  }

  // y[(i - first) * y_stride + n] = (w x_i)[n] for n in [begin, end), i in [first, first + count).
  // next: what the thread reads afterwards, if that is not w's next rows.
  void project(const cpu::QuantizedMatrix& w, int first, int count, A* y, int64_t y_stride,
               int begin, int end, const cpu::Ahead& next = {}) {
    if constexpr (kExact<A>) {
      for (int i = 0; i < count; ++i)
        cpu::kernels().exact_qmv(w, from_ + int64_t(first + i) * cols_, y + i * y_stride, begin,
                                 end);
    } else {
      if (w.bits != bits_ || w.group_size != group_size_) lay_out(w);
      cpu::kernels().qmv(dot_, w, aligned() + first * bytes_, count, y, y_stride, begin, end, next);
    }
  }
  void project(const cpu::QuantizedMatrix& w, A* y, int64_t y_stride, int begin, int end,
               const cpu::Ahead& next = {}) {
    project(w, 0, count_, y, y_stride, begin, end, next);
  }
  const A* vector(int i) const { return from_ + int64_t(i) * cols_; }

 private:
  // The kernels want the vectors in the order of the weights' bits.
  void lay_out(const cpu::QuantizedMatrix& w) {
    bits_ = w.bits;
    group_size_ = w.group_size;
    bytes_ = cpu::kernels().prepared_bytes(dot_, cols_, group_size_, bits_);
    data_.resize(std::max<size_t>(data_.size(), count_ * bytes_ + 64));
    for (int i = 0; i < count_; ++i)
      cpu::kernels().prepare(dot_, vector(i), cpu::Dtype::float32, cols_, group_size_, bits_,
                             aligned() + i * bytes_);
  }
  char* aligned() {
    const auto address = reinterpret_cast<uintptr_t>(data_.data());
    return data_.data() + (64 - address % 64) % 64;
  }

  cpu::Dot dot_;
  const A* from_ = nullptr;
  int count_ = 0, cols_ = 0, bits_ = 0, group_size_ = 0;
  int64_t bytes_ = 0;
  std::vector<char> data_;
};

}  // namespace moefuse
