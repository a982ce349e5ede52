// The stages of the decode step in the emulator, against fp64 inside a computed bound.
#include <limits>

#include "oracle.h"

namespace {

using namespace harness;

// Row r is at position 37 + 5 r.
std::vector<float> rope_table(size_t rows, size_t pairs) {
  std::vector<float> table;
  for (size_t i = 0; i < rows * pairs; ++i) {
    const double angle = (37.0 + 5 * (i / pairs)) * std::pow(1e4, -double(i % pairs) / pairs);
    table.push_back(static_cast<float>(std::cos(angle)));
    table.push_back(static_cast<float>(std::sin(angle)));
  }
  return table;
}

// Rows in their sequences' caches: row r in sequence `rows - r`, sequence 0 in none; it attends to
// `cached` slots from slot r on.
struct Places {
  uint rows, cached, capacity;
  uint sequences() const { return rows + 1; }
  uint slot(uint row) const { return row + cached; }
  // Slot i after the row's first, of one of `heads` heads of the cache.
  size_t at(uint row, uint i, uint heads = 1, uint head = 0) const {
    return ((rows - row) * heads + head) * capacity + row + i;
  }
  std::vector<uint> values() const {
    std::vector<uint> v;
    for (uint r = 0; r < rows; ++r) v.insert(v.end(), {rows - r, r, slot(r), capacity});
    return v;
  }
};

// ---- norm + qkv ----

template <typename T_, int BITS_, int GROUP_, int H_, int NQ_, int NK_, int NV_, int STRIDE_ = H_>
struct QkvParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, H = H_, NQ = NQ_, NK = NK_, NV = NV_,
                       STRIDE = STRIDE_;
};

template <class P>
void check_norm_qkv(size_t rows) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(rows * P::STRIDE, -2.0f, 2.0f));
  Buffer<T> norm_weight(uniform_vector<T>(P::H, 0.5f, 1.5f));
  Buffer<float> eps({0.25f});
  Stack<T> q(1, P::NQ, P::H, P::BITS, P::GROUP),
      k(1, P::NK ? P::NK : P::NQ, P::H, P::BITS, P::GROUP),
      v(1, P::NV ? P::NV : P::NQ, P::H, P::BITS, P::GROUP);
  const int total = P::NQ + P::NK + P::NV;
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * total));
    launch(
        kernels::norm_qkv<P>{x, norm_weight, eps, q.weight, q.scales, q.biases, k.weight, k.scales,
                             k.biases, v.weight, v.scales, v.biases, std::get<0>(outputs)},
        {.rows = rows}, {blocks(total, 32), uint(rows), 1}, 256, order);
    return outputs;
  });
  for (size_t r = 0; r < rows; ++r) {
    const auto normed =
        rms_norm_oracle<T>(exact(x.values(), r * P::STRIDE, P::H), norm_weight.values(), 0.25);
    auto at = [&](size_t i) { return normed[i]; };
    for (int n = 0; n < total; ++n) {
      const Approx y = n < P::NQ           ? q.dot(n, at)
                       : n < P::NQ + P::NK ? k.dot(n - P::NQ, at)
                                           : v.dot(n - P::NQ - P::NK, at);
      expect_near(out.values()[r * total + n], round_to<T>(y), "out", r * total + n);
    }
  }
}

TEST(NormQkv, QwenSlice) {
  check_norm_qkv<QkvParams<bfloat16_t, 4, 64, 2048, 36, 8, 8>>(1);
}
TEST(NormQkv, TwoMatricesThreeRows) {
  check_norm_qkv<QkvParams<bfloat16_t, 4, 32, 224, 20, 12, 0>>(3);
}
TEST(NormQkv, OneMatrixOfStridedRows) {
  check_norm_qkv<QkvParams<float16_t, 8, 64, 128, 40, 0, 0, 300>>(2);
}
TEST(NormQkv, Fp32) {
  check_norm_qkv<QkvParams<float, 4, 128, 768, 4, 4, 2>>(2);
}

// ---- norm + gate, up and SwiGLU of a dense layer ----

template <typename T_, int BITS_, int GROUP_, int H_, int I_>
struct DenseParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, H = H_, I = I_;
};

template <class P>
void check_norm_gate_up(size_t rows) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(rows * P::H, -2.0f, 2.0f));
  Buffer<T> norm_weight(uniform_vector<T>(P::H, 0.5f, 1.5f));
  Buffer<float> eps({0.25f});
  Stack<T> gate(1, P::I, P::H, P::BITS, P::GROUP), up(1, P::I, P::H, P::BITS, P::GROUP);
  auto [hidden] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * P::I));
    launch(kernels::norm_gate_up<P>{x, norm_weight, eps, gate.weight, gate.scales, gate.biases,
                                    up.weight, up.scales, up.biases, std::get<0>(outputs)},
           {.rows = rows}, {blocks(P::I, 32), uint(rows), 1}, 256, order);
    return outputs;
  });
  for (size_t i = 0; i < rows * P::I; ++i) {
    const auto normed =
        rms_norm_oracle<T>(exact(x.values(), i / P::I * P::H, P::H), norm_weight.values(), 0.25);
    auto at = [&](size_t k) { return normed[k]; };
    const Approx want = swiglu<T, true>(gate.dot(i % P::I, at), up.dot(i % P::I, at));
    expect_near(hidden.values()[i], want, "hidden", i);
  }
}

