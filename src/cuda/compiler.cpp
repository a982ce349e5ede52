#include "cuda/compiler.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string_view>
#include <vector>

#include "cuda/library.h"
#include "mlx/backend/cuda/cuda.h"

namespace moefuse::cuda {

namespace fs = std::filesystem;

namespace {

struct Compiler {
  void* handle = library({"libnvrtc.so.13", "libnvrtc.so.12"});
  MOEFUSE_ENTRY(version, "nvrtcVersion", int*, int*);
  MOEFUSE_ENTRY(create, "nvrtcCreateProgram", void**, const char*, const char*, int,
                const char* const*, const char* const*);
  MOEFUSE_ENTRY(compile, "nvrtcCompileProgram", void*, int, const char* const*);
  MOEFUSE_ENTRY(destroy, "nvrtcDestroyProgram", void**);
  MOEFUSE_ENTRY(log_size, "nvrtcGetProgramLogSize", void*, size_t*);
  MOEFUSE_ENTRY(log, "nvrtcGetProgramLog", void*, char*);
  MOEFUSE_ENTRY(code_size, "nvrtcGetCUBINSize", void*, size_t*);
  MOEFUSE_ENTRY(code, "nvrtcGetCUBIN", void*, char*);
};

const Compiler& compiler() {
  static const Compiler found;
  return found;
}

// Where cuda_bf16.h is: beside MLX's wheel, as MLX itself looks for it, or in a toolkit.
std::string include_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&mlx::core::cu::is_available), &info)) {
    const fs::path packages = fs::path(info.dli_fname).parent_path().parent_path().parent_path();
    for (const char* folder : {"cu13", "cuda_runtime"}) {
      const fs::path path = packages / "nvidia" / folder / "include";
      if (fs::exists(path / "cuda_bf16.h")) return path.string();
    }
  }
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* home = std::getenv(name)) return std::string(home) + "/include";
  return "/usr/local/cuda/include";
}

void check_compiler(int status, void* program) {
  if (status == 0) return;
  size_t size = 0;
  compiler().log_size(program, &size);
  std::string log(size, ' ');
  compiler().log(program, log.data());
  throw std::runtime_error("[cuda compile] " + log);
}

std::string compiled(const std::string& source, const std::vector<std::string>& options) {
  const Compiler& c = compiler();
  void* program = nullptr;
  check_compiler(c.create(&program, source.c_str(), "moefuse.cu", 0, nullptr, nullptr), program);
  std::vector<const char*> list;
  list.reserve(options.size());
  for (const std::string& option : options) list.push_back(option.c_str());
  check_compiler(c.compile(program, static_cast<int>(list.size()), list.data()), program);
  size_t size = 0;
  check_compiler(c.code_size(program, &size), program);
  std::string code(size, ' ');
  check_compiler(c.code(program, code.data()), program);
  c.destroy(&program);
  return code;
}

// FNV-1a: names a file and finds damage; whether a key is the wanted one is compared byte by byte.
uint64_t hash_of(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

std::string head_of(const std::string& key, std::string_view code) {
  char head[96];
  std::snprintf(head, sizeof head, "moefuse code 1: %zu %zu %016llx\n", key.size(), code.size(),
                static_cast<unsigned long long>(hash_of(code)));
  return head;
}

}  // namespace

fs::path code_folder() {
  if (const char* wish = std::getenv("MOEFUSE_CUDA_CACHE")) return wish;
  if (const char* caches = std::getenv("XDG_CACHE_HOME"); caches && *caches)
    return fs::path(caches) / "moefuse" / "cuda";
  if (const char* home = std::getenv("HOME"); home && *home)
    return fs::path(home) / ".cache" / "moefuse" / "cuda";
  return {};
}

std::string machine_code(const std::string& source, int capability) {
  // From 9.0 on with what only that architecture has.
  const std::vector<std::string> options = {
      "--gpu-architecture=sm_" + std::to_string(capability) + (capability >= 90 ? "a" : ""),
      "--include-path=" + include_path(), "--std=c++17"};
  int major = 0, minor = 0;
  compiler().version(&major, &minor);
  std::string key = "NVRTC " + std::to_string(major) + "." + std::to_string(minor) + "\n";
  for (const std::string& option : options) key += option + "\n";
  key += source;
  const CodeFiles files(code_folder());
  if (auto found = files.find(key)) return *found;
  std::string code = compiled(source, options);
  files.keep(key, code);
  return code;
}

fs::path CodeFiles::path_of(const std::string& key) const {
  char name[32];
  std::snprintf(name, sizeof name, "%016llx.code", static_cast<unsigned long long>(hash_of(key)));
  return folder_ / name;
}

std::optional<std::string> CodeFiles::find(const std::string& key) const {
  if (folder_.empty()) return {};
  const fs::path path = path_of(key);
  std::ifstream file(path, std::ios::binary);
  const std::string all((std::istreambuf_iterator<char>(file)), {});
  const size_t line = all.find('\n') + 1;  // 0 without one
  if (line == 0 || all.size() < line + key.size()) return {};
  const std::string_view code = std::string_view(all).substr(line + key.size());
  if (all.substr(0, line) != head_of(key, code) || all.compare(line, key.size(), key) != 0)
    return {};
  std::error_code ignored;
  fs::last_write_time(path, fs::file_time_type::clock::now(), ignored);
  return std::string(code);
}

void CodeFiles::keep(const std::string& key, const std::string& code) const {
  if (folder_.empty()) return;
  std::error_code failed;
  fs::create_directories(folder_, failed);
  const fs::path path = path_of(key);
  // Whole or not at all, whoever else writes the same.
  static std::atomic<int> drafts = 0;
  const fs::path draft =
      path.string() + "." + std::to_string(getpid()) + "." + std::to_string(drafts++);
  std::ofstream file(draft, std::ios::binary);
  file << head_of(key, code) << key << code;
  file.close();
  if (file) fs::rename(draft, path, failed);
  if (!file || failed) fs::remove(draft, failed);
  remove_oldest();
}

// Drafts too, whose writer was stopped.
void CodeFiles::remove_oldest() const {
  std::error_code failed;
  std::vector<std::pair<fs::file_time_type, fs::path>> files;
  for (fs::directory_iterator at(folder_, failed), end; !failed && at != end; at.increment(failed))
    if (at->path().filename().string().find(".code") != std::string::npos)
      files.emplace_back(at->last_write_time(failed), at->path());
  std::sort(files.begin(), files.end());
  for (size_t i = 0; i + kMost < files.size(); ++i) fs::remove(files[i].second, failed);
}

}  // namespace moefuse::cuda
