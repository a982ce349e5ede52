// RMS norm as its own op would do it: fp32 inside, x * scale and the product with the weight each
// rounded to T.
#pragma once

FUNC float rms_scale(float sum_of_squares, uint count, float eps) {
  return div_rn(1.0f, sqrt_rn(add_rn(div_rn(sum_of_squares, float(count)), eps)));
}

template <typename T>
FUNC T norm_element(float x, float scale, float weight) {
  return T(mul_rn(weight, rounded<T>(mul_rn(x, scale))));
}

// Norm of x[0, count) into threadgroup memory `out`; `partial` holds one float a simdgroup. Every
// thread of the group calls it, and it ends with a barrier.
template <typename T, int THREADS, typename X, typename W, typename P, typename O>
FUNC void rms_norm(X x, W weight, float eps, uint count, P partial, O out, uint thread_at) {
  float sum = 0.0f;
  for (uint k = thread_at; k < count; k += THREADS) {
    float v = float(x[k]);
    sum = fma_rn(v, v, sum);
  }
  sum = lane_sum(sum);
  if (thread_at % 32u == 0u) partial[thread_at / 32u] = sum;
  group_barrier();
  sum = 0.0f;
  for (uint i = 0; i < THREADS / 32u; ++i) sum = add_rn(sum, partial[i]);
  float scale = rms_scale(sum, count, eps);
  for (uint k = thread_at; k < count; k += THREADS) {
    out[k] = norm_element<T>(float(x[k]), scale, float(weight[k]));
  }
  group_barrier();
}