TEST(NormGateUp, GlmSlice) {
  check_norm_gate_up<DenseParams<bfloat16_t, 4, 64, 2048, 34>>(1);
}
TEST(NormGateUp, Fp32TwoRows) {
  check_norm_gate_up<DenseParams<float, 8, 32, 96, 13>>(2);
}

// ---- embedding ----

template <typename T_, int BITS_, int GROUP_, int V_, int H_>
struct EmbedParams {
  using T = T_;
  using A = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, V = V_, H = H_;
};

template <class P>
void check_embed(const std::vector<uint>& tokens) {
  using T = typename P::T;
  Buffer<uint> in(tokens);
  Stack<T> table(1, P::V, P::H, P::BITS, P::GROUP);
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(tokens.size() * P::H));
    launch(kernels::embed<P>{in, table.weight, table.scales, table.biases, std::get<0>(outputs)},
           {.rows = tokens.size()}, {blocks(P::H, 256), uint(tokens.size()), 1}, 256, order);
    return outputs;
  });
  for (size_t i = 0; i < tokens.size() * P::H; ++i) {
    const size_t token = tokens[i / P::H], k = i % P::H;
    if (token >= P::V) {
      EXPECT_TRUE(std::isnan(float(out.values()[i])));
      continue;
    }
    const double want = table.scale(token, k) * table.quant(token, k) + table.bias(token, k);
    EXPECT_EQ(float(out.values()[i]), float(T(static_cast<float>(want)))) << i;
  }
}

TEST(Embed, FourBits) {
  check_embed<EmbedParams<bfloat16_t, 4, 64, 40, 320>>({39, 0, 17});
}
TEST(Embed, EightBitsAndATokenOutside) {
  check_embed<EmbedParams<float16_t, 8, 32, 12, 96>>({11, 12});
}

// ---- attention, grouped queries ----

template <typename T_, int HEADS_, int KV_, int D_, int SPLITS_>
struct GqaParams {
  using T = T_;
  static constexpr int HEADS = HEADS_, KV_HEADS = KV_, D = D_, SPLITS = SPLITS_;
};

template <typename T>
std::vector<Approx> normed_and_turned(const std::vector<T>& v, size_t begin,
                                      const std::vector<T>& weight, const float* rope) {
  auto x = rms_norm_oracle<T>(exact(v, begin, weight.size()), weight, 1e-3);
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) rotate<T>(x[i], x[i + half], rope[2 * i], rope[2 * i + 1]);
  return x;
}

