// A checkpoint's files as arbitrary bytes. Whatever they are, the answer is a std::invalid_argument
// in the house's form or a value that keeps its promises; anything else is a finding.
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "model/safetensors.h"
#include "moefuse/model.h"

namespace {

namespace mx = mlx::core;

void demand(bool truth) {
  if (!truth) __builtin_trap();
}

// MLX's reader on bytes in memory. Nothing is evaluated, so only the header is ever read.
class Memory : public mx::io::Reader {
 public:
  explicit Memory(const std::string& bytes) : bytes_(bytes) {}
  bool is_open() const override { return true; }
  bool good() const override { return true; }
  size_t tell() override { return at_; }
  void seek(int64_t offset, std::ios_base::seekdir way) override {
    at_ = (way == std::ios_base::beg   ? 0
           : way == std::ios_base::end ? bytes_.size()
                                       : at_) +
          offset;
  }
  void read(char* data, size_t n) override {
    read(data, n, at_);
    at_ += n;
  }
  void read(char* data, size_t n, size_t offset) override {
    demand(offset <= bytes_.size() && n <= bytes_.size() - offset);
    std::memcpy(data, bytes_.data() + offset, n);
  }
  std::string label() const override { return "memory"; }

 private:
  const std::string& bytes_;
  size_t at_ = 0;
};

void config(const std::string& bytes) {
  const moefuse::ModelConfig c = moefuse::parse_config(bytes);
  demand(c.sparse.size() == size_t(c.num_hidden_layers) && c.num_hidden_layers > 0);
  demand(c.hidden_size > 0 && c.vocab_size > 0 && c.num_attention_heads > 0);
  demand(c.num_experts >= 0 && c.rms_norm_eps > 0 && c.rope_theta > 0);
}

void index(const std::string& bytes) {
  for (const std::string& file : moefuse::index_files("index", bytes))
    demand(!file.empty() && file.find('/') == std::string::npos && file != "..");
}

// What passes the check is taken by MLX, and its tensors are no more than the file.
void safetensors(const std::string& bytes) {
  std::istringstream file(bytes);
  const uint64_t data_bytes = moefuse::check_safetensors("file", file, bytes.size());
  uint64_t sum = 0;
  for (const auto& [name, array] :
       mx::load_safetensors(std::make_shared<Memory>(bytes), mx::Device::cpu).first)
    sum += array.nbytes();
  demand(sum <= data_bytes && data_bytes <= bytes.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (!size) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    data[0] == 'c' ? config(bytes) : data[0] == 'i' ? index(bytes) : safetensors(bytes);
  } catch (const std::invalid_argument& error) {
    const std::string said = error.what();
    demand(said.rfind("[config] ", 0) == 0 || said.rfind("[load] ", 0) == 0);
    demand(said.find(": expected ") != std::string::npos);
    demand(said.find(", got ") != std::string::npos);
  }
  return 0;
}
