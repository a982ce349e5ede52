// The files of a checkpoint as bytes from outside: what they say of themselves is checked before
// MLX, or anybody, believes it.
#pragma once

#include <cstdint>
#include <istream>
#include <set>
#include <string>

namespace moefuse {

// Checks the header of a safetensors file of file_bytes bytes: every tensor of a known dtype, its
// extent within the file, its own and as long as its shape says. Returns the bytes after the
// header. Throws std::invalid_argument naming the file and the tensor.
uint64_t check_safetensors(const std::string& name, std::istream& file, uint64_t file_bytes);

// The files that the text of a model.safetensors.index.json names, all of one folder.
std::set<std::string> index_files(const std::string& name, const std::string& text);

}  // namespace moefuse
