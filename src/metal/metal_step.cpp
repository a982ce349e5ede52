#include "metal/metal_step.h"

#include "metal/step_limits.h"

namespace moefuse::metal {

namespace {

const char* kernel_of(const Embed&) {
  return "embed";
}
const char* kernel_of(const GroupedProjection&) {
  return "norm_qkv";
}
const char* kernel_of(const GroupedAttention&) {
  return "attention_gqa";
}
const char* kernel_of(const LatentProjection&) {
  return "norm_qkv";
}
const char* kernel_of(const LatentQuery&) {
  return "norm_qkv";
}
const char* kernel_of(const LatentAttention&) {
  return "attention_mla";
}
const char* kernel_of(const LatentOutput&) {
  return "mla_unembed";
}
const char* kernel_of(const OutputProjection&) {
  return "linear_residual";
}
const char* kernel_of(const Router& s) {
  return router_kernel(s);
}
const char* kernel_of(const ExpertsGateUp& s) {
  return gate_up_kernel(s);
}
const char* kernel_of(const ExpertsDown& s) {
  return s.shared_down ? "moe_experts_down_shared" : "moe_experts_down_residual";
}
const char* kernel_of(const DenseGateUp&) {
  return "norm_gate_up";
}
const char* kernel_of(const DenseDown&) {
  return "linear_residual";
}
const char* kernel_of(const Head&) {
  return "norm_qkv";
}

}  // namespace

MetalStep::MetalStep(const Plan& plan, Accumulate accumulate)
    : plan_(plan), accumulate_(accumulate) {
  check_limits(plan_);
}

mx::array MetalStep::run(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches) {
  check_rows(rows, caches);
  ++calls_;
  const int count = static_cast<int>(rows.size());
  const auto ids = tokens_of(rows), places = places_of(rows, caches[0].keys.shape(2));
  const auto angles = angles_of(rows, rope_of(plan_));
  Walk walk(plan_, accumulate_, constants_,
            {count, caches, mx::array(ids.begin(), {count}, mx::uint32),
             mx::array(places.begin(), {count, 4}, mx::uint32),
             mx::array(angles.begin(), {count, rope_of(plan_).dims}, mx::float32)},
            [](const Call& call) { return launch(call, {}); });
  mx::array logits = walk.walk();
  logits.eval();
  return logits;
}

std::vector<Dispatch> MetalStep::dispatches(int context) const {
  std::vector<Dispatch> list;
  const CacheShape& c = plan_.cache;
  const int64_t slot = int64_t(c.kv_heads) * (c.key_dim + c.value_dim) * plan_.dtype.size();
  bool grouped = false;
  int64_t embed_q = 0;  // read by the attention here, not by the query's projection
  for (const Stage& stage : plan_.stages) {
    int64_t weight_bytes = plan_.describe(stage).weight_bytes;
    if (const auto* q = std::get_if<LatentQuery>(&stage.work)) {
      embed_q = q->heads * q->embed_q.bytes();
      weight_bytes -= embed_q;
    }
    std::string kernel = std::visit([](const auto& s) { return kernel_of(s); }, stage.work);
    const bool gqa = std::holds_alternative<GroupedAttention>(stage.work);
    const bool mla = std::holds_alternative<LatentAttention>(stage.work);
    if (gqa || mla) grouped = gqa;
    if (mla) weight_bytes += embed_q;
    if (grouped && std::holds_alternative<OutputProjection>(stage.work)) kernel = "attention_out";
    list.push_back({kernel, stage.layer, weight_bytes, gqa || mla ? slot * context : 0});
  }
  return list;
}

}  // namespace moefuse::metal