template <class P>
void check_gqa(uint rows, uint cached, uint spare, float factor = 0.3f) {
  using T = typename P::T;
  const Places to = {rows, cached, cached + rows + spare};
  constexpr size_t width = (P::HEADS + 2 * P::KV_HEADS) * P::D;
  Buffer<T> qkv(uniform_vector<T>(rows * width, -1.0f, 1.0f));
  Buffer<T> q_norm(uniform_vector<T>(P::D, 0.5f, 2.0f)),
      k_norm(uniform_vector<T>(P::D, 0.5f, 2.0f));
  Buffer<float> eps({1e-3f}), scale({factor}), rope(rope_table(rows, P::D / 2));
  Buffer<uint> places(to.values());
  const size_t cache_size = size_t(to.sequences()) * P::KV_HEADS * to.capacity * P::D;
  const auto k_old = uniform_vector<T>(cache_size, -2.0f, 2.0f);
  const auto v_old = uniform_vector<T>(cache_size, -2.0f, 2.0f);
  const size_t parts = rows * P::HEADS * P::SPLITS;
  std::vector<T> k_new, v_new;
  auto [partial, stats] = in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<float>::output(parts * P::D), Buffer<float>::output(parts * 2));
    Buffer<T> k_cache(k_old), v_cache(v_old);
    launch(kernels::attention_gqa<P>{qkv, q_norm, k_norm, eps, scale, rope, places, k_cache,
                                     v_cache, std::get<0>(outputs), std::get<1>(outputs)},
           {.rows = rows, .capacity = to.capacity, .sequences = to.sequences()},
           {P::HEADS, P::SPLITS, uint(rows)}, 256, order);
    if (!k_new.empty()) expect_same_bytes(k_new, k_cache.values());
    k_new = k_cache.values();
    v_new = v_cache.values();
    return outputs;
  });
  for (size_t r = 0; r < rows; ++r) {
    for (size_t h = 0; h < P::HEADS; ++h) {
      const size_t kv = h / (P::HEADS / P::KV_HEADS), base = r * width;
      const float* angles = rope.values().data() + r * P::D;
      const auto q = normed_and_turned(qkv.values(), base + h * P::D, q_norm.values(), angles);
      std::vector<Approx> scores;
      std::vector<std::vector<Approx>> values;
      for (size_t i = 0; i <= cached; ++i) {
        const size_t at = to.at(r, i, P::KV_HEADS, kv) * P::D;
        const auto key = i < cached ? exact(k_old, at, P::D)
                                    : normed_and_turned(qkv.values(), base + (P::HEADS + kv) * P::D,
                                                        k_norm.values(), angles);
        values.push_back(
            i < cached ? exact(v_old, at, P::D)
                       : exact(qkv.values(), base + (P::HEADS + P::KV_HEADS + kv) * P::D, P::D));
        scores.push_back(mul(dot_product(q, key), {factor, 0}));
        for (size_t d = 0; i == cached && d < P::D; ++d) {
          expect_near(k_new[at + d], key[d], "k_cache", at + d);
          expect_near(v_new[at + d], values.back()[d], "v_cache", at + d);
        }
      }
      const auto want = softmax_average(scores, values, cached / (8.0 * P::SPLITS) + 24);
      for (size_t d = 0; d < P::D; ++d) {
        const size_t at = (r * P::HEADS + h) * P::SPLITS;
        const double got = merged(partial.values(), stats.values(), at, P::SPLITS, P::D, d);
        ASSERT_LE(std::abs(got - want[d].value), want[d].error) << "head " << h << " element " << d;
      }
    }
  }
  size_t changed = 0;  // only the newest position may change
  for (size_t i = 0; i < cache_size; ++i) {
    const uint row = rows - i / P::D / to.capacity / P::KV_HEADS;
    changed += (row == rows || i / P::D % to.capacity != to.slot(row)) &&
               (float(k_new[i]) != float(k_old[i]) || float(v_new[i]) != float(v_old[i]));
  }
  EXPECT_EQ(changed, 0u);
}

TEST(AttentionGqa, QwenSlice) {
  check_gqa<GqaParams<bfloat16_t, 4, 2, 128, 4>>(1, 77, 50);
}
TEST(AttentionGqa, FirstToken) {
  check_gqa<GqaParams<bfloat16_t, 2, 1, 64, 4>>(2, 0, 15);
}
TEST(AttentionGqa, FewerKeysThanStretches) {
  check_gqa<GqaParams<float, 2, 2, 32, 8>>(1, 3, 0);
}
TEST(AttentionGqa, FullCacheFourRows) {
  check_gqa<GqaParams<float16_t, 6, 2, 96, 1>>(4, 31, 0);
}
// Scores hundreds apart: e^(score - top) holds only where the top is that of all keys so far.
TEST(AttentionGqa, ScoresFarApart) {
  check_gqa<GqaParams<float, 4, 2, 32, 2>>(2, 61, 0, 30.0f);
}

// ---- merge + o + residual ----

template <typename T_, int BITS_, int GROUP_, int HEADS_, int D_, int SPLITS_, int ROWS_>
struct OutParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, HEADS = HEADS_, D = D_, LORA = D_,
                       SPLITS = SPLITS_, ROWS = ROWS_, V = ROWS_;
};

// Random stretches of `heads` heads; the first stretch of the second head is empty when it can be.
struct Stretches {
  std::vector<float> partial, stats;
  size_t splits, width;
  Stretches(size_t heads, size_t splits, size_t width)
      : partial(uniform_vector<float>(heads * splits * width, -3.0f, 3.0f)),
        splits(splits),
        width(width) {
    for (size_t i = 0; i < heads * splits; ++i) {
      const bool empty = i == splits && splits > 1;
      stats.push_back(empty ? -std::numeric_limits<float>::infinity() : uniform(-4.0f, 4.0f));
      stats.push_back(empty ? 0.0f : uniform(1.0f, 9.0f));
      if (empty) std::fill_n(partial.begin() + i * width, width, 0.0f);
    }
  }
  template <typename T>
  Approx at(size_t head, size_t d) const {
    Approx v{merged(partial, stats, head * splits, splits, width, d), 0};
    double size = 0.0;
    for (size_t s = 0; s < splits; ++s) size += std::abs(partial[(head * splits + s) * width + d]);
    v.error = (4 * splits + 40) * kUnit * size;
    return round_to<T>(v);
  }
};

