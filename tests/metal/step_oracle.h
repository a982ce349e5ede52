// A whole token in fp64 with a bound, straight from the configuration and the named weights: it
// knows nothing of plans and stages.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "metal/launch.h"
#include "moefuse/decoder.h"
#include "oracle.h"

namespace harness {

namespace mx = mlx::core;

// Random weights of a model in fp32 activations, as arrays and as numbers.
class RandomModel {
 public:
  explicit RandomModel(const std::string& config) : model{moefuse::parse_config(config), {}} {}

  // `size` scales the values: a bound through layers stays small where a block adds little to a
  // larger residual.
  void quantized(const std::string& name, int count, int rows, int cols, float size = 1.0f,
                 int bits = 4) {
    auto s = std::make_unique<Stack<float>>(count, rows, cols, bits, 32);
    s->scales = scaled(s->scales, size);
    s->biases = scaled(s->biases, size);
    mx::Shape words = {count, rows, cols * bits / 32}, groups = {count, rows, cols / 32};
    if (count == 1) words.erase(words.begin()), groups.erase(groups.begin());
    put(name + ".weight", mx::array(s->weight.values().begin(), words, mx::uint32));
    put(name + ".scales", mx::array(s->scales.values().begin(), groups, mx::float32));
    put(name + ".biases", mx::array(s->biases.values().begin(), groups, mx::float32));
    stacks[name] = std::move(s);
  }
  void dense(const std::string& name, const mx::Shape& shape, float low, float high) {
    given(name, shape, uniform_vector<float>(mx::zeros(shape).size(), low, high));
  }
  void given(const std::string& name, const mx::Shape& shape, const std::vector<float>& values) {
    floats[name] = values;
    put(name, mx::array(values.begin(), shape, mx::float32));
  }
  void norm(const std::string& name, int width, float size = 1.0f) {
    dense(name + ".weight", {width}, 0.5f * size, 1.5f * size);
  }

  moefuse::Model model;
  std::map<std::string, std::unique_ptr<Stack<float>>> stacks;
  std::map<std::string, std::vector<float>> floats;

 private:
  static Buffer<float> scaled(const Buffer<float>& from, float size) {
    std::vector<float> v = from.values();
    for (float& x : v) x *= size;
    return Buffer<float>(std::move(v));
  }
  void put(const std::string& name, const mx::array& a) { model.weights.emplace(name, a); }
};

using Vector = std::vector<Approx>;

class StepOracle {
 public:
  // Called with the hidden state after the embedding and after each attention and MLP block: it may
  // put there what an executor has, so that a bound starts anew.
  using Meet = std::function<void(Vector& hidden)>;
  explicit StepOracle(
      const RandomModel& model, Meet meet = [](Vector&) {})
      : m(model), meet(std::move(meet)) {}

  // Logits of one row; the caches grow by its newest position.
  Vector step(const moefuse::StepRow& row) {
    const auto& c = m.model.config;
    const Stack<float>& table = *m.stacks.at("model.embed_tokens");
    Vector x;
    for (size_t k = 0; k < table.cols; ++k)
      x.push_back(add(mul({table.scale(row.token, k), 0}, {table.quant(row.token, k), 0}),
                      {table.bias(row.token, k), 0}));
    meet(x);
    for (layer = 0; layer < c.num_hidden_layers; ++layer) {
      prefix = "model.layers." + std::to_string(layer) + ".";
      const Vector h = norm(x, prefix + "input_layernorm");
      x = sum(x, c.model_type == "qwen3_moe" ? grouped(h, row) : latent(h, row));
      meet(x);
      const Vector n = norm(x, prefix + "post_attention_layernorm");
      x = sum(x, c.sparse[layer] ? experts(n) : mlp(n, "mlp."));
      meet(x);
    }
    const bool tied = c.tie_word_embeddings;
    return times(tied ? "model.embed_tokens" : "lm_head", norm(x, "model.norm"));
  }

