#include "cpu/moe_experts.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/slots.h"

namespace moefuse::cpu {

namespace {

// Rows of a matrix that one task computes: short enough to spread 8 experts of width 768 evenly
// over the threads, long enough that a task's start costs nothing.
constexpr int kBlock = 64;

// The activation vectors that go into one product, laid out as its kernel wants them.
class Vectors {
 public:
  Vectors(const Arithmetic& a, const QuantizedMatrix& w, Dtype dtype, int n)
      : a_(a),
        w_(w),
        dtype_(dtype),
        raw_(int64_t(w.cols) * itemsize(dtype)),
        bytes_(a.exact ? raw_ : kernels().prepared_bytes(a.dot, w.cols, w.group_size, w.bits)),
        data_(n * bytes_ + 64) {}

  void set(int i, const void* x) {
    if (a_.exact) {
      std::copy_n(static_cast<const char*>(x), raw_, at(i));
    } else {
      kernels().prepare(a_.dot, x, dtype_, w_.cols, w_.group_size, w_.bits, at(i));
    }
  }
  void copy(int i, const Vectors& from, int j) { std::copy_n(from.at(j), bytes_, at(i)); }

  // y[p, begin..end) = w * vector p for the group's positions; y is [positions, stride], fp32, or
  // of the activation dtype when exact.
  void project(const QuantizedMatrix& w, const Group& group, char* y, int64_t stride, int begin,
               int end) const {
    if (!a_.exact) {
      kernels().qmv(a_.dot, w, at(group.begin), group.end - group.begin,
                    reinterpret_cast<float*>(y) + group.begin * stride, stride, begin, end, {});
      return;
    }
    for (int p = group.begin; p < group.end; ++p)
      kernels().exact_qmv(w, at(p), y + p * stride * itemsize(w.dtype), begin, end);
  }

 private:
  char* at(int i) { return aligned() + i * bytes_; }
  const char* at(int i) const { return const_cast<Vectors*>(this)->at(i); }
  char* aligned() {
    auto address = reinterpret_cast<uintptr_t>(data_.data());
    return data_.data() + (64 - address % 64) % 64;
  }

  Arithmetic a_;
  QuantizedMatrix w_;
  Dtype dtype_;
  int64_t raw_, bytes_;
  std::vector<char> data_;
};

int blocks(int rows) {
  return (rows + kBlock - 1) / kBlock;
}

// The dtype between the products: exact stays in the activation's, the fp32 modes in fp32.
Dtype inner_dtype(const Arithmetic& a, Dtype dtype) {
  return a.exact ? dtype : Dtype::float32;
}

void activate(const Arithmetic& a, Dtype dtype, char* gate, const char* up, int n) {
  if (a.exact) {
    kernels().exact_swiglu(dtype, gate, up, gate, n);
  } else {
    auto* g = reinterpret_cast<float*>(gate);
    kernels().swiglu(g, reinterpret_cast<const float*>(up), g, n);
  }
}

// h[p] = silu(gate x) * (up x) for every sorted position p, [positions, gate.rows].
std::vector<char> gate_up_swiglu(const ExpertStack& gate, const ExpertStack& up,
                                 const Arithmetic& a, Dtype dtype, const Slots& slots,
                                 const Vectors& x) {
  const int width = gate.first.rows, per_group = blocks(width);
  const int64_t size = itemsize(inner_dtype(a, dtype));
  std::vector<char> h(slots.order.size() * width * size), u(h.size());
  parallel_for(int64_t(slots.groups.size()) * per_group, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const Group& group = slots.groups[task / per_group];
      const int begin = task % per_group * kBlock, end = std::min(begin + kBlock, width);
      x.project(gate.expert(group.expert), group, h.data(), width, begin, end);
      x.project(up.expert(group.expert), group, u.data(), width, begin, end);
      for (int p = group.begin; p < group.end; ++p) {
        const int64_t at = (int64_t(p) * width + begin) * size;
        activate(a, dtype, h.data() + at, u.data() + at, end - begin);
      }
    }
  });
  return h;
}

Vectors sorted_vectors(const Arithmetic& a, const QuantizedMatrix& w, Dtype dtype,
                       const Slots& slots, const void* x, int rows,
                       const std::vector<int>& row_of_slot) {
  Vectors distinct(a, w, dtype, rows), sorted(a, w, dtype, slots.order.size());
  const int64_t row_bytes = int64_t(w.cols) * itemsize(dtype);
  std::vector<char> done(rows);
  for (size_t p = 0; p < slots.order.size(); ++p) {
    const int row = row_of_slot[slots.order[p]];
    if (!done[row]) distinct.set(row, static_cast<const char*>(x) + row * row_bytes);
    done[row] = 1;
    sorted.copy(p, distinct, row);
  }
  return sorted;
}

}  // namespace

