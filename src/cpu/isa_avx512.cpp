// AVX-512 with VNNI (Intel from Ice Lake, AMD from Zen 4).
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/lanes.h"

namespace moefuse::cpu {
namespace {

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

inline float float16_to_float(uint16_t v) { return _cvtsh_ss(v); }
inline uint16_t float_to_float16(float v) { return v != v ? 0x7d00 : _cvtss_sh(v, kNearest); }
inline f32x16 round_float16(f32x16 v) {
  return (f32x16)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, kNearest));
}

#include "cpu/exact.inl"

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", exact_qmv};

}  // namespace moefuse::cpu