template <class P>
void check_attention_out(size_t rows) {
  using T = typename P::T;
  Stretches s(rows * P::HEADS, P::SPLITS, P::D);
  Buffer<float> partial(s.partial), stats(s.stats);
  Stack<T> o(1, P::ROWS, P::HEADS * P::D, P::BITS, P::GROUP);
  Buffer<T> residual(uniform_vector<T>(rows * P::ROWS, -2.0f, 2.0f));
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * P::ROWS));
    launch(kernels::attention_out<P>{partial, stats, o.weight, o.scales, o.biases, residual,
                                     std::get<0>(outputs)},
           {.rows = rows}, {blocks(P::ROWS, 32), uint(rows), 1}, 256, order);
    return outputs;
  });
  for (size_t at = 0; at < rows * P::ROWS; ++at) {
    const size_t head = at / P::ROWS * P::HEADS;
    const Approx y = round_to<T>(
        o.dot(at % P::ROWS, [&](size_t i) { return s.at<T>(head + i / P::D, i % P::D); }));
    const Approx x{static_cast<float>(residual.values()[at]), 0};
    expect_near(out.values()[at], round_to<T>(add(x, y)), "out", at);
  }
}

TEST(AttentionOut, QwenSlice) {
  check_attention_out<OutParams<bfloat16_t, 4, 64, 8, 128, 4, 40>>(1);
}
TEST(AttentionOut, OneStretch) {
  check_attention_out<OutParams<float, 8, 32, 3, 32, 1, 33>>(3);
}
TEST(AttentionOut, Fp16) {
  check_attention_out<OutParams<float16_t, 4, 128, 4, 96, 2, 6>>(2);
}

// ---- W x + residual ----

template <typename T_, int BITS_, int GROUP_, int COLS_, int ROWS_>
struct LinearParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, COLS = COLS_, ROWS = ROWS_;
};

template <class P>
void check_linear_residual(size_t rows) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(rows * P::COLS, -1.0f, 1.0f));
  Buffer<T> residual(uniform_vector<T>(rows * P::ROWS, -2.0f, 2.0f));
  Stack<T> w(1, P::ROWS, P::COLS, P::BITS, P::GROUP);
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * P::ROWS));
    launch(kernels::linear_residual<P>{x, w.weight, w.scales, w.biases, residual,
                                       std::get<0>(outputs)},
           {.rows = rows}, {blocks(P::ROWS, 8), uint(rows), 1}, 64, order);
    return outputs;
  });
  for (size_t at = 0; at < rows * P::ROWS; ++at) {
    const auto row = exact(x.values(), at / P::ROWS * P::COLS, P::COLS);
    const Approx y = round_to<T>(w.dot(at % P::ROWS, [&](size_t k) { return row[k]; }));
    const Approx r{static_cast<float>(residual.values()[at]), 0};
    expect_near(out.values()[at], round_to<T>(add(r, y)), "out", at);
  }
}

TEST(LinearResidual, GlmSlice) {
  check_linear_residual<LinearParams<bfloat16_t, 4, 64, 5120, 24>>(1);
}
TEST(LinearResidual, FourRows) {
  check_linear_residual<LinearParams<float, 8, 32, 96, 13>>(4);
}

// ---- latent attention ----

template <typename T_, int BITS_, int GROUP_, int HEADS_, int NOPE_, int ROPE_, int LORA_,
          int SPLITS_, int KV_OFFSET_>
struct MlaParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, HEADS = HEADS_, NOPE = NOPE_, ROPE = ROPE_,
                       LORA = LORA_, SPLITS = SPLITS_, KV_OFFSET = KV_OFFSET_,
                       KV_STRIDE = KV_OFFSET_ + LORA_ + ROPE_;
};

template <typename T>
std::vector<Approx> turned_neighbours(const std::vector<T>& v, size_t begin, size_t count,
                                      const float* rope) {
  auto x = exact(v, begin, count);
  for (size_t i = 0; i < count; i += 2) rotate<T>(x[i], x[i + 1], rope[i], rope[i + 1]);
  return x;
}

