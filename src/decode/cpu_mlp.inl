// Router, experts and dense MLPs of the CPU step.
#pragma once

#include "decode/cpu_worker.h"

namespace moefuse {

// Every thread chooses for itself, from the same logits.
template <class A>
void CpuStep<A>::Worker::route(const Router& s) {
  const int k = s.top_k;
  experts_.resize(rows() * k);
  expert_weights_.resize(rows() * k);
  cpu::Row row(s.experts, k);
  for (int r = 0; r < rows(); ++r) {
    const A* logits = shared_.router_logits.data() + int64_t(r) * s.experts;
    uint32_t* experts = experts_.data() + r * k;
    float* weights = expert_weights_.data() + r * k;
    if (s.options.scoring == Scoring::sigmoid) {
      const float* bias = s.correction_bias ? s.correction_bias->template data<float>() : nullptr;
      cpu::route_sigmoid(row, s.options, logits, bias, experts, weights);
    } else {
      std::vector<A> chosen(k);
      cpu::route_softmax(row, s.options, logits, experts, chosen.data());
      std::copy(chosen.begin(), chosen.end(), weights);
    }
  }
  slots_.assign(experts_.data(), rows() * k);
  // Stock multiplies GLM's fp32 weights in fp32 and Qwen's half weights in halves.
  combine_ = kExact<A> && s.options.scoring == Scoring::softmax ? cpu::CombineSteps::dtype
             : shared_.accumulate == Accumulate::fp32           ? cpu::CombineSteps::fp32
                                                                : cpu::CombineSteps::fp32_no_fma;
}

template <class A>
void CpuStep<A>::Worker::run(const Router& s) {
  Inputs<A>& x = normed(s.norm);
  A* logits = shared_.router_logits.data();
  if (s.quantized_gate) {
    products(x, {{view(*s.quantized_gate), logits}});
  } else {
    constexpr int kRows = 16;
    const int hidden = config_.hidden_size;
    team_.share(thread_, (s.experts + kRows - 1) / kRows, [&](int block) {
      const int begin = block * kRows, count = std::min(kRows, s.experts - begin);
      const cpu::RowsArgs gate{
          s.dense_gate->template data<char>() + int64_t(begin) * hidden * s.dense_gate->itemsize(),
          cpu_dtype(s.dense_gate->dtype()), hidden, count, hidden};
      floats_.resize(hidden + kRows);
      for (int r = 0; r < rows(); ++r) {
        std::copy_n(x.vector(r), hidden, floats_.begin());
        float* out = floats_.data() + hidden;
        cpu::kernels().dots(kExact<A>, gate, floats_.data(), 1, out, kRows);
        std::copy_n(out, count, logits + int64_t(r) * s.experts + begin);
      }
    });
  }
  route(s);
}

template <class A>
void CpuStep<A>::Worker::gate_up(Inputs<A>& x, int first, int count,
                                 const cpu::QuantizedMatrix& gate, const cpu::QuantizedMatrix& up,
                                 A* out, int begin, int end, const cpu::Ahead& next) {
  const int64_t width = gate.rows;
  scratch_.resize(std::max<size_t>(scratch_.size(), count * width));
  x.project(gate, first, count, out, width, begin, end, ahead(up, begin));
  x.project(up, first, count, scratch_.data(), width, begin, end,
            next.weight ? next : ahead(gate, end));
  for (int i = 0; i < count; ++i) {
    A* g = out + i * width + begin;
    const A* u = scratch_.data() + i * width + begin;
    if constexpr (kExact<A>)
      cpu::kernels().exact_swiglu(gate.dtype, g, u, g, end - begin);
    else
      cpu::kernels().swiglu(g, u, g, end - begin);
  }
}

template <class A>
void CpuStep<A>::Worker::run(const ExpertsGateUp& s) {
  constexpr int kRows = kWideBlock;
  const int width = s.gate.rows, blocks = (width + kRows - 1) / kRows;
  const int routed = static_cast<int>(slots_.groups.size()) * blocks;
  const int shared_width = s.shared_gate ? s.shared_gate->rows : 0;
  const int k = config_.num_experts_per_tok;
  // A task's first rows: neighbours in the thread's run ask for each other's.
  const auto start = [&](int task) {
    if (task < routed)
      return ahead(view(s.gate, slots_.groups[task / blocks].expert), task % blocks * kRows);
    return s.shared_gate ? ahead(view(*s.shared_gate), (task - routed) * kRows) : cpu::Ahead{};
  };
  team_.share(thread_, routed + (shared_width + kRows - 1) / kRows, [&](int task) {
    if (task >= routed) {
      const int begin = (task - routed) * kRows, end = std::min(begin + kRows, shared_width);
      gate_up(x_, 0, rows(), view(*s.shared_gate), view(*s.shared_up), shared_.shared_inner.data(),
              begin, end);
      return;
    }
    const cpu::Group& group = slots_.groups[task / blocks];
    const int begin = task % blocks * kRows, end = std::min(begin + kRows, width);
    const auto gate = view(s.gate, group.expert), up = view(s.up, group.expert);
    for (int p = group.begin, next; p < group.end; p = next) {
      const int row = slots_.order[p] / k;  // rows that follow each other go in one pass
      for (next = p + 1; next < group.end && slots_.order[next] / k == row + next - p;) ++next;
      gate_up(x_, row, next - p, gate, up, shared_.inner.data() + int64_t(p) * width, begin, end,
              next < group.end ? ahead(gate, begin) : start(task + 1));
    }
  });
}

// hidden[begin, end) += sum of the experts' outputs in down_, and the shared expert's in scratch_.
template <class A>
void CpuStep<A>::Worker::combine_experts(const ExpertsDown& s, int begin, int end) {
  const int hidden = config_.hidden_size, k = config_.num_experts_per_tok;
  const cpu::Dtype dtype = kExact<A> ? shared_.cache_dtype : cpu::Dtype::float32;
  const void* part[kMaxTopK];
  std::vector<A>& sum = normed_;  // free until the next norm
  for (int r = 0; r < rows(); ++r) {
    for (int i = 0; i < k; ++i)
      part[i] = down_.data() + int64_t(slots_.position[r * k + i]) * hidden;
    cpu::kernels().combine(
        {part, expert_weights_.data() + r * k, sum.data(), dtype, dtype, combine_, k}, begin, end);
    A* out = shared_.hidden.data() + int64_t(r) * hidden;
    for (int i = begin; i < end; ++i) {
      A y = sum[i];
      if (s.shared_down) y = y + scratch_[int64_t(r) * hidden + i];
      out[i] = out[i] + y;
    }
  }
}

template <class A>
void CpuStep<A>::Worker::run(const ExpertsDown& s) {
  const int hidden = config_.hidden_size, slots = static_cast<int>(slots_.order.size());
  inner_.set(shared_.inner.data(), slots, s.down.cols);
  down_.resize(int64_t(slots) * hidden);
  if (s.shared_down) {
    shared_inner_.set(shared_.shared_inner.data(), rows(), s.shared_down->cols);
    scratch_.resize(std::max<size_t>(scratch_.size(), int64_t(rows()) * hidden));
  }
  team_.share(thread_, (hidden + kWideBlock - 1) / kWideBlock, [&](int block) {
    const int begin = block * kWideBlock, end = std::min(begin + kWideBlock, hidden);
    for (size_t i = 0; i < slots_.groups.size(); ++i) {
      const cpu::Group& g = slots_.groups[i];
      inner_.project(view(s.down, g.expert), g.begin, g.end - g.begin,
                     down_.data() + int64_t(g.begin) * hidden, hidden, begin, end,
                     i + 1 < slots_.groups.size()
                         ? ahead(view(s.down, slots_.groups[i + 1].expert), begin)
                     : s.shared_down ? ahead(view(*s.shared_down), begin)
                                     : ahead(view(s.down, slots_.groups[0].expert), end));
    }
    if (s.shared_down)
      shared_inner_.project(view(*s.shared_down), scratch_.data(), hidden, begin, end,
                            ahead(view(s.down, slots_.groups[0].expert), end));
    combine_experts(s, begin, end);
  });
}

template <class A>
void CpuStep<A>::Worker::run(const DenseGateUp& s) {
  Inputs<A>& x = normed(s.norm);
  const auto gate = view(s.gate), up = view(s.up);
  team_.share(thread_, (gate.rows + kWideBlock - 1) / kWideBlock, [&](int block) {
    const int begin = block * kWideBlock;
    gate_up(x, 0, rows(), gate, up, shared_.inner.data(), begin,
            std::min(begin + kWideBlock, gate.rows));
  });
}

template <class A>
void CpuStep<A>::Worker::run(const DenseDown& s) {
  inner_.set(shared_.inner.data(), rows(), s.down.cols);
  add_products(inner_, s.down);
}

}  // namespace moefuse
