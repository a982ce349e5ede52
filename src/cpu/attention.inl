// Attention of a few queries on rows of a cache, and the norm, for the decode step.
//
// Bounds, u = 2^-24: a fused dot of dim products |error| <= u (dim / 16 + 6) sum |q row|; a fused
// weighted sum of n rows <= u (n + 1) sum |weight row|; the norm <= u (n / 32 + 10) |out|.
#include "cpu/dialect.h"

namespace moefuse::cpu {
namespace {

constexpr int kBlockRows = 64;  // that stay near while all heads go over them
constexpr int kNearRows = 16;   // what is asked for lies so far ahead of heads that go alone
// Sums in flight, as many as have room in the registers, and the most of them for one head.
constexpr int kSumsAtOnce = kRegisters == 1 ? 16 : 4, kSumsOfHead = 4;
constexpr int sums_of_head(int heads) {
  const int room = kSumsAtOnce / heads;
  return room < kSumsOfHead ? room : kSumsOfHead;
}

template <Dtype kDtype>
struct Constant {};

// k ascending, product and sum rounded apart: the order of stock MLX's half matrix product on x86
// before its one cast. The lanes are sixteen rows, whose tile serves all heads.
void exact_dots(const RowsArgs& a, const float* q, int heads, float* out, int64_t out_stride) {
  for (int j = 0; j < a.rows; j += kLanes) {
    const int count = a.rows - j < kLanes ? a.rows - j : kLanes;
    for (int k = 0; k < a.dim; k += kLanes) {
      const int width = a.dim - k < kLanes ? a.dim - k : kLanes;
      float row[kLanes][kLanes] = {}, tile[kLanes][kLanes];
      for (int l = 0; l < count; ++l)
        store(row[l], load_floats(a.data, a.dtype, (j + l) * a.stride + k, width));
      for (int i = 0; i < width; ++i)
        store(tile[i], from_lanes<f32x16>([&](int l) { return row[l][i]; }));
      for (int h = 0; h < heads; ++h) {
        float* sums = out + h * out_stride;
        f32x16 sum = k ? load_floats(sums, Dtype::float32, j, count) : f32x16{};
        for (int i = 0; i < width; ++i)
          sum = sum + splat(q[int64_t(h) * a.dim + k + i]) * load<f32x16>(tile[i]);
        store_floats(sums, Dtype::float32, j, count, sum);
      }
    }
  }
}

// kHeads queries on kRows rows at once: enough sums in flight to hide the latency of one.
template <Dtype kDtype, int kHeads, int kRows>
inline void fused_dots_at(const RowsArgs& a, int row, const float* q, float* out,
                          int64_t out_stride) {
  constexpr int kSums = kRows * kHeads;
  f32x16 sum[kSums] = {};  // of head h and row r: h * kRows + r
  // Inlined by force: a call would keep the sums in memory.
  const auto add = [&](int k, int width) __attribute__((always_inline)) {
    f32x16 x[kRows];
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      x[r()] = load_floats(a.data, kDtype, (row + r()) * a.stride + k, width);
    });
    unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
      const f32x16 y = load_floats(q + h() * a.dim, Dtype::float32, k, width);
      unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        constexpr int i = h() * kRows + r();
        sum[i] = fused(x[r()], y, sum[i]);
      });
    });
  };
  int k = 0;
  for (; k + kLanes <= a.dim; k += kLanes) add(k, kLanes);
  if (k < a.dim) add(k, a.dim - k);
  if constexpr (kSums == kLanes) {
    sum_lanes16(sum);
    unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
      memcpy(out + h() * out_stride + row, (const float*)sum + h() * kRows, 4 * kRows);
    });
  } else {
    unrolled<kSums>([&](auto i) __attribute__((always_inline)) {
      out[i() / kRows * out_stride + row + i() % kRows] = sum_lanes(sum[i()]);
    });
  }
}

