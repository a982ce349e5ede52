// Embedding, norms and matrix products of the CPU step.
#pragma once

#include "decode/cpu_worker.h"

namespace moefuse {

// exact: the mean square as a sequential fp32 sum, two roundings at the end, as stock MLX has it.
template <class A>
void CpuStep<A>::Worker::norm(const Norm& norm, const A* x, A* out) const {
  const A* weight = norm.weight.data<A>();
  const int n = static_cast<int>(norm.weight.size());
  if constexpr (kExact<A>) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
      const auto v = static_cast<float>(x[i]);
      sum = sum + v * v;
    }
    const float scale = 1.0f / std::sqrt(sum * (1.0f / static_cast<float>(n)) + norm.eps);
    for (int i = 0; i < n; ++i)
      out[i] = static_cast<A>(static_cast<float>(x[i]) * scale) * weight[i];
  } else {
    cpu::kernels().rms_norm(x, weight, norm.eps, n, out);
  }
}

template <class A>
Inputs<A>& CpuStep<A>::Worker::normed(const Norm& norm) {
  const int hidden = config_.hidden_size;
  normed_.resize(int64_t(rows()) * hidden);
  for (int r = 0; r < rows(); ++r)
    this->norm(norm, shared_.hidden.data() + int64_t(r) * hidden,
               normed_.data() + int64_t(r) * hidden);
  x_.set(normed_.data(), rows(), hidden);
  return x_;
}

template <class A>
void CpuStep<A>::Worker::products(Inputs<A>& x, std::initializer_list<Product> list) {
  int blocks = 0;
  for (const Product& p : list) blocks += (p.w.rows + kBlock - 1) / kBlock;
  team_.share(thread_, blocks, [&](int block) {
    const Product* p = list.begin();
    for (int n; block >= (n = (p->w.rows + kBlock - 1) / kBlock); ++p) block -= n;
    const int begin = block * kBlock;
    x.project(p->w, p->y, p->w.rows, begin, std::min(begin + kBlock, p->w.rows));
  });
}

template <class A>
void CpuStep<A>::Worker::add_products(Inputs<A>& x, const Matrix& w) {
  const cpu::QuantizedMatrix matrix = view(w);
  const int hidden = config_.hidden_size;
  scratch_.resize(int64_t(rows()) * hidden);
  team_.share(thread_, (hidden + kBlock - 1) / kBlock, [&](int block) {
    const int begin = block * kBlock, end = std::min(begin + kBlock, hidden);
    x.project(matrix, scratch_.data(), hidden, begin, end);
    for (int r = 0; r < rows(); ++r) {
      const int64_t at = int64_t(r) * hidden;
      for (int i = begin; i < end; ++i)
        shared_.hidden[at + i] = shared_.hidden[at + i] + scratch_[at + i];
    }
  });
}

template <class A>
void CpuStep<A>::Worker::run(const Embed& s) {
  const Matrix& t = s.table;
  const int words = t.cols * t.bits / 32, groups = t.cols / t.group_size, per_word = 32 / t.bits;
  team_.share(thread_, rows(), [&](int r) {
    const int64_t token = shared_.rows[r].token;
    const uint32_t* word = t.weight.data<uint32_t>() + token * words;
    A* out = shared_.hidden.data() + int64_t(r) * t.cols;
    cpu::with_float_type(t.scales.dtype(), [&](auto zero) {
      using T = decltype(zero);
      const T* scale = t.scales.data<T>() + token * groups;
      const T* bias = t.biases.data<T>() + token * groups;
      for (int k = 0; k < t.cols; ++k) {
        const uint32_t q = word[k / per_word] >> (k % per_word * t.bits) & ((1u << t.bits) - 1);
        const int g = k / t.group_size;
        out[k] = static_cast<A>(static_cast<A>(scale[g]) * static_cast<A>(float(q))) +
                 static_cast<A>(bias[g]);
      }
    });
  });
}

template <class A>
void CpuStep<A>::Worker::run(const GroupedProjection& s) {
  products(normed(s.norm), {{view(s.q), shared_.q.data()},
                            {view(s.k), shared_.k.data()},
                            {view(s.v), shared_.v.data()}});
}

template <class A>
void CpuStep<A>::Worker::run(const LatentProjection& s) {
  products(normed(s.norm), {{view(s.q_a), shared_.q.data()}, {view(s.kv_a), shared_.k.data()}});
}

template <class A>
void CpuStep<A>::Worker::run(const OutputProjection& s) {
  inner_.set(shared_.attended.data(), rows(), s.o.cols);
  add_products(inner_, s.o);
}

template <class A>
void CpuStep<A>::Worker::run(const Head& s) {
  products(normed(s.norm), {{view(s.lm_head), shared_.logits}});
}

}  // namespace moefuse