std::vector<Approx> joined(std::vector<Approx> a, const std::vector<Approx>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

template <class P>
void check_mla(uint rows, uint cached, uint spare) {
  using T = typename P::T;
  const Places to = {rows, cached, cached + rows + spare};
  const size_t slots = size_t(to.sequences()) * to.capacity;
  constexpr size_t q_width = P::NOPE + P::ROPE;
  Buffer<T> q(uniform_vector<T>(rows * P::HEADS * q_width, -1.0f, 1.0f));
  Buffer<T> kv(uniform_vector<T>(rows * P::KV_STRIDE, -1.0f, 1.0f));
  Buffer<T> kv_norm(uniform_vector<T>(P::LORA, 0.5f, 1.5f));
  Buffer<float> eps({1e-3f}), scale({0.2f}), rope(rope_table(rows, P::ROPE / 2));
  Buffer<uint> places(to.values());
  Stack<T> embed(P::HEADS, P::LORA, P::NOPE, P::BITS, P::GROUP);
  const auto latent_old = uniform_vector<T>(slots * P::LORA, -1.0f, 1.0f);
  const auto rope_old = uniform_vector<T>(slots * P::ROPE, -1.0f, 1.0f);
  std::vector<T> latent_new, rope_new;
  const size_t parts = rows * P::HEADS * P::SPLITS;
  auto [partial, stats] = in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<float>::output(parts * P::LORA), Buffer<float>::output(parts * 2));
    Buffer<T> latent_cache(latent_old), rope_cache(rope_old);
    launch(kernels::attention_mla<P>{q, kv, kv_norm, eps, scale, rope, places, embed.weight,
                                     embed.scales, embed.biases, latent_cache, rope_cache,
                                     std::get<0>(outputs), std::get<1>(outputs)},
           {.rows = rows, .capacity = to.capacity, .sequences = to.sequences()},
           {P::HEADS, P::SPLITS, uint(rows)}, 256, order);
    latent_new = latent_cache.values();
    rope_new = rope_cache.values();
    return outputs;
  });
  for (size_t r = 0; r < rows; ++r) {
    const size_t newest = r * P::KV_STRIDE + P::KV_OFFSET;
    const auto latent =
        rms_norm_oracle<T>(exact(kv.values(), newest, P::LORA), kv_norm.values(), 1e-3);
    const float* angles = rope.values().data() + r * P::ROPE;
    const auto k_rope = turned_neighbours(kv.values(), newest + P::LORA, P::ROPE, angles);
    for (size_t d = 0; d < P::LORA; ++d)
      expect_near(latent_new[to.at(r, cached) * P::LORA + d], latent[d], "latent", d);
    for (size_t d = 0; d < P::ROPE; ++d)
      expect_near(rope_new[to.at(r, cached) * P::ROPE + d], k_rope[d], "rope", d);
    std::vector<std::vector<Approx>> values, keys;
    for (size_t i = 0; i <= cached; ++i) {
      const size_t place = to.at(r, i);
      values.push_back(i < cached ? exact(latent_old, place * P::LORA, P::LORA) : latent);
      keys.push_back(
          joined(values.back(), i < cached ? exact(rope_old, place * P::ROPE, P::ROPE) : k_rope));
    }
    for (size_t h = 0; h < P::HEADS; ++h) {
      const size_t begin = (r * P::HEADS + h) * q_width;
      std::vector<Approx> query, scores;
      for (size_t n = 0; n < P::LORA; ++n) {
        query.push_back(round_to<T>(embed.dot(h * P::LORA + n, [&](size_t k) {
          return Approx{static_cast<float>(q.values()[begin + k]), 0};
        })));
      }
      query = joined(query, turned_neighbours(q.values(), begin + P::NOPE, P::ROPE, angles));
      for (const auto& key : keys) scores.push_back(mul(dot_product(query, key), {0.2f, 0}));
      const auto want = softmax_average(scores, values, cached / (8.0 * P::SPLITS) + 24);
      for (size_t d = 0; d < P::LORA; ++d) {
        const size_t at = (r * P::HEADS + h) * P::SPLITS;
        const double got = merged(partial.values(), stats.values(), at, P::SPLITS, P::LORA, d);
        ASSERT_LE(std::abs(got - want[d].value), want[d].error) << "head " << h << " element " << d;
      }
    }
  }
  size_t changed = 0;  // only the newest position may change
  const auto kept = [&](size_t place) {
    const uint row = rows - place / to.capacity;
    return row == rows || place % to.capacity != to.slot(row);
  };
  for (size_t i = 0; i < latent_old.size(); ++i)
    changed += kept(i / P::LORA) && float(latent_old[i]) != float(latent_new[i]);
  for (size_t i = 0; i < rope_old.size(); ++i)
    changed += kept(i / P::ROPE) && float(rope_old[i]) != float(rope_new[i]);
  EXPECT_EQ(changed, 0u);
}

TEST(AttentionMla, GlmSlice) {
  check_mla<MlaParams<bfloat16_t, 4, 64, 2, 192, 64, 512, 4, 768>>(1, 45, 18);
}
TEST(AttentionMla, FirstTokenTwoRows) {
  check_mla<MlaParams<float, 4, 32, 3, 64, 32, 64, 2, 16>>(2, 0, 7);
}
TEST(AttentionMla, OneHead) {
  check_mla<MlaParams<float, 4, 32, 1, 32, 32, 64, 2, 16>>(1, 5, 2);
}
TEST(AttentionMla, SmallRope) {
  check_mla<MlaParams<float16_t, 8, 32, 2, 32, 16, 96, 1, 0>>(2, 19, 0);
}

