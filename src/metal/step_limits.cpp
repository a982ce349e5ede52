#include "metal/step_limits.h"

#include "ops/checks.h"

namespace moefuse::metal {

namespace {

constexpr int kThreadgroupBytes = 32 * 1024;

struct Limits {
  const Plan& plan;
  std::string where;  // "layers.3, qkv"

  void require(bool held, const std::string& what, const std::string& expected,
               const std::string& got) const {
    if (!held) fail("step on Metal", where + ", " + what, expected, got);
  }
  void at_most(int64_t value, int64_t limit, const std::string& what) const {
    require(value <= limit, what, "at most " + std::to_string(limit), std::to_string(value));
  }
  void multiple_of_32(int value, const std::string& what) const {
    require(value % 32 == 0, what, "a multiple of 32", std::to_string(value));
  }
  // A stage's matrices share their format; fewer than 8 elements would come in constant memory.
  void alike(std::initializer_list<const Matrix*> matrices) const {
    const Matrix& first = **matrices.begin();
    for (const Matrix* m : matrices) {
      require(m->bits == first.bits && m->group_size == first.group_size, "matrices",
              std::to_string(first.bits) + " bits and group_size " +
                  std::to_string(first.group_size) + " for all",
              std::to_string(m->bits) + " and " + std::to_string(m->group_size));
      require(m->scales.size() >= 8, "matrices", "8 groups or more",
              std::to_string(m->scales.size()));
      require(m->weight.size() < (size_t{1} << 32), "matrices", "fewer than 2^32 words",
              std::to_string(m->weight.size()));
    }
  }
  // A normed row and `floats` more in threadgroup memory.
  void room_for(int elements, int floats) const {
    at_most(int64_t(elements) * plan.dtype.size() + 4 * int64_t(floats), kThreadgroupBytes,
            "bytes of threadgroup memory");
  }

  void check(const Embed& s) const { alike({&s.table}); }
  void check(const GroupedProjection& s) const {
    alike({&s.q, &s.k, &s.v});
    room_for(s.q.cols, 8);
  }
  void check(const GroupedAttention& s) const {
    multiple_of_32(s.head_dim, "head_dim");
    require(!s.rope.traditional && s.rope.dims == s.head_dim, "rope",
            "halves of the whole head_dim", "another form");
    room_for(0, 8 * s.head_dim + 16);
  }
  void check(const LatentProjection& s) const {
    alike({&s.q_a, &s.kv_a});
    room_for(s.q_a.cols, 8);
  }
  void check(const LatentQuery& s) const {
    alike({&s.q_b});
    alike({&s.embed_q});
    multiple_of_32(s.latent_dim, "kv_lora_rank");
    require(s.rope.traditional && s.rope.dims == s.rope_dim && s.rope_dim % 2 == 0, "rope",
            "neighbouring pairs of qk_rope_head_dim", "another form");
    room_for(s.q_b.cols, 8);
  }
  void check(const LatentAttention& s) const { room_for(s.latent_dim, 8 * s.latent_dim + 16); }
  void check(const LatentOutput& s) const {
    alike({&s.unembed});
    room_for(s.unembed.cols, 0);
  }
  void check(const OutputProjection& s) const {
    alike({&s.o});
    // The merge of the stretches: a share for each of 8 stretches of a head.
    if (plan.config.model_type == "qwen3_moe")
      room_for(s.o.cols, 8 * plan.config.num_attention_heads);
  }
  void check(const Router& s) const {
    const bool softmax = s.options.scoring == Scoring::softmax;
    require(softmax ? s.quantized_gate.has_value() : s.dense_gate.has_value(), "mlp.gate",
            softmax ? "a quantised gate" : "a dense gate", "the other kind");
    require(s.options.n_group == 1, "n_group", "1", std::to_string(s.options.n_group));
    at_most(s.experts, 1024, "num_experts");
    if (softmax) alike({&*s.quantized_gate});
    room_for(static_cast<int>(s.norm.weight.size()), s.experts + 16);
  }
  void check(const ExpertsGateUp& s) const {
    alike({&s.gate, &s.up});
    if (!s.shared_gate) return;
    alike({&s.gate, &*s.shared_gate, &*s.shared_up});
    require(s.shared_gate->rows == s.gate.rows, "shared expert",
            "the experts' width " + std::to_string(s.gate.rows),
            std::to_string(s.shared_gate->rows));
  }
  void check(const ExpertsDown& s) const {
    alike({&s.down});
    if (s.shared_down) alike({&s.down, &*s.shared_down});
  }
  void check(const DenseGateUp& s) const {
    alike({&s.gate, &s.up});
    room_for(s.gate.cols, 8);
  }
  void check(const DenseDown& s) const { alike({&s.down}); }
  void check(const Head& s) const {
    alike({&s.lm_head});
    room_for(s.lm_head.cols, 8);
  }
};

}  // namespace

void check_limits(const Plan& plan) {
  for (const Stage& stage : plan.stages) {
    const std::string layer = stage.layer < 0 ? "" : "layers." + std::to_string(stage.layer) + ", ";
    std::visit([&](const auto& s) { Limits{plan, layer + stage.name}.check(s); }, stage.work);
  }
}

}  // namespace moefuse::metal
