// Greedy decoding in C++: loads a checkpoint in mlx-lm's layout and prints the token ids that
// follow the given ones, with stock MLX's bits.
//
//   generate MODEL COUNT TOKEN...
//
// A tokenizer is the caller's: this program takes and gives ids.
#include <charconv>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moefuse/decoder.h"

namespace mx = mlx::core;

namespace {

uint32_t parse(const std::string& name, std::string_view text) {
  uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    throw std::invalid_argument(name + ": expected a number from 0, got '" + std::string(text) +
                                "'");
  return value;
}

std::vector<moefuse::LayerCache> empty_caches(const moefuse::Decoder& decoder, int slots) {
  const auto [heads, key_dim, value_dim] = decoder.cache_shape();
  std::vector<moefuse::LayerCache> caches;
  for (int layer = 0; layer < decoder.config().num_hidden_layers; ++layer) {
    caches.push_back({mx::zeros({1, heads, slots, key_dim}, decoder.dtype()),
                      mx::zeros({1, heads, slots, value_dim}, decoder.dtype())});
    mx::eval(caches.back().keys, caches.back().values);  // a step writes into these buffers
  }
  return caches;
}

void generate(const std::string& folder, uint32_t count, const std::vector<uint32_t>& prompt) {
  if (!moefuse::has_executor()) mx::set_default_device(mx::Device::cpu);
  const moefuse::Model model = moefuse::load_model(folder);
  moefuse::Decoder decoder(model, moefuse::Accumulate::exact);
  const size_t slots = prompt.size() + count;
  if (slots > static_cast<size_t>(model.config.max_position_embeddings))
    throw std::invalid_argument("COUNT: expected at most " +
                                std::to_string(model.config.max_position_embeddings) +
                                " tokens with the prompt, got " + std::to_string(slots));
  std::vector<moefuse::LayerCache> caches = empty_caches(decoder, static_cast<int>(slots));

  uint32_t token = prompt[0];
  for (size_t slot = 0; slot + 1 < slots; ++slot) {
    const int at = static_cast<int>(slot);
    const mx::array logits = decoder.step(
        {{.token = token, .sequence = 0, .position = at, .first = 0, .slot = at}}, caches);
    if (slot + 1 < prompt.size()) {
      token = prompt[slot + 1];
      continue;
    }
    token = mx::argmax(logits, -1).item<uint32_t>();
    std::cout << token << (slot + 2 < slots ? " " : "\n") << std::flush;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate MODEL COUNT TOKEN...\n";
    return 2;
  }
  try {
    std::vector<uint32_t> prompt;
    for (int i = 3; i < argc; ++i) prompt.push_back(parse("TOKEN", argv[i]));
    generate(argv[1], parse("COUNT", argv[2]), prompt);
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 1;
  }
}
