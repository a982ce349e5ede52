// Attention of a few queries on rows of a cache, and the norm, for the decode step.
//
// Bounds, u = 2^-24: a fused dot of dim products |error| <= u (dim / 16 + 6) sum |q row|; a fused
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

// The sums of four vectors' lanes, each in sum_lanes' order.
inline void sum_lanes4(const f32x16 (&v)[4], float* out, int64_t stride) {
  const auto halves = [](f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                   31);
  };
  const f32x16 a = halves(v[0], v[1]), b = halves(v[2], v[3]);
  const f32x16 quarters =
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  for (int h = 0; h < 4; ++h)
    out[h * stride] =
        (quarters[4 * h] + quarters[4 * h + 2]) + (quarters[4 * h + 1] + quarters[4 * h + 3]);
}

// kHeads queries in one pass over the rows.
template <int kHeads>
void fused_dots(const RowsArgs& a, const float* q, float* out, int64_t out_stride) {
  for (int j = 0; j < a.rows; ++j) {
    f32x16 sum[kHeads] = {};
    for (int k = 0; k < a.dim; k += kLanes) {
      const int width = a.dim - k < kLanes ? a.dim - k : kLanes;
      const f32x16 x = load_floats(a.data, a.dtype, j * a.stride + k, width);
      for (int h = 0; h < kHeads; ++h)
        sum[h] = fused(x, load_floats(q + h * a.dim, Dtype::float32, k, width), sum[h]);
    }
    if constexpr (kHeads == 4) {
      sum_lanes4(sum, out + j, out_stride);
    } else {
      for (int h = 0; h < kHeads; ++h) out[h * out_stride + j] = sum_lanes(sum[h]);
    }
  }
}

void dots(bool exact, const RowsArgs& a, const float* q, int heads, float* out,
          int64_t out_stride) {
  int h = 0;
  if (exact)
    for (; h < heads; ++h) exact_dots(a, q + int64_t(h) * a.dim, out + h * out_stride);
  for (; h + 4 <= heads; h += 4) fused_dots<4>(a, q + h * a.dim, out + h * out_stride, out_stride);
  for (; h < heads; ++h) fused_dots<1>(a, q + h * a.dim, out + h * out_stride, out_stride);
}

// kHeads sums over sixteen times kVectors columns from `d` on, in one pass over the rows.
template <bool kExact, int kHeads>
void weighted_sum_columns(const RowsArgs& a, const float* weights, int64_t weights_stride, int d,
                          float* out) {
  constexpr int kVectors = 4;
  f32x16 sum[kHeads][kVectors] = {};
  const int left = a.dim - d;
  for (int j = 0; j < a.rows; ++j) {
    f32x16 x[kVectors];
    for (int b = 0; b < kVectors; ++b) {
      const int n = left - b * kLanes;
      x[b] = load_floats(a.data, a.dtype, j * a.stride + d + b * kLanes,
                         n < 0        ? 0
                         : n < kLanes ? n
                                      : kLanes);
    }
    for (int h = 0; h < kHeads; ++h) {
      const f32x16 weight = splat(weights[h * weights_stride + j]);
      for (int b = 0; b < kVectors; ++b)
        sum[h][b] = kExact ? sum[h][b] + weight * x[b] : fused(weight, x[b], sum[h][b]);
    }
  }
  const int count = left < kVectors * kLanes ? left : kVectors * kLanes;
  for (int h = 0; h < kHeads; ++h) memcpy(out + h * a.dim + d, sum[h], 4 * count);
}

template <bool kExact, int kHeads>
void weighted_sums(const RowsArgs& a, const float* weights, int64_t weights_stride, float* out) {
  for (int d = 0; d < a.dim; d += 4 * kLanes)
    weighted_sum_columns<kExact, kHeads>(a, weights, weights_stride, d, out);
}

void weighted_sum(bool exact, const RowsArgs& a, const float* weights, int heads,
                  int64_t weights_stride, float* out) {
  int h = 0;
  const auto pass = [&](auto sums) {
    sums(a, weights + h * weights_stride, weights_stride, out + h * a.dim);
  };
  if (exact)
    for (; h < heads; ++h) pass(weighted_sums<true, 1>);
  for (; h + 4 <= heads; h += 4) pass(weighted_sums<false, 4>);
  for (; h < heads; ++h) pass(weighted_sums<false, 1>);
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
