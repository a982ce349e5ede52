#include "decode/plan.h"

#include "ops/checks.h"

namespace moefuse {

namespace {

template <class... F>
struct Overloads : F... {
  using F::operator()...;
};
template <class... F>
Overloads(F...) -> Overloads<F...>;

std::string shape(const Matrix& m) {
  return std::to_string(m.rows) + " x " + std::to_string(m.cols);
}

struct Size {
  std::string shape;
  int64_t bytes;
};

Size both(const Matrix& a, const Matrix& b, int copies = 1) {
  return {std::to_string(copies) + " x (" + shape(a) + " + " + shape(b) + ")",
          copies * (a.bytes() + b.bytes())};
}

int64_t bytes(const std::optional<Matrix>& m) {
  return m ? m->bytes() : 0;
}

Size router_size(const Router& s) {
  const int hidden = static_cast<int>(s.norm.weight.size());
  const int64_t gate = s.dense_gate ? int64_t(s.dense_gate->nbytes()) : bytes(s.quantized_gate);
  return {std::to_string(s.experts) + " x " + std::to_string(hidden) + ", top " +
              std::to_string(s.top_k),
          gate + int64_t(s.norm.weight.nbytes())};
}

Size size(const Work& work, int top_k) {
  return std::visit(
      Overloads{
          [](const Embed& s) {
            return Size{shape(s.table), s.table.bytes() / s.table.rows};
          },
          [](const GroupedProjection& s) {
            return Size{shape(s.q) + " + 2 x " + shape(s.k),
                        s.q.bytes() + s.k.bytes() + s.v.bytes() + int64_t(s.norm.weight.nbytes())};
          },
          [](const GroupedAttention& s) {
            return Size{std::to_string(s.heads) + " heads on " + std::to_string(s.kv_heads) +
                            ", dim " + std::to_string(s.head_dim),
                        0};
          },
          [](const LatentProjection& s) { return both(s.q_a, s.kv_a); },
          [](const LatentQuery& s) {
            return Size{shape(s.q_b) + ", " + std::to_string(s.heads) + " x " + shape(s.embed_q),
                        s.q_b.bytes() + s.heads * s.embed_q.bytes()};
          },
          [](const LatentAttention& s) {
            return Size{std::to_string(s.heads) + " heads, latent " + std::to_string(s.latent_dim) +
                            " + " + std::to_string(s.rope_dim),
                        0};
          },
          [](const LatentOutput& s) {
            return Size{std::to_string(s.unembed.count) + " x " + shape(s.unembed),
                        s.unembed.count * s.unembed.bytes()};
          },
          [](const OutputProjection& s) {
            return Size{shape(s.o), s.o.bytes()};
          },
          [](const Router& s) { return router_size(s); },
          [=](const ExpertsGateUp& s) {
            Size of = both(s.gate, s.up, top_k);
            of.bytes += bytes(s.shared_gate) + bytes(s.shared_up);
            return of;
          },
          [=](const ExpertsDown& s) {
            return Size{std::to_string(top_k) + " x " + shape(s.down),
                        top_k * s.down.bytes() + bytes(s.shared_down)};
          },
          [](const DenseGateUp& s) { return both(s.gate, s.up); },
          [](const DenseDown& s) {
            return Size{shape(s.down), s.down.bytes()};
          },
          [](const Head& s) {
            return Size{shape(s.lm_head), s.lm_head.bytes()};
          },
      },
      work);
}

}  // namespace

StageInfo Plan::describe(const Stage& stage) const {
  const Size of = size(stage.work, config.num_experts_per_tok);
  return {stage.name, of.shape, stage.layer, of.bytes, 0, 0.0};
}

Plan make_plan(const Model& model) {
  if (model.config.model_type == "qwen3_moe") return qwen3_moe_plan(model);
  if (model.config.model_type == "glm4_moe_lite") return glm4_moe_lite_plan(model);
  fail("model", "model_type", "qwen3_moe or glm4_moe_lite", model.config.model_type);
}

}  // namespace moefuse
