// Attention of a few queries on rows of a cache, and the norm, for the decode step.
//
// Bounds, u = 2^-24: a fused dot of dim products |error| <= u (dim / 32 + 6) sum |q row|; a fused
// weighted sum of n rows <= u (n + 1) sum |weight row|; the norm <= u (n / 32 + 10) |out|.
#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

// k ascending, product and sum rounded apart: the order of stock MLX's half matrix product on x86
// before its one cast. The lanes are sixteen rows.
void exact_dots(const RowsArgs& a, const float* q, float* out) {
  for (int j = 0; j < a.rows; j += kLanes) {
    const int count = a.rows - j < kLanes ? a.rows - j : kLanes;
    f32x16 sum{};
    for (int k = 0; k < a.dim; k += kLanes) {
      const int width = a.dim - k < kLanes ? a.dim - k : kLanes;
      float tile[kLanes][kLanes] = {};
      for (int l = 0; l < count; ++l) {
        const f32x16 row = load_floats(a.data, a.dtype, (j + l) * a.stride + k, width);
        for (int i = 0; i < kLanes; ++i) tile[i][l] = row[i];
      }
      for (int i = 0; i < width; ++i) sum = sum + splat(q[k + i]) * load<f32x16>(tile[i]);
    }
    memcpy(out + j, &sum, 4 * count);
  }
}

void fused_dots(const RowsArgs& a, const float* q, float* out) {
  for (int j = 0; j < a.rows; ++j) {
    f32x16 even{}, odd{};
    for (int k = 0; k < a.dim; k += kLanes) {
      const int width = a.dim - k < kLanes ? a.dim - k : kLanes;
      const f32x16 x = load_floats(a.data, a.dtype, j * a.stride + k, width);
      const f32x16 y = load_floats(q, Dtype::float32, k, width);
      if (k & kLanes)
        odd = fused(x, y, odd);
      else
        even = fused(x, y, even);
    }
    out[j] = sum_lanes(even + odd);
  }
}

void dots(bool exact, const RowsArgs& a, const float* q, int heads, float* out,
          int64_t out_stride) {
  for (int h = 0; h < heads; ++h) {
    if (exact)
      exact_dots(a, q + int64_t(h) * a.dim, out + h * out_stride);
    else
      fused_dots(a, q + int64_t(h) * a.dim, out + h * out_stride);
  }
}

template <bool kExact>
void weighted_sum_of(const RowsArgs& a, const float* weights, float* out) {
  constexpr int kVectors = 4;  // vectors of columns that share one pass over the rows
  for (int d = 0; d < a.dim; d += kVectors * kLanes) {
    f32x16 sum[kVectors] = {};
    for (int j = 0; j < a.rows; ++j) {
      const f32x16 weight = splat(weights[j]);
      for (int b = 0; b < kVectors; ++b) {
        const int left = a.dim - d - b * kLanes;
        if (left <= 0) break;
        const int64_t at = j * a.stride + d + b * kLanes;
        const f32x16 x = load_floats(a.data, a.dtype, at, left < kLanes ? left : kLanes);
        sum[b] = kExact ? sum[b] + weight * x : fused(weight, x, sum[b]);
      }
    }
    for (int b = 0; b < kVectors && d + b * kLanes < a.dim; ++b) {
      const int left = a.dim - d - b * kLanes;
      memcpy(out + d + b * kLanes, &sum[b], 4 * (left < kLanes ? left : kLanes));
    }
  }
}

void weighted_sum(bool exact, const RowsArgs& a, const float* weights, int heads,
                  int64_t weights_stride, float* out) {
  for (int h = 0; h < heads; ++h) {
    const float* w = weights + h * weights_stride;
    float* y = out + int64_t(h) * a.dim;
    exact ? weighted_sum_of<true>(a, w, y) : weighted_sum_of<false>(a, w, y);
  }
}

float exponentials(float* scores, int n, float* top) {
  const f32x16 low = splat(-__builtin_inff());
  f32x16 most = low;
  for (int i = 0; i < n; i += kLanes) {
    f32x16 v = low;
    memcpy(&v, scores + i, 4 * (n - i < kLanes ? n - i : kLanes));
    most = v > most ? v : most;
  }
  *top = most[0];
  for (int l = 1; l < kLanes; ++l) *top = most[l] > *top ? most[l] : *top;
  f32x16 sum{};
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    const f32x16 e = exp_lanes(load_floats(scores, Dtype::float32, i, count) - splat(*top));
    memcpy(scores + i, &e, 4 * count);
    sum = sum + load_floats(scores, Dtype::float32, i, count);
  }
  return sum_lanes(sum);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  f32x16 even{}, odd{};
  for (int i = 0; i < n; i += kLanes) {
    const f32x16 v = load_floats(x, Dtype::float32, i, n - i < kLanes ? n - i : kLanes);
    if (i & kLanes)
      odd = fused(v, v, odd);
    else
      even = fused(v, v, even);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum_lanes(even + odd) / float(n) + eps);
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    const f32x16 v = load_floats(x, Dtype::float32, i, count) * scale;
    const f32x16 y = v * load_floats(weight, Dtype::float32, i, count);
    memcpy(out + i, &y, 4 * count);
  }
}

}  // namespace
}  // namespace moefuse::cpu
