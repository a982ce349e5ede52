// The weighted sum over the experts of a row.
#pragma once

// COMBINE 0: product and sum rounded to T; 1: product and sum rounded to fp32; 2: fused in fp32.
template <typename T, int COMBINE>
FUNC float combine_step(float sum, float y, float weight) {
  if (COMBINE == 0) return rounded<T>(add_rn(sum, rounded<T>(mul_rn(y, weight))));
  if (COMBINE == 1) return add_rn(sum, mul_rn(y, weight));
  return fma_rn(y, weight, sum);
}
