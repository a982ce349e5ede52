// The decode step through its C++ API, on both trained checkpoints: what a sanitizer can see of it.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "moefuse/decoder.h"

namespace moefuse {
namespace {

constexpr int kSlots = 24;

std::vector<LayerCache> empty_caches(const Decoder& decoder, int sequences) {
  const auto [heads, key_dim, value_dim] = decoder.cache_shape();
  std::vector<LayerCache> caches;
  for (int layer = 0; layer < decoder.config().num_hidden_layers; ++layer) {
    caches.push_back({mx::zeros({sequences, heads, kSlots, key_dim}, decoder.dtype()),
                      mx::zeros({sequences, heads, kSlots, value_dim}, decoder.dtype())});
    mx::eval(caches.back().keys, caches.back().values);
  }
  return caches;
}

// The bytes of each row's logits over a few steps; tokens[sequence] is fed again and again.
std::vector<std::string> decode(Decoder& decoder, const std::vector<uint32_t>& tokens) {
  auto caches = empty_caches(decoder, static_cast<int>(tokens.size()));
  std::vector<std::string> bytes(tokens.size());
  for (int slot = 0; slot < kSlots; ++slot) {
    std::vector<StepRow> rows;
    for (size_t i = 0; i < tokens.size(); ++i)
      rows.push_back({.token = tokens[i] + slot,
                      .sequence = static_cast<int>(i),
                      .position = slot,
                      .first = 0,
                      .slot = slot});
    const mx::array logits = decoder.step(rows, caches);
    const size_t size = logits.nbytes() / tokens.size();
    for (size_t i = 0; i < tokens.size(); ++i)
      bytes[i] += std::string(logits.data<char>() + i * size, size);
  }
  return bytes;
}

class Step : public ::testing::TestWithParam<std::tuple<const char*, Accumulate>> {};

TEST_P(Step, ARowsBitsDependOnNoOtherRow) {
  mx::set_default_device(mx::Device::cpu);
  const auto [name, accumulate] = GetParam();
  const Model model = load_model(std::string(MOEFUSE_MODELS) + "/" + name);
  Decoder decoder(model, accumulate);
  const std::vector<uint32_t> tokens = {7, 300, 7, 41};
  const auto together = decode(decoder, tokens);
  EXPECT_EQ(together[0], together[2]);
  EXPECT_NE(together[0], together[1]) << "other tokens, other logits";
  for (int i : {0, 1, 3}) EXPECT_EQ(decode(decoder, {tokens[i]})[0], together[i]) << "row " << i;
}

// A checkpoint may hold more than its layers, a draft layer say: nobody evaluates that.
TEST(Decoder, IsBuiltBesideATensorThatNoStageReads) {
  mx::set_default_device(mx::Device::cpu);
  Model model = load_model(std::string(MOEFUSE_MODELS) + "/qwen3-moe-tiny");
  const mx::array spare = mx::zeros({2 << 20});
  ASSERT_NE(spare.status(), mx::array::Status::available);
  model.weights.emplace("model.layers.99.spare", spare);
  EXPECT_NO_THROW(Decoder(model, Accumulate::exact));
}

INSTANTIATE_TEST_SUITE_P(
    Checkpoints, Step,
    ::testing::Combine(::testing::Values("qwen3-moe-tiny", "glm4-moe-lite-tiny"),
                       ::testing::Values(Accumulate::exact, Accumulate::fp32_no_fma,
                                         Accumulate::fp32)));

}  // namespace
}  // namespace moefuse
