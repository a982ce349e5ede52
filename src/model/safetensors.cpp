#include "model/safetensors.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <vector>

#include "model/json.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

using nlohmann::json;

constexpr const char* kWhere = "load";
constexpr uint64_t kMostHeader = 100'000'000;  // the format's own limit

struct Extent {
  uint64_t begin, end;
  std::string tensor;
};

uint64_t shape_bytes(const std::string& where, const json& shape, uint64_t size) {
  const auto bad = [&](const char* expected) { fail(kWhere, where, expected, excerpt(shape)); };
  if (!shape.is_array()) bad("a shape");
  bool empty = false;
  for (const json& n : shape) {
    if (!n.is_number_unsigned() || n > uint64_t(INT32_MAX)) bad("a shape of 31-bit numbers");
    // MLX multiplies strides without a look, so an empty tensor's other dimensions have to fit too.
    const uint64_t count = std::max<uint64_t>(1, n.get<uint64_t>());
    empty |= n == 0;
    if (__builtin_mul_overflow(size, count, &size) || size > uint64_t(INT64_MAX))
      bad("a shape that fits");
  }
  return empty ? 0 : size;
}

Extent check_tensor(const std::string& where, const json& entry, uint64_t data_bytes) {
  static const std::map<std::string, int> sizes = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"U32", 4},
                                                   {"I32", 4}, {"U8", 1},  {"I8", 1},   {"I64", 8},
                                                   {"U64", 8}, {"U16", 2}, {"BOOL", 1}, {"I16", 2}};
  const auto bad = [&](const std::string& expected, const json& got) {
    fail(kWhere, where, expected, excerpt(got));
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets"))
    bad("dtype, shape and data_offsets", entry);
  const json &dtype = entry["dtype"], &offsets = entry["data_offsets"];
  if (!dtype.is_string() || !sizes.count(dtype.get<std::string>())) bad("a known dtype", dtype);
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned())
    bad("two data_offsets", offsets);
  const uint64_t size = shape_bytes(where, entry["shape"], sizes.at(dtype.get<std::string>()));
  const uint64_t begin = offsets[0], end = offsets[1];
  if (begin > end || end > data_bytes)
    bad("data within the file's " + std::to_string(data_bytes) + " bytes", offsets);
  if (end - begin != size) bad(std::to_string(size) + " bytes for its shape", offsets);
  return {begin, end, where};
}

// A shared extent would let a small file promise any amount of memory.
void check_disjoint(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  for (size_t i = 1; i < extents.size(); ++i)
    if (extents[i].begin < extents[i - 1].end)
      fail(kWhere, extents[i].tensor, "bytes of its own", "some of " + extents[i - 1].tensor);
}

// MLX takes the metadata for strings.
void check_metadata(const std::string& name, const json& metadata) {
  const bool strings =
      metadata.is_object() &&
      std::all_of(metadata.begin(), metadata.end(), [](const json& v) { return v.is_string(); });
  if (!strings) fail(kWhere, name + ": __metadata__", "an object of strings", excerpt(metadata));
}

}  // namespace

uint64_t check_safetensors(const std::string& name, std::istream& file, uint64_t file_bytes) {
  uint64_t header_bytes = 0;
  if (file_bytes < 8 || !file.read(reinterpret_cast<char*>(&header_bytes), 8))
    fail(kWhere, name, "a safetensors header", std::to_string(file_bytes) + " bytes");
  if (header_bytes > file_bytes - 8)
    fail(kWhere, name, "a header within the file's " + std::to_string(file_bytes) + " bytes",
         std::to_string(header_bytes));
  if (header_bytes == 0 || header_bytes >= kMostHeader)
    fail(kWhere, name, "a header of 1 to " + std::to_string(kMostHeader - 1) + " bytes",
         std::to_string(header_bytes));
  std::string text(header_bytes, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(header_bytes)))
    fail(kWhere, name, "a readable header", "an early end");
  const uint64_t data_bytes = file_bytes - 8 - header_bytes;
  std::vector<Extent> extents;
  const json header = parse_object(kWhere, name + "'s header", text);
  for (const auto& [tensor, entry] : header.items()) {
    if (tensor == "__metadata__")
      check_metadata(name, entry);
    else
      extents.push_back(
          check_tensor(std::string(name).append(": ").append(tensor), entry, data_bytes));
  }
  check_disjoint(extents);
  return data_bytes;
}

std::set<std::string> index_files(const std::string& name, const std::string& text) {
  const json index = parse_object(kWhere, name, text);
  if (!index.contains("weight_map") || !index["weight_map"].is_object())
    fail(kWhere, name, "a weight_map", excerpt(index));
  std::set<std::string> files;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    const std::string part = file.is_string() ? file.get<std::string>() : "";
    const std::filesystem::path path(part);
    if (path.has_parent_path() || path.extension() != ".safetensors" ||
        part.find('\0') != std::string::npos)
      fail(kWhere, "weight_map." + tensor, "a *.safetensors in the same folder", excerpt(file));
    files.insert(part);
  }
  return files;
}

}  // namespace moefuse