template <class P>
void check_unembed(size_t rows) {
  using T = typename P::T;
  Stretches s(rows * P::HEADS, P::SPLITS, P::LORA);
  Buffer<float> partial(s.partial), stats(s.stats);
  Stack<T> w(P::HEADS, P::V, P::LORA, P::BITS, P::GROUP);
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * P::HEADS * P::V));
    launch(
        kernels::mla_unembed<P>{partial, stats, w.weight, w.scales, w.biases, std::get<0>(outputs)},
        {.rows = rows}, {blocks(P::V, 32), P::HEADS, uint(rows)}, 256, order);
    return outputs;
  });
  for (size_t at = 0; at < out.values().size(); ++at) {
    const size_t head = at / P::V;
    const Approx y =
        w.dot(head % P::HEADS * P::V + at % P::V, [&](size_t i) { return s.at<T>(head, i); });
    expect_near(out.values()[at], round_to<T>(y), "out", at);
  }
}

TEST(MlaUnembed, GlmSlice) {
  check_unembed<OutParams<bfloat16_t, 4, 64, 2, 512, 4, 48>>(1);
}
TEST(MlaUnembed, OneStretchTwoRows) {
  check_unembed<OutParams<float, 8, 32, 3, 96, 1, 10>>(2);
}

// ---- norm + router ----

template <typename T_, int BITS_, int GROUP_, int H_, int E_, int K_, bool NORM_>
struct GateParams {
  using T = T_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, H = H_, E = E_, K = K_;
  static constexpr bool NORM = NORM_;
};

// The k largest of `score`, best first.
std::vector<uint> best_of(const std::vector<double>& score, size_t k) {
  std::vector<uint> order(score.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](uint a, uint b) { return score[a] > score[b]; });
  order.resize(k);
  return order;
}

std::vector<double> values_of(const std::vector<Approx>& logits) {
  std::vector<double> v;
  for (const Approx& l : logits) v.push_back(l.value);
  return v;
}

template <class P>
void check_norm_router_softmax(size_t rows) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(rows * P::H, -2.0f, 2.0f));
  Buffer<T> norm_weight(uniform_vector<T>(P::H, 0.5f, 1.5f));
  Buffer<float> eps({0.25f});
  Stack<T> gate(1, P::E, P::H, P::BITS, P::GROUP);
  auto [out, indices, weights] = in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<T>::output(rows * P::H), Buffer<uint>::output(rows * P::K),
                        Buffer<T>::output(rows * P::K));
    auto& [o, i, w] = outputs;
    launch(kernels::norm_router_softmax<P>{x, norm_weight, eps, gate.weight, gate.scales,
                                           gate.biases, o, i, w},
           {.rows = rows}, {uint(rows), 1, 1}, 512, order);
    return outputs;
  });
  for (size_t r = 0; r < rows; ++r) {
    const auto normed =
        rms_norm_oracle<T>(exact(x.values(), r * P::H, P::H), norm_weight.values(), 0.25);
    std::vector<Approx> logits;
    for (int e = 0; e < P::E; ++e)
      logits.push_back(round_to<T>(gate.dot(e, [&](size_t k) { return normed[k]; })));
    for (int k = 0; k < P::H; ++k)
      expect_near(out.values()[r * P::H + k], normed[k], "normed", r * P::H + k);
    double total = 0.0, chosen = 0.0, worst = 0.0;
    for (const Approx& l : logits) total += std::exp(l.value), worst = std::max(worst, l.error);
    auto order = best_of(values_of(logits), P::K);
    for (uint e : order) chosen += std::exp(logits[e].value) / total;
    for (int c = 0; c < P::K; ++c) {
      const size_t at = r * P::K + c;
      const uint e = indices.values()[at], wanted = order[P::K - 1 - c];
      // Equal probabilities in T may stand in either order.
      const double gap = std::abs(logits[e].value - logits[wanted].value);
      ASSERT_LE(gap, 2 * worst + 2 * unit<T>()) << "row " << r << " place " << c;
      Approx w{std::exp(logits[e].value) / total / (P::NORM ? chosen : 1.0), 0};
      w.error = w.value * (4 * worst + 300 * kUnit + (P::K + 4) * unit<T>());
      expect_near(weights.values()[at], w, "weights", at);
    }
  }
}

TEST(NormRouter, QwenSlice) {
  check_norm_router_softmax<GateParams<bfloat16_t, 8, 64, 512, 128, 8, true>>(1);
}
TEST(NormRouter, Fp32ThreeRows) {
  check_norm_router_softmax<GateParams<float, 4, 32, 160, 41, 3, false>>(3);
}

TEST(NormRouter, OneExpertInTheLastPlace) {
  check_norm_router_softmax<GateParams<float, 4, 32, 160, 33, 8, false>>(1);
}

