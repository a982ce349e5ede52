// A plain read: what no kernel that reads the same bytes can beat by much.
#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

uint32_t read(const void* data, int64_t bytes) {
  constexpr int kVectors = 4, kVectorBytes = 64;
  u32x16 sum[kVectors] = {};
  const char* at = (const char*)data;
  for (int64_t i = 0; i + kVectors * kVectorBytes <= bytes; i += kVectors * kVectorBytes)
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      sum[v()] ^= load<u32x16>(at + i + v() * kVectorBytes);
    });
  const u32x16 all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  uint32_t mixed = 0;
  for (int l = 0; l < kLanes; ++l) mixed ^= all[l];
  return mixed;
}

}  // namespace
}  // namespace moefuse::cpu
