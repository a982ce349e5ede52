// CUDA source to machine code, by the NVRTC that MLX's CUDA wheel brings, and what was compiled
// before, in files that the next process finds.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace moefuse::cuda {

// Machine code of the source's kernels for a device of this compute capability times 10 (90: an
// H100), from code_folder() where it is there. Throws std::runtime_error: no NVRTC, or what it says
// of the source.
std::string machine_code(const std::string& source, int capability);

// MOEFUSE_CUDA_CACHE, else moefuse/cuda in XDG_CACHE_HOME or ~/.cache. Empty, for keeping nothing,
// where that variable is empty or no home is known.
std::filesystem::path code_folder();

// Files of a folder, each with a key and what was kept under it. A folder that cannot be written, a
// file that is damaged or somebody else's: as if it was not there. Processes may share a folder.
class CodeFiles {
 public:
  static constexpr int kMost = 64;  // the least recently used beyond are removed

  explicit CodeFiles(std::filesystem::path folder) : folder_(std::move(folder)) {}
  std::optional<std::string> find(const std::string& key) const;
  void keep(const std::string& key, const std::string& code) const;

 private:
  std::filesystem::path path_of(const std::string& key) const;
  void remove_oldest() const;
  std::filesystem::path folder_;
};

}  // namespace moefuse::cuda