// The heads [h, h + kHeads) of `heads` on the rows [begin, end). Each head asks for its share of
// what comes after the block, heads that go alone for what comes soon.
template <Dtype kDtype, int kHeads>
void fused_dots(const RowsArgs& a, int begin, int end, const float* q, int h, int heads, float* out,
                int64_t out_stride) {
  constexpr int kRows = sums_of_head(kHeads), kBytes = itemsize(kDtype);
  const int64_t bytes = int64_t(kRows) * a.dim * kBytes;
  const int64_t from = bytes * h / heads, to = bytes * (h + kHeads) / heads;
  const int distance = heads > kHeads ? kBlockRows : kNearRows;
  const float* queries = q + int64_t(h) * a.dim;
  float* scores = out + h * out_stride;
  int row = begin;
  for (; row + kRows <= end; row += kRows) {
    const char* ahead = (const char*)a.data + (row + distance) * a.stride * kBytes;
    for (int64_t i = from; i < to; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    fused_dots_at<kDtype, kHeads, kRows>(a, row, queries, scores, out_stride);
  }
  for (; row < end; ++row) fused_dots_at<kDtype, kHeads, 1>(a, row, queries, scores, out_stride);
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
  if constexpr (kSumsAtOnce >= 8) each(Count<8>{});
  each(Count<4>{});
  each(Count<1>{});
}

// Calls f(begin, end) for each block of rows.
template <class F>
void with_blocks(int rows, F&& f) {
  for (int begin = 0; begin < rows; begin += kBlockRows)
    f(begin, rows - begin < kBlockRows ? rows : begin + kBlockRows);
}

void dots(bool exact, const RowsArgs& a, const float* q, int heads, float* out,
          int64_t out_stride) {
  if (exact) return exact_dots(a, q, heads, out, out_stride);
  with_dtype(a.dtype, [&]<Dtype kDtype>(Constant<kDtype>) {
    with_blocks(a.rows, [&](int begin, int end) {
      with_heads(heads, [&](int h, auto count) {
        fused_dots<kDtype, count()>(a, begin, end, q, h, heads, out, out_stride);
      });
    });
  });
}

// Adds the rows [begin, end) to kHeads sums over the columns [d, d + count), count at most kVectors
// * kLanes and exactly that if kWhole; row 0 starts the sums. Asks for the line at `ahead` with the
// first row, for the next line with the next row.
template <Dtype kDtype, bool kExact, int kHeads, int kVectors, bool kWhole>
inline void weighted_sum_columns(const RowsArgs& a, int begin, int end, const float* weights,
                                 int64_t weights_stride, int d, int count, const char* ahead,
                                 float* out) {
  f32x16 sum[kHeads][kVectors] = {};
  const auto width = [&](int b) __attribute__((always_inline)) {
    const int n = count - b * kLanes;
    return kWhole || n > kLanes ? kLanes : n < 0 ? 0 : n;
  };
  unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
    unrolled<kVectors>([&](auto b) __attribute__((always_inline)) {
      if (begin > 0)
        sum[h()][b()] =
            load_floats(out, Dtype::float32, h() * a.dim + d + b() * kLanes, width(b()));
    });
  });
  for (int j = begin; j < end; ++j, ahead += 64) {
    __builtin_prefetch(ahead, 0, 2);
    f32x16 x[kVectors];
    unrolled<kVectors>([&](auto b) __attribute__((always_inline)) {
      x[b()] = load_floats(a.data, kDtype, j * a.stride + d + b() * kLanes, width(b()));
    });
    unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
      const f32x16 weight = splat(weights[h() * weights_stride + j]);
      unrolled<kVectors>([&](auto b) __attribute__((always_inline)) {
        f32x16& s = sum[h()][b()];
        s = kExact ? s + weight * x[b()] : fused(weight, x[b()], s);
      });
    });
  }
  unrolled<kHeads>([&](auto h) __attribute__((always_inline)) {
    unrolled<kVectors>([&](auto b) __attribute__((always_inline)) {
      store_floats(out, Dtype::float32, h() * a.dim + d + b() * kLanes, width(b()), sum[h()][b()]);
    });
  });
}

template <Dtype kDtype, bool kExact, int kHeads>
void weighted_sums(const RowsArgs& a, int begin, int end, const float* weights,
                   int64_t weights_stride, float* out) {
  constexpr int kVectors = sums_of_head(kHeads), kColumns = kVectors * kLanes;
  const char* ahead = (const char*)a.data + end * a.stride * itemsize(kDtype);
  int d = 0;
  for (; d + kColumns <= a.dim; d += kColumns, ahead += (end - begin) * 64)
    weighted_sum_columns<kDtype, kExact, kHeads, kVectors, true>(
        a, begin, end, weights, weights_stride, d, kColumns, ahead, out);
  if (d < a.dim)
    weighted_sum_columns<kDtype, kExact, kHeads, kVectors, false>(
        a, begin, end, weights, weights_stride, d, a.dim - d, ahead, out);
}

void weighted_sum(bool exact, const RowsArgs& a, const float* weights, int heads,
                  int64_t weights_stride, float* out) {
  with_dtype(a.dtype, [&]<Dtype kDtype>(Constant<kDtype>) {
    with_blocks(a.rows, [&](int begin, int end) {
      if (exact) {
        for (int h = 0; h < heads; ++h)
          weighted_sums<kDtype, true, 1>(a, begin, end, weights + h * weights_stride,
                                         weights_stride, out + h * a.dim);
        return;
      }
      with_heads(heads, [&](int h, auto count) {
        weighted_sums<kDtype, false, count()>(a, begin, end, weights + h * weights_stride,
                                              weights_stride, out + h * a.dim);
      });
    });
  });
}

float exponentials(float* scores, int n, float* top) {
  const int whole = n / kLanes * kLanes, rest = n - whole;
  f32x16 most = splat(-__builtin_inff());
  for (int i = 0; i < whole; i += kLanes) {
    const f32x16 v = load<f32x16>(scores + i);
    most = larger(v, most);
  }
  if (rest) {
    float last[kLanes];
    store(last, splat(-__builtin_inff()));
    memcpy(last, scores + whole, 4 * rest);
    const f32x16 v = load<f32x16>(last);
    most = larger(v, most);
  }
  float largest = most[0];
  for (int l = 1; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  f32x16 sum{};
  for (int i = 0; i < whole; i += kLanes) {
    const f32x16 e = exp_lanes(load<f32x16>(scores + i) - splat(largest));
    store(scores + i, e);
    sum = sum + e;
  }
  if (rest) {
    const f32x16 v = load_floats(scores, Dtype::float32, whole, rest);
    store_floats(scores, Dtype::float32, whole, rest, exp_lanes(v - splat(largest)));
    sum = sum + load_floats(scores, Dtype::float32, whole, rest);
  }
  *top = largest;
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
    store_floats(out, Dtype::float32, i, count, y);
  }
}

}  // namespace
}  // namespace moefuse::cpu
