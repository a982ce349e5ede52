// The build that every machine of the architecture can run, and the reference for the others.
#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace moefuse::cpu {
namespace {

// _Float16 conversions round to nearest even, in hardware or in the compiler's library.
inline float float16_to_float(uint16_t v) {
  _Float16 half;
  std::memcpy(&half, &v, sizeof half);
  return static_cast<float>(half);
}

inline uint16_t float_to_float16(float v) {
  if (v != v) return 0x7d00;  // MLX's NaN
  auto half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline f32x16 round_float16(f32x16 v) {
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(static_cast<_Float16>(v[i]));
  return v;
}

#include "cpu/exact.inl"

}  // namespace

extern const Kernels kPlain;
const Kernels kPlain = {"plain", exact_qmv};

}  // namespace moefuse::cpu
