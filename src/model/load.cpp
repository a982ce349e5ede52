#include <filesystem>
#include <fstream>
#include <limits>
#include <set>

#include "model/safetensors.h"
#include "moefuse/model.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

namespace fs = std::filesystem;

constexpr const char* kWhere = "load";

constexpr uint64_t kMostText = 100'000'000;

// Only a plain file: a pipe would wait for ever and a device never end.
uint64_t plain_file_bytes(const fs::path& path) {
  std::error_code error;
  const bool plain = fs::is_regular_file(path, error);
  const uint64_t bytes = plain ? fs::file_size(path, error) : 0;
  if (!plain || error)
    fail(kWhere, path.string(), "a readable file", error ? error.message() : "something else");
  return bytes;
}

std::string read_text(const fs::path& path) {
  const uint64_t bytes = plain_file_bytes(path);
  if (bytes > kMostText)
    fail(kWhere, path.string(), "at most " + std::to_string(kMostText) + " bytes",
         std::to_string(bytes));
  std::string text(bytes, '\0');
  if (!std::ifstream(path, std::ios::binary).read(text.data(), std::streamsize(bytes)))
    fail(kWhere, path.string(), "a readable file", "an error");
  return text;
}

// The files that hold the weights: those of the index, else every *.safetensors of the folder.
std::set<std::string> weight_files(const fs::path& folder) {
  const fs::path index = folder / "model.safetensors.index.json";
  std::error_code error;
  if (fs::symlink_status(index, error).type() != fs::file_type::not_found)
    return index_files(index.filename().string(), read_text(index));
  std::set<std::string> files;
  for (const auto& entry : fs::directory_iterator(folder, error))
    if (entry.path().extension() == ".safetensors") files.insert(entry.path().filename().string());
  if (error) fail(kWhere, folder.string(), "a readable folder", error.message());
  return files;
}

// Not everything that MLX refuses is a bad header: a file may go while it is read.
mx::SafetensorsLoad read_weights(const fs::path& path) {
  try {
    return mx::load_safetensors(path.string(), mx::Device::cpu);
  } catch (const std::exception& error) {
    fail(kWhere, path.filename().string(), "a file that MLX reads", error.what());
  }
}

}  // namespace

std::optional<uint64_t> available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string field;
  for (uint64_t kilobytes; file >> field;) {
    if (field == "MemAvailable:" && file >> kilobytes) return kilobytes * 1024;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::nullopt;
}

void check_memory(const std::string& model, uint64_t weight_bytes,
                  std::optional<uint64_t> available) {
  const uint64_t estimate = weight_bytes + weight_bytes / 20;
  if (!available || estimate <= *available) return;
  fail(kWhere, model,
       "weights that fit into the " + std::to_string(*available) + " bytes of available memory",
       "an estimate of " + std::to_string(estimate) + " bytes (" + std::to_string(weight_bytes) +
           " of weights and a twentieth)");
}

Model load_model(const std::string& path) {
  const fs::path folder(path);
  std::error_code error;
  if (!fs::is_directory(folder, error)) fail(kWhere, path, "a model folder", "none");
  Model model{parse_config(read_text(folder / "config.json")), {}};
  const auto files = weight_files(folder);
  if (files.empty()) fail(kWhere, path, "*.safetensors", "none");
  uint64_t weight_bytes = 0;
  for (const std::string& file : files) {
    const uint64_t bytes = plain_file_bytes(folder / file);
    std::ifstream stream(folder / file, std::ios::binary);
    weight_bytes += check_safetensors(file, stream, bytes);
  }
  check_memory(path, weight_bytes, available_memory());
  for (const std::string& file : files) {
    for (auto& [name, array] : read_weights(folder / file).first)
      if (!model.weights.emplace(name, array).second)
        fail(kWhere, std::string(file).append(": ").append(name), "a tensor once", "a second one");
  }
  return model;
}

}  // namespace moefuse
