#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "moefuse/model.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kWhere = "load";

std::string read_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(kWhere, path.string(), "a readable file", "none");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// The header's own promise against the file: nothing past the end, no overlap is needed to be
// known, every extent equal to its shape's bytes.
void check_tensor(const fs::path& path, const std::string& name, const json& entry,
                  uint64_t data_bytes) {
  const std::string where = path.filename().string() + ": " + name;
  static const std::map<std::string, int> sizes = {
      {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"U32", 4},  {"I32", 4}, {"U8", 1}, {"I8", 1},
      {"F64", 8}, {"I64", 8}, {"U64", 8},  {"BOOL", 1}, {"U16", 2}, {"I16", 2}};
  const auto bad = [&](const std::string& expected, const json& got) {
    fail(kWhere, where, expected, got.dump());
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets"))
    bad("dtype, shape and data_offsets", entry);
  const json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  if (!dtype.is_string() || !sizes.count(dtype.get<std::string>())) bad("a known dtype", dtype);
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned())
    bad("two data_offsets", offsets);
  if (!shape.is_array()) bad("a shape", shape);
  uint64_t size = sizes.at(dtype.get<std::string>());
  for (const json& n : shape) {
    if (!n.is_number_unsigned() || n > uint64_t(INT32_MAX))
      bad("a shape of non-negative numbers", shape);
    if (__builtin_mul_overflow(size, n.get<uint64_t>(), &size)) bad("a shape that fits", shape);
  }
  const uint64_t begin = offsets[0], end = offsets[1];
  if (begin > end || end > data_bytes)
    bad("data within the file's " + std::to_string(data_bytes) + " bytes", offsets);
  if (end - begin != size) bad(std::to_string(size) + " bytes for its shape", offsets);
}

// Returns the bytes of its tensors.
uint64_t check_safetensors(const fs::path& path) {
  const std::string name = path.filename().string();
  std::error_code error;
  const uint64_t file_bytes = fs::file_size(path, error);
  if (error) fail(kWhere, path.string(), "a readable file", error.message());
  std::ifstream file(path, std::ios::binary);
  uint64_t header_bytes = 0;
  if (file_bytes < 8 || !file.read(reinterpret_cast<char*>(&header_bytes), 8))
    fail(kWhere, name, "a safetensors header", std::to_string(file_bytes) + " bytes");
  if (header_bytes > file_bytes - 8 || header_bytes > (100u << 20))
    fail(kWhere, name, "a header within the file's " + std::to_string(file_bytes) + " bytes",
         std::to_string(header_bytes));
  std::string text(header_bytes, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(header_bytes)))
    fail(kWhere, name, "a readable header", "an early end");
  const json header = json::parse(text, nullptr, false);
  if (!header.is_object()) fail(kWhere, name, "a JSON header", "something else");
  for (const auto& [tensor, entry] : header.items())
    if (tensor != "__metadata__") check_tensor(path, tensor, entry, file_bytes - 8 - header_bytes);
  return file_bytes - 8 - header_bytes;
}

// The files that hold the weights: those of the index, else every *.safetensors of the folder.
std::set<std::string> weight_files(const fs::path& folder) {
  std::set<std::string> files;
  const fs::path index = folder / "model.safetensors.index.json";
  if (fs::exists(index)) {
    const json parsed = json::parse(read_text(index), nullptr, false);
    if (!parsed.is_object() || !parsed.contains("weight_map") || !parsed["weight_map"].is_object())
      fail(kWhere, index.filename().string(), "an object with a weight_map", "something else");
    for (const auto& [tensor, file] : parsed["weight_map"].items()) {
      if (!file.is_string() || fs::path(file.get<std::string>()).has_parent_path())
        fail(kWhere, "weight_map." + tensor, "a file name in the same folder", file.dump());
      files.insert(file.get<std::string>());
    }
    return files;
  }
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") files.insert(entry.path().filename().string());
  return files;
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
  if (!fs::is_directory(folder)) fail(kWhere, path, "a model folder", "none");
  Model model{parse_config(read_text(folder / "config.json")), {}};
  const auto files = weight_files(folder);
  if (files.empty()) fail(kWhere, path, "*.safetensors", "none");
  uint64_t weight_bytes = 0;
  for (const std::string& file : files) weight_bytes += check_safetensors(folder / file);
  check_memory(path, weight_bytes, available_memory());
  for (const std::string& file : files) {
    auto loaded = mx::load_safetensors((folder / file).string(), mx::Device::cpu);
    for (auto& [name, array] : loaded.first)
      if (!model.weights.emplace(name, array).second)
        fail(kWhere, file + ": " + name, "a tensor once", "a second one");
  }
  return model;
}

}  // namespace moefuse