 private:
  Approx dot(const Stack<float>& w, size_t row, const Vector& x) const {
    return w.dot(row, [&](size_t k) { return x[k]; });
  }
  Vector times(const std::string& name, const Vector& x, size_t which = 0) const {
    const Stack<float>& w = *m.stacks.at(name);
    Vector y;
    for (size_t n = 0; n < w.rows; ++n) y.push_back(fp32(dot(w, which * w.rows + n, x)));
    return y;
  }
  Vector norm(const Vector& x, const std::string& name) const {
    return rms_norm_oracle<float>(x, m.floats.at(name + ".weight"), m.model.config.rms_norm_eps);
  }
  static Vector sum(const Vector& a, const Vector& b) {
    Vector y;
    for (size_t i = 0; i < a.size(); ++i) y.push_back(add(a[i], b[i]));
    return y;
  }
  static Vector part(const Vector& x, size_t begin, size_t count) {
    return {x.begin() + begin, x.begin() + begin + count};
  }

  // An angle in fp32 is off by a few units of itself.
  void turn(Approx& a, Approx& b, int position, double rate) const {
    const double angle = position * rate, error = (1 + 8 * angle) * 2 * kUnit;
    const Approx c{std::cos(angle), error}, s{std::sin(angle), error}, x = a, y = b;
    a = add(mul(x, c), mul({-y.value, y.error}, s));
    b = add(mul(y, c), mul(x, s));
  }
  Vector rotated(Vector x, int position, bool neighbours) const {
    const size_t half = x.size() / 2;
    for (size_t i = 0; i < half; ++i) {
      const double rate = std::pow(double(m.model.config.rope_theta), -double(i) / half);
      turn(x[neighbours ? 2 * i : i], x[neighbours ? 2 * i + 1 : i + half], position, rate);
    }
    return x;
  }

  struct Cached {
    std::map<int, Vector> keys, values;  // by slot
  };
  Vector attended(const Vector& q, const Cached& cache, const moefuse::StepRow& row, double scale) {
    Vector scores;
    std::vector<Vector> values;
    for (int i = row.first; i <= row.slot; ++i) {
      scores.push_back(mul(dot_product(q, cache.keys.at(i)), {scale, scale * kUnit}));
      values.push_back(cache.values.at(i));
    }
    return softmax_average(scores, values, scores.size() + 32.0);
  }

  Vector grouped(const Vector& h, const moefuse::StepRow& row) {
    const auto& c = m.model.config;
    const int dim = c.head_dim, per = c.num_attention_heads / c.num_key_value_heads;
    const Vector q = times(prefix + "self_attn.q_proj", h),
                 k = times(prefix + "self_attn.k_proj", h);
    const Vector v = times(prefix + "self_attn.v_proj", h);
    Vector out;
    for (int kv = 0; kv < c.num_key_value_heads; ++kv) {
      Cached& cache = caches[{layer, row.sequence, kv}];
      cache.keys[row.slot] =
          rotated(norm(part(k, kv * dim, dim), prefix + "self_attn.k_norm"), row.position, false);
      cache.values[row.slot] = part(v, kv * dim, dim);
      for (int head = kv * per; head < (kv + 1) * per; ++head) {
        const Vector query = rotated(norm(part(q, head * dim, dim), prefix + "self_attn.q_norm"),
                                     row.position, false);
        const Vector y = attended(query, cache, row, 1 / std::sqrt(double(dim)));
        out.insert(out.end(), y.begin(), y.end());
      }
    }
    return times(prefix + "self_attn.o_proj", out);
  }

