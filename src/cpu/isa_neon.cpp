// 64-bit Arm with the dot product and half-precision extensions (Apple M1 and later, Graviton 2).
#include <arm_neon.h>

#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace moefuse::cpu {
namespace {

inline float float16_to_float(uint16_t v) {
  __fp16 half;
  std::memcpy(&half, &v, sizeof half);
  return half;
}

inline uint16_t float_to_float16(float v) {
  if (v != v) return 0x7d00;
  auto half = static_cast<__fp16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline f32x16 round_float16(f32x16 v) {
  float32x4_t part[4];
  std::memcpy(part, &v, sizeof part);
  for (float32x4_t& p : part) p = vcvt_f32_f16(vcvt_f16_f32(p));
  std::memcpy(&v, part, sizeof part);
  return v;
}

#include "cpu/exact.inl"

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon", exact_qmv};

}  // namespace moefuse::cpu