QuantizedMatrix ExpertStack::expert(int64_t e) const {
  QuantizedMatrix w = first;
  const bool affine = w.format == Format::affine;
  const int64_t size = affine ? itemsize(w.dtype) : 1;
  const int64_t groups = int64_t(w.rows) * (w.cols / w.group_size) * size;
  w.weight += e * w.rows * (int64_t(w.cols) * w.bits / 32);
  w.scales = static_cast<const char*>(w.scales) + e * groups;
  if (affine) w.biases = static_cast<const char*>(w.biases) + e * groups;
  return w;
}

void moe_experts(const ExpertsArgs& args) {
  const int n = args.rows * args.k, width = args.down.first.rows;
  const Slots slots(args.indices, n);
  std::vector<int> row(n);
  for (int i = 0; i < n; ++i) row[i] = i / args.k;
  const auto x =
      sorted_vectors(args.arithmetic, args.gate.first, args.dtype, slots, args.x, args.rows, row);
  const auto h = gate_up_swiglu(args.gate, args.up, args.arithmetic, args.dtype, slots, x);

  const Dtype inner = inner_dtype(args.arithmetic, args.dtype);
  Vectors hidden(args.arithmetic, args.down.first, inner, n);
  const int64_t h_bytes = args.down.first.cols * itemsize(inner);
  parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) hidden.set(p, h.data() + p * h_bytes);
  });

  const int64_t y_bytes = width * itemsize(inner), out_bytes = width * itemsize(args.dtype);
  std::vector<char> y(n * y_bytes);
  parallel_for(blocks(width), [&](int64_t first, int64_t last) {
    const int begin = first * kBlock, end = std::min<int>(last * kBlock, width);
    for (const Group& group : slots.groups)
      hidden.project(args.down.expert(group.expert), group, y.data(), width, begin, end);
    std::vector<const void*> part(args.k);
    for (int r = 0; r < args.rows; ++r) {
      for (int i = 0; i < args.k; ++i)
        part[i] = y.data() + slots.position[r * args.k + i] * y_bytes;
      kernels().combine(
          {part.data(), args.weights + r * args.k, static_cast<char*>(args.out) + r * out_bytes,
           inner, args.dtype, args.combine, args.k},
          begin, end);
    }
  });
}

void gather_qmm_swiglu(const GatherSwigluArgs& args) {
  const int n = args.batches * args.m;
  int rows = 0;
  std::vector<int> row(n);
  std::vector<uint32_t> expert(n);
  for (int i = 0; i < n; ++i) {
    row[i] = args.matrix[i / args.m] * args.m + i % args.m;
    expert[i] = args.expert[i / args.m];
    rows = std::max(rows, row[i] + 1);
  }
  const Slots slots(expert.data(), n);
  const auto x =
      sorted_vectors(args.arithmetic, args.gate.first, args.dtype, slots, args.x, rows, row);
  const auto h = gate_up_swiglu(args.gate, args.up, args.arithmetic, args.dtype, slots, x);
  const int width = args.gate.first.rows;
  const Dtype inner = inner_dtype(args.arithmetic, args.dtype);
  const float one = 1.0f;
  for (int p = 0; p < n; ++p) {
    const char* from = h.data() + p * width * itemsize(inner);
    char* to = static_cast<char*>(args.out) + slots.order[p] * width * itemsize(args.dtype);
    if (inner == args.dtype) {
      std::copy_n(from, width * itemsize(inner), to);
    } else {  // a weighted sum of one part of weight one is the cast
      const void* part = from;
      kernels().combine({&part, &one, to, inner, args.dtype, CombineSteps::fp32_no_fma, 1}, 0,
                        width);
    }
  }
}

void prefill_linear(const LinearArgs& args) {
  const int width = args.w.rows;
  const int64_t x_bytes = int64_t(args.w.cols) * itemsize(args.dtype), size = itemsize(args.dtype);
  Vectors x(args.arithmetic, args.w, args.dtype, args.rows);
  parallel_for(args.rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) x.set(r, static_cast<const char*>(args.x) + r * x_bytes);
  });
  const Group all = {0, 0, args.rows};
  const bool in_place = inner_dtype(args.arithmetic, args.dtype) == args.dtype;
  auto* out = static_cast<char*>(args.out);
  std::vector<char> sums(in_place ? 0 : int64_t(args.rows) * width * sizeof(float));
  parallel_for(blocks(width), [&](int64_t first, int64_t last) {
    for (int begin = first * kBlock; begin < std::min<int>(last * kBlock, width); begin += kBlock) {
      const int end = std::min(begin + kBlock, width);
      x.project(args.w, all, in_place ? out : sums.data(), width, begin, end);
      const float one = 1.0f;
      for (int r = 0; r < args.rows && !in_place; ++r) {  // a sum of one part of weight one: a cast
        const void* part = sums.data() + int64_t(r) * width * sizeof(float);
        kernels().combine({&part, &one, out + r * width * size, Dtype::float32, args.dtype,
                           CombineSteps::fp32_no_fma, 1},
                          begin, end);
      }
    }
  });
}

}  // namespace moefuse::cpu
