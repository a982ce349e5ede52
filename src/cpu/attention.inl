// Attention of a few queries on rows of a cache, and the norm, for the decode step.
//
// Bounds, u = 2^-24: a fused dot of dim products |error| <= u (dim / 16 + 6) sum |q row|; a fused
// weighted sum of n rows <= u (n + 1) sum |weight row|; the norm <= u (n / 32 + 10) |out|.
#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

template <Dtype kDtype>
struct Constant {};
template <int kCount>
struct Count {
  constexpr int operator()() const { return kCount; }
};

// f(Count<0>) to f(Count<kCount - 1>). Sums that a loop indexes, or whose address anybody takes,
// are kept in memory and stored in every turn: here each index is a constant from the start.
template <int kCount, class F>
inline __attribute__((always_inline)) void unrolled(F&& f) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(f);
    f(Count<kCount - 1>{});
  }
}

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
inline void sum_lanes4(f32x16 v0, f32x16 v1, f32x16 v2, f32x16 v3, float* out, int64_t stride) {
  const auto halves = [](f32x16 a, f32x16 b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30,
                                   31);
  };
  const f32x16 a = halves(v0, v1), b = halves(v2, v3);
  const f32x16 quarters =
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  for (int h = 0; h < 4; ++h)
    out[h * stride] =
        (quarters[4 * h] + quarters[4 * h + 2]) + (quarters[4 * h + 1] + quarters[4 * h + 3]);
}

// kHeads queries on kRows rows at once: enough sums in flight to hide the latency of one.
template <Dtype kDtype, int kHeads, int kRows>
inline void fused_dots_at(const RowsArgs& a, int row, const float* q, float* out,
                          int64_t out_stride) {
  f32x16 sum[kRows][kHeads] = {};
  // Inlined by force: a call would keep the sums in memory.
  const auto add = [&](int k, int width) __attribute__((always_inline)) {
    f32x16 x[kRows];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      x[r()] = load_floats(a.data, kDtype, (row + r()) * a.stride + k, width);
    });
    unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
      const f32x16 y = load_floats(q + h() * a.dim, Dtype::float32, k, width);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        sum[r()][h()] = fused(x[r()], y, sum[r()][h()]);
      });
    });
  };
  int k = 0;
  for (; k + kLanes <= a.dim; k += kLanes) add(k, kLanes);
  if (k < a.dim) add(k, a.dim - k);
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    float* to = out + row + r();
    unrolled<kHeads / 4>([&](auto i) __attribute__((always_inline)) {
      constexpr int h = 4 * i();
      const auto& v = sum[r()];
      sum_lanes4(v[h], v[h + 1], v[h + 2], v[h + 3], to + h * out_stride, out_stride);
    });
    unrolled<kHeads % 4>([&](auto i) __attribute__((always_inline)) {
      constexpr int h = kHeads / 4 * 4 + i();
      to[h * out_stride] = sum_lanes(sum[r()][h]);
    });
  });
}

template <Dtype kDtype, int kHeads>
void fused_dots(const RowsArgs& a, const float* q, float* out, int64_t out_stride) {
  constexpr int kRows = kHeads > 4 ? 2 : 4, kBytes = kDtype == Dtype::float32 ? 4 : 2;
  constexpr int kAhead = 4096;  // bytes
  int row = 0;
  for (; row + kRows <= a.rows; row += kRows) {
    const char* ahead = (const char*)a.data + (row * a.stride) * int64_t(kBytes) + kAhead;
    for (int i = 0; i < kRows * a.dim * kBytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    fused_dots_at<kDtype, kHeads, kRows>(a, row, q, out, out_stride);
  }
  for (; row < a.rows; ++row) fused_dots_at<kDtype, kHeads, 1>(a, row, q, out, out_stride);
}

// Calls f with the dtype as a constant.
template <class F>
void with_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::bfloat16) return f(Constant<Dtype::bfloat16>{});
  if (dtype == Dtype::float16) return f(Constant<Dtype::float16>{});
  f(Constant<Dtype::float32>{});
}

// Calls f(h, a constant number of heads) over all heads: as many at once as have their sums in
// registers, because a row that is widened to float32 should serve them all.
template <class F>
void with_heads(int heads, F&& f) {
  int h = 0;
  const auto each = [&](auto count) {
    for (; h + count() <= heads; h += count()) f(h, count);
  };
#if defined(__AVX512F__)
  each(Count<10>{});
  each(Count<8>{});
#endif
  each(Count<4>{});
  each(Count<1>{});
}

void dots(bool exact, const RowsArgs& a, const float* q, int heads, float* out,
          int64_t out_stride) {
  if (exact) {
    for (int h = 0; h < heads; ++h) exact_dots(a, q + int64_t(h) * a.dim, out + h * out_stride);
    return;
  }
  with_dtype(a.dtype, [&]<Dtype kDtype>(Constant<kDtype>) {
    with_heads(heads, [&](int h, auto count) {
      fused_dots<kDtype, count()>(a, q + h * a.dim, out + h * out_stride, out_stride);
    });
  });
}

// kHeads sums over the columns [d, d + count), in one pass over the rows.
template <Dtype kDtype, bool kExact, int kHeads, int kVectors>
inline void weighted_sum_columns(const RowsArgs& a, const float* weights, int64_t weights_stride,
                                 int d, int count, float* out) {
  f32x16 sum[kHeads][kVectors] = {};
  for (int j = 0; j < a.rows; ++j) {
    f32x16 x[kVectors];
    for (int b = 0; b < kVectors; ++b) {
      const int n = count - b * kLanes;
      x[b] = load_floats(a.data, kDtype, j * a.stride + d + b * kLanes,
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
  unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
    unrolled<kVectors>([&](auto b) __attribute__((always_inline)) {
      const int n = count - b() * kLanes;
      if (n > 0)
        store_floats(out, Dtype::float32, h() * a.dim + d + b() * kLanes, n < kLanes ? n : kLanes,
                     sum[h()][b()]);
    });
  });
}

template <Dtype kDtype, bool kExact, int kHeads>
void weighted_sums(const RowsArgs& a, const float* weights, int64_t weights_stride, float* out) {
  constexpr int kVectors = kHeads > 4 ? 2 : 4, kColumns = kVectors * kLanes;
  const auto columns = [&](int d, int count) __attribute__((always_inline)) {
    weighted_sum_columns<kDtype, kExact, kHeads, kVectors>(a, weights, weights_stride, d, count,
                                                           out);
  };
  int d = 0;
  for (; d + kColumns <= a.dim; d += kColumns) columns(d, kColumns);
  if (d < a.dim) columns(d, a.dim - d);
}

void weighted_sum(bool exact, const RowsArgs& a, const float* weights, int heads,
                  int64_t weights_stride, float* out) {
  with_dtype(a.dtype, [&]<Dtype kDtype>(Constant<kDtype>) {
    if (exact) {
      for (int h = 0; h < heads; ++h)
        weighted_sums<kDtype, true, 1>(a, weights + h * weights_stride, weights_stride,
                                       out + h * a.dim);
      return;
    }
    with_heads(heads, [&](int h, auto count) {
      weighted_sums<kDtype, false, count()>(a, weights + h * weights_stride, weights_stride,
                                            out + h * a.dim);
    });
  });
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
