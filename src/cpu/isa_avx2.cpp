// AVX2 with FMA and F16C (Intel from Haswell, AMD from Zen).
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace moefuse::cpu {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

inline float float16_to_float(uint16_t v) { return _cvtsh_ss(v); }
inline uint16_t float_to_float16(float v) { return v != v ? 0x7d00 : _cvtss_sh(v, kNearest); }
inline f32x16 round_float16(f32x16 v) {
  __m256 half[2];
  std::memcpy(half, &v, sizeof half);
  for (__m256& h : half) h = _mm256_cvtph_ps(_mm256_cvtps_ph(h, kNearest));
  std::memcpy(&v, half, sizeof half);
  return v;
}

#include "cpu/exact.inl"

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", exact_qmv};

}  // namespace moefuse::cpu