  Vector latent(const Vector& h, const moefuse::StepRow& row) {
    const auto& c = m.model.config;
    const std::string a = prefix + "self_attn.";
    const int nope = c.qk_nope_head_dim, rope = c.qk_rope_head_dim, rank = c.kv_lora_rank;
    const Vector q = times(a + "q_b_proj", norm(times(a + "q_a_proj", h), a + "q_a_layernorm"));
    const Vector kv = times(a + "kv_a_proj_with_mqa", h);
    Cached& cache = caches[{layer, row.sequence, 0}];
    Vector key = norm(part(kv, 0, rank), a + "kv_a_layernorm");
    cache.values[row.slot] = key;
    const Vector turned = rotated(part(kv, rank, rope), row.position, true);
    key.insert(key.end(), turned.begin(), turned.end());
    cache.keys[row.slot] = key;
    Vector out;
    for (int head = 0; head < c.num_attention_heads; ++head) {
      const Vector mine = part(q, head * (nope + rope), nope + rope);
      Vector query = times(a + "embed_q", part(mine, 0, nope), head);
      const Vector end = rotated(part(mine, nope, rope), row.position, true);
      query.insert(query.end(), end.begin(), end.end());
      const Vector y = attended(query, cache, row, 1 / std::sqrt(double(nope + rope)));
      const Vector values = times(a + "unembed_out", y, head);
      out.insert(out.end(), values.begin(), values.end());
    }
    return times(a + "o_proj", out);
  }

  Vector mlp(const Vector& x, const std::string& name, const std::string& stack = "",
             size_t which = 0) const {
    const Vector g = times(prefix + name + stack + "gate_proj", x, which);
    const Vector u = times(prefix + name + stack + "up_proj", x, which);
    Vector hidden;
    for (size_t i = 0; i < g.size(); ++i) {
      Approx h = swiglu<float, true>(g[i], u[i]);
      h.error += 16 * kUnit * std::abs(h.value);  // another executor's form of the sigmoid
      hidden.push_back(h);
    }
    return times(prefix + name + stack + "down_proj", hidden, which);
  }

  // The chosen experts and their weights; the choice must not hang on the errors.
  std::vector<std::pair<size_t, Approx>> route(const Vector& x) const {
    const auto& c = m.model.config;
    const bool softmax = c.model_type == "qwen3_moe";
    Vector scores, choice;
    for (int e = 0; e < c.num_experts; ++e) {
      Approx logit;
      if (softmax) {
        logit = dot(*m.stacks.at(prefix + "mlp.gate"), e, x);
      } else {
        const auto& gate = m.floats.at(prefix + "mlp.gate.weight");
        logit = dot_product(exact(gate, e * x.size(), x.size()), x);
      }
      const Approx p = softmax ? exp(logit) : sigmoid<float>(logit);
      scores.push_back(p);
      choice.push_back(p);
      if (!softmax)
        choice.back() = add(p, {m.floats.at(prefix + "mlp.gate.e_score_correction_bias")[e], 0});
    }
    std::vector<size_t> order(scores.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](size_t a, size_t b) { return choice[a].value > choice[b].value; });
    const size_t k = c.num_experts_per_tok;
    const Approx in = choice[order[k - 1]], out = choice[order[k]];
    EXPECT_GT(in.value - out.value, in.error + out.error) << "the inputs leave the choice open";
    Approx chosen;
    std::vector<std::pair<size_t, Approx>> result;
    for (size_t i = 0; i < k; ++i) chosen = add(chosen, scores[order[i]]);
    for (size_t i = 0; i < k; ++i) {
      Approx w = div(scores[order[i]], chosen);
      w.error += (c.num_experts + 24) * kUnit * w.value;  // softmax over all before it
      result.push_back({order[i], mul(w, {c.routed_scaling_factor, 0})});
    }
    return result;
  }

  Vector experts(const Vector& x) const {
    Vector out(x.size());
    for (const auto& [expert, weight] : route(x)) {
      const Vector y = mlp(x, "mlp.", "switch_mlp.", expert);
      for (size_t i = 0; i < out.size(); ++i) out[i] = add(out[i], mul(y[i], weight));
    }
    if (m.model.config.n_shared_experts == 0) return out;
    return sum(out, mlp(x, "mlp.shared_experts."));
  }

  const RandomModel& m;
  Meet meet;
  int layer = 0;
  std::string prefix;
  std::map<std::array<int, 3>, Cached> caches;
};

}  // namespace harness