template <class P>
void check_norm_router_sigmoid(size_t rows) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(rows * P::H, -2.0f, 2.0f));
  Buffer<T> norm_weight(uniform_vector<T>(P::H, 0.5f, 1.5f));
  Buffer<T> gate(uniform_vector<T>(P::E * P::H, -0.1f, 0.1f));
  Buffer<float> eps({0.25f}), bias(uniform_vector<float>(P::E, -0.3f, 0.3f)), scaling({1.8f});
  auto [out, indices, weights] = in_every_order([&](Order order) {
    auto outputs =
        std::make_tuple(Buffer<T>::output(rows * P::H), Buffer<uint>::output(rows * P::K),
                        Buffer<float>::output(rows * P::K));
    auto& [o, i, w] = outputs;
    launch(kernels::norm_router_sigmoid<P>{x, norm_weight, eps, gate, bias, scaling, o, i, w},
           {.rows = rows}, {uint(rows), 1, 1}, 512, order);
    return outputs;
  });
  for (size_t r = 0; r < rows; ++r) {
    const auto normed =
        rms_norm_oracle<T>(exact(x.values(), r * P::H, P::H), norm_weight.values(), 0.25);
    std::vector<Approx> scores;
    std::vector<double> biased;
    double worst = 0.0;
    for (int k = 0; k < P::H; ++k)
      expect_near(out.values()[r * P::H + k], normed[k], "normed", r * P::H + k);
    for (int e = 0; e < P::E; ++e) {
      const Approx logit = round_to<T>(dot_product(normed, exact(gate.values(), e * P::H, P::H)));
      scores.push_back(sigmoid<float>(logit));
      biased.push_back(scores.back().value + bias.values()[e]);
      worst = std::max(worst, scores.back().error);
    }
    const auto order = best_of(biased, P::K);
    Approx sum;
    for (uint e : order) sum = add(sum, scores[e]);
    for (int c = 0; c < P::K; ++c) {
      const size_t at = r * P::K + c;
      const uint e = indices.values()[at];
      ASSERT_LE(std::abs(biased[e] - biased[order[c]]), 2 * worst) << "row " << r << " place " << c;
      const Approx w = mul(P::NORM ? div(scores[e], sum) : scores[e], {double(1.8f), 0});
      expect_near(weights.values()[at], w, "weights", at);
    }
  }
}

TEST(NormRouter, GlmSlice) {
  check_norm_router_sigmoid<GateParams<bfloat16_t, 0, 0, 512, 64, 4, true>>(2);
}
TEST(NormRouter, SigmoidFp16NoNorm) {
  check_norm_router_sigmoid<GateParams<float16_t, 0, 0, 200, 37, 2, false>>(1);
}

// ---- experts of the step ----

template <typename T_, typename W_, int BITS_, int GROUP_, int E_, int K_, int H_, int I_, int D_,
          int COMBINE_>
struct StepParams {
  using T = T_;
  using W = W_;
  static constexpr int BITS = BITS_, GROUP = GROUP_, E = E_, K = K_, H = H_, I = I_, D = D_,
                       COMBINE = COMBINE_;
};

template <class P>
Approx weighted(Approx sum, Approx y, double weight) {
  using T = typename P::T;
  y = mul(round_to<T>(y), {weight, 0});
  if (P::COMBINE == 0) return round_to<T>(add(sum, round_to<T>(y)));
  return add(sum, y);
}

template <class P>
void check_down_residual(size_t rows) {
  using T = typename P::T;
  using W = typename P::W;
  Buffer<T> hidden(uniform_vector<T>(rows * P::K * P::I, -1.0f, 1.0f));
  Buffer<T> residual(uniform_vector<T>(rows * P::D, -1.0f, 1.0f));
  Stack<T> down(P::E, P::D, P::I, P::BITS, P::GROUP);
  std::vector<uint> chosen(rows * P::K);
  for (uint& i : chosen) i = random_engine()() % P::E;
  Buffer<uint> indices(chosen);
  Buffer<W> weights(uniform_vector<W>(rows * P::K, 0.05f, 0.6f));
  auto [out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * P::D));
    launch(kernels::moe_experts_down_residual<P>{hidden, indices, weights, down.weight, down.scales,
                                                 down.biases, residual, std::get<0>(outputs)},
           {.rows = rows}, {blocks(P::D, 4), uint(rows), 1}, 32 * P::K, order);
    return outputs;
  });
  for (size_t at = 0; at < rows * P::D; ++at) {
    Approx sum;
    for (size_t k = 0; k < P::K; ++k) {
      const size_t slot = at / P::D * P::K + k;
      const Approx y = down.dot(chosen[slot] * P::D + at % P::D, [&](size_t i) {
        return Approx{static_cast<float>(hidden.values()[slot * P::I + i]), 0};
      });
      sum = weighted<P>(sum, y, static_cast<float>(weights.values()[slot]));
    }
    const Approx x{static_cast<float>(residual.values()[at]), 0};
    expect_near(out.values()[at], round_to<T>(add(x, round_to<T>(sum))), "out", at);
  }
}

