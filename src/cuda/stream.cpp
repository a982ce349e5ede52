#include "cuda/stream.h"

#include <stdexcept>

// Of MLX's CUDA wheel for Linux; other wheels do not have them.
#ifdef __linux__
namespace mlx::core::cu {
class CommandEncoder {
 public:
  __attribute__((weak)) void commit();
};
__attribute__((weak)) CommandEncoder& get_command_encoder(Stream s);
}  // namespace mlx::core::cu
#endif

namespace moefuse::cuda {

namespace {

// mlx/backend/cuda/device.h: a CommandEncoder begins with a reference to its Device and the handle
// of its stream.
struct EncoderHead {
  void* device;
  Stream stream;
};

}  // namespace

bool reachable() {
#ifdef __linux__
  return &mx::cu::get_command_encoder != nullptr;
#else
  return false;
#endif
}

Stream flushed(mx::Stream s) {
#ifdef __linux__
  auto& encoder = mx::cu::get_command_encoder(s);
  encoder.commit();
  return reinterpret_cast<EncoderHead*>(&encoder)->stream;
#else
  throw std::runtime_error("[cuda step] expected Linux");
#endif
}

// mlx/backend/cuda/allocator.h: a buffer begins with its address.
void* address(const mx::array& a) {
  auto buffer = a.buffer();
  return *static_cast<char**>(buffer.ptr()) + a.offset();
}

}  // namespace moefuse::cuda
