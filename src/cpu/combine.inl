// The weighted sum of k experts' outputs, sixteen columns at a time, i ascending from zero.
#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

MOEFUSE_INLINE f32x16 round_to(Dtype dtype, f32x16 v) {
  if (dtype == Dtype::bfloat16) return round_bfloat16(v);
  return dtype == Dtype::float16 ? widen_half(narrow_half(v)) : v;
}

template <CombineSteps kSteps>
void combine_columns(const CombineArgs& a, int begin, int end) {
  for (int d = begin; d < end; d += kLanes) {
    const int n = end - d < kLanes ? end - d : kLanes;
    f32x16 sum = {};
    for (int i = 0; i < a.k; ++i) {
      const f32x16 y = load_floats(a.y[i], a.y_dtype, d, n);
      const f32x16 weight = splat(a.weights[i]);
      if constexpr (kSteps == CombineSteps::fp32) {
        sum = fused(y, weight, sum);
      } else if constexpr (kSteps == CombineSteps::fp32_no_fma) {
        sum = sum + y * weight;
      } else {
        sum = sum + round_to(a.y_dtype, y * weight);
      }
    }
    store_floats(a.out, a.out_dtype, d, n, sum);
  }
}

void combine(const CombineArgs& a, int begin, int end) {
  switch (a.steps) {
    case CombineSteps::dtype:
      return combine_columns<CombineSteps::dtype>(a, begin, end);
    case CombineSteps::fp32:
      return combine_columns<CombineSteps::fp32>(a, begin, end);
    default:
      return combine_columns<CombineSteps::fp32_no_fma>(a, begin, end);
  }
}

}  // namespace
}  // namespace moefuse::cpu