TEST(StepExperts, DownResidualQwenSlice) {
  check_down_residual<StepParams<bfloat16_t, bfloat16_t, 4, 64, 5, 8, 64, 768, 10, 0>>(1);
}
TEST(StepExperts, DownResidualRows) {
  check_down_residual<StepParams<float, float, 8, 32, 3, 2, 64, 160, 7, 1>>(4);
}

TEST(StepExperts, DownResidualSummedInFp32) {
  check_down_residual<StepParams<bfloat16_t, float, 4, 32, 6, 4, 64, 64, 40, 1>>(2);
}

template <class P>
void check_shared(size_t rows) {
  using T = typename P::T;
  Buffer<T> x(uniform_vector<T>(rows * P::H, -1.0f, 1.0f));
  Buffer<T> residual(uniform_vector<T>(rows * P::D, -1.0f, 1.0f));
  Stack<T> gate(P::E, P::I, P::H, P::BITS, P::GROUP), up(P::E, P::I, P::H, P::BITS, P::GROUP),
      down(P::E, P::D, P::I, P::BITS, P::GROUP);
  Stack<T> shared_gate(1, P::I, P::H, P::BITS, P::GROUP),
      shared_up(1, P::I, P::H, P::BITS, P::GROUP), shared_down(1, P::D, P::I, P::BITS, P::GROUP);
  std::vector<uint> chosen(rows * P::K);
  for (uint& i : chosen) i = random_engine()() % P::E;
  Buffer<uint> indices(chosen);
  Buffer<float> weights(uniform_vector<float>(rows * P::K, 0.05f, 0.6f));
  auto [hidden, out] = in_every_order([&](Order order) {
    auto outputs = std::make_tuple(Buffer<T>::output(rows * (P::K + 1) * P::I),
                                   Buffer<T>::output(rows * P::D));
    auto& [h, o] = outputs;
    launch(kernels::moe_experts_gate_up_shared<P>{x, indices, gate.weight, gate.scales, gate.biases,
                                                  up.weight, up.scales, up.biases,
                                                  shared_gate.weight, shared_gate.scales,
                                                  shared_gate.biases, shared_up.weight,
                                                  shared_up.scales, shared_up.biases, h},
           {.rows = rows}, {blocks(P::I, 8), P::K + 1, uint(rows)}, 64, order);
    launch(kernels::moe_experts_down_shared<P>{h, indices, weights, down.weight, down.scales,
                                               down.biases, shared_down.weight, shared_down.scales,
                                               shared_down.biases, residual, o},
           {.rows = rows}, {blocks(P::D, 4), uint(rows), 1}, 32 * (P::K + 1), order);
    return outputs;
  });
  const auto& stored = hidden.values();
  for (size_t at = 0; at < stored.size(); ++at) {
    const size_t row = at / P::I / (P::K + 1), k = at / P::I % (P::K + 1);
    auto x_at = [&](size_t i) { return Approx{static_cast<float>(x.values()[row * P::H + i]), 0}; };
    const size_t n = at % P::I, e = k < P::K ? chosen[row * P::K + k] * P::I + n : n;
    const Approx h = k < P::K ? swiglu<T, true>(gate.dot(e, x_at), up.dot(e, x_at))
                              : swiglu<T, true>(shared_gate.dot(e, x_at), shared_up.dot(e, x_at));
    expect_near(hidden.values()[at], h, "hidden", at);
  }
  for (size_t at = 0; at < rows * P::D; ++at) {
    const size_t row = at / P::D;
    auto part = [&](const Stack<T>& w, size_t matrix_row, size_t k) {
      return w.dot(matrix_row, [&](size_t i) {
        return Approx{static_cast<float>(stored[(row * (P::K + 1) + k) * P::I + i]), 0};
      });
    };
    Approx sum;
    for (size_t k = 0; k < P::K; ++k) {
      const size_t slot = row * P::K + k;
      sum =
          weighted<P>(sum, part(down, chosen[slot] * P::D + at % P::D, k), weights.values()[slot]);
    }
    const Approx y = round_to<T>(part(shared_down, at % P::D, P::K));
    const Approx r{static_cast<float>(residual.values()[at]), 0};
    const Approx moe = round_to<T>(add(round_to<T>(sum), y));
    expect_near(out.values()[at], round_to<T>(add(r, moe)), "out", at);
  }
}

TEST(StepExperts, SharedGlmSlice) {
  check_shared<StepParams<bfloat16_t, float, 4, 64, 4, 4, 512, 128, 12, 1>>(1);
}
// Enough elements that a rounding less shows in some.
TEST(StepExperts, SharedRoundsTheSumFirst) {
  check_shared<StepParams<bfloat16_t, float, 4, 64, 4, 4, 64, 128, 256, 1>>(2);
}
TEST(StepExperts, SharedRows) {
  check_shared<StepParams<float, float, 8, 32, 2, 1, 96, 64, 5, 1>>(3);
}

}  // namespace
