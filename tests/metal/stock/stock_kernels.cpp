// Compiled once for each namespace of stock_kernels.h (STOCK_SPACE). The kernel text itself is not
// in this repository.
#include "stock_kernels.h"

#include "metal_stdlib"

namespace STOCK_SPACE {

// What the kernel text takes from MLX's utils.h and from its matrix kernels, which are only named.
template <typename U>
struct Limits {
  static constexpr U min = -std::numeric_limits<U>::infinity();
  static constexpr U finite_min = std::numeric_limits<U>::lowest();
};
template <bool C, typename A, typename B>
struct ConditionalType {
  using type = std::conditional_t<C, A, B>;
};
template <typename U, typename T>
U cast_to(T v) {
  return static_cast<U>(v);
}
template <typename T, typename U>
T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
template <typename IdxT = int64_t>
IdxT elem_to_loc(int64_t, const int*, const int64_t*, int ndim) {
  if (ndim == 0) return 0;
  throw emulator::Error("stock kernel: only one batch dimension is emulated");
}
inline ulong2 elem_to_loc_broadcast(uint, const int*, const int64_t*, const int64_t*, int) {
  throw emulator::Error("stock kernel: only one batch dimension is emulated");
}
inline ulong3 elem_to_loc_broadcast(uint, const int*, const int64_t*, const int64_t*,
                                    const int64_t*, int) {
  throw emulator::Error("stock kernel: only one batch dimension is emulated");
}
template <int DIMS, typename I, bool GENERAL>
struct LoopedElemToLoc {
  I offset = 0;
  explicit LoopedElemToLoc(int) {}
  void next(int n, const int*, const int64_t* strides) { offset += n * I(strides[0]); }
  I location() const { return offset; }
};
template <typename U>
struct Sum {
  static inline const U init = U(0.0f);
  U operator()(U a, U b) const { return a + b; }
  U simd_reduce(U v) const { return simd_sum(v); }
};
template <int BM>
bool schedule_row_tile(const int32_t*, int, int, uint, uint, int&, int&, short&);
template <typename... A>
void gemm_loop_aligned(A...);
template <bool, bool, bool, typename... A>
void gemm_loop_unaligned(A...);
template <typename... A>
void gemm_loop_finalize(A...);
namespace mlx::steel {
template <typename...>
struct Unused;
template <typename T, typename U, int... N>
struct BlockMMA;
template <typename T, int... N>
struct BlockLoader;
}  // namespace mlx::steel
constexpr int SOFTMAX_N_READS = 4;
constexpr uint8_t simd_size = 32;

#define threadgroup
#include "mlx/backend/metal/kernels/quantized.h"
#undef threadgroup
// Here the word only marks local arrays, which all threads of a group share.
#define threadgroup static
#include "mlx/backend/metal/kernels/reduction/reduce_col.h"
#include "mlx/backend/metal/kernels/sdpa_vector.h"
#include "mlx/backend/metal/kernels/softmax.h"
#undef threadgroup

uint3 group() {
  const emulator::Uint3 at = emulator::group_position();
  return {at.x, at.y, at.z};
}

template <typename T, int GROUP, int BITS>
void gather_qmv(const StockGather<T>& c) {
  const int dims = 1, shape[] = {c.x_rows, 1, c.cols}, stack[] = {c.stack};
  const int64_t x_strides[] = {c.cols, c.cols, 1}, index_stride[] = {1};
  const int64_t words[] = {int64_t{c.out_rows} * c.cols * BITS / 32};
  const int64_t groups[] = {int64_t{c.out_rows} * c.cols / GROUP};
  const int batch_shape[] = {c.batches};
  const bool fast = c.out_rows % 8 == 0 && c.cols % (32 / BITS * 64) == 0;
  auto kernel = fast ? affine_gather_qmv_fast<T, GROUP, BITS> : affine_gather_qmv<T, GROUP, BITS>;
  const emulator::Uint3 groups_of_threads{1, uint(c.out_rows + 7) / 8, uint(c.batches)};
  emulator::dispatch(groups_of_threads, 64, emulator::Order::forward, [&] {
    kernel(c.weight, c.scales, c.biases, c.x, c.rows_of_x, c.experts, c.out, c.cols, c.out_rows,
           dims, shape, x_strides, dims, stack, words, groups, groups, dims, batch_shape,
           index_stride, index_stride, group(), emulator::simdgroup(), emulator::lane());
  });
}

template <typename T>
void softmax(const T* in, T* out, int size) {
  const uint threads = (uint(size) + 127) / 128 * 32;
  emulator::dispatch({}, threads, emulator::Order::forward, [&] {
    softmax_single_row<T, float>(in, out, size, 0, emulator::thread_in_group(), emulator::lane(),
                                 emulator::simdgroup());
  });
}

// sum(-2) of a [rows, columns] array with rows <= 8, as MLX dispatches it.
template <typename T>
void sum_rows(const T* in, T* out, int rows, int columns) {
  const uint blocks = uint(columns + 3) / 4, across = std::min(blocks, 32u);
  const uint3 size = {across, uint(rows), 1};
  const int no_shape[] = {0}, shape[] = {rows};
  const int64_t stride = columns, no_strides[] = {0}, strides[] = {columns};
  const int dims = 1, none = 0;
  const size_t reduced = rows, one = 1;
  auto elements = in;
  emulator::dispatch(
      {(blocks + across - 1) / across, 1, 1}, across * rows, emulator::Order::forward, [&] {
        const uint t = emulator::thread_in_group();
        col_reduce_small<T, T, Sum<T>, int, 1>(elements, out, reduced, stride, no_shape, no_strides,
                                               none, shape, strides, dims, one, group(), {1, 1, 1},
                                               {t % across, t / across, 0}, size);
      });
}

template <typename T, int D>
void attention(const StockAttention<T>& c) {
  const size_t head = c.capacity * D, row = D;
  const uint3 grid = {uint(c.heads), 1, 1};
  const int none = 0;
  emulator::dispatch({uint(c.heads), 1, 1}, 1024, emulator::Order::forward, [&] {
    sdpa_vector<T, D>(c.queries, c.keys, c.values, c.out, c.per_kv_head, c.positions, head, row,
                      head, row, c.scale, nullptr, nullptr, none, none, none, nullptr, none,
                      group(), grid, emulator::simdgroup(), emulator::lane());
  });
}

#define STOCK_FOR(T)                                         \
  template void gather_qmv<T, 64, 4>(const StockGather<T>&); \
  template void gather_qmv<T, 64, 8>(const StockGather<T>&); \
  template void gather_qmv<T, 32, 4>(const StockGather<T>&); \
  template void softmax<T>(const T*, T*, int);               \
  template void sum_rows<T>(const T*, T*, int, int);         \
  template void attention<T, 128>(const StockAttention<T>&);
STOCK_FOR(float)
STOCK_FOR(bfloat16_t)
STOCK_FOR(float16_t)

}  // namespace STOCK_SPACE
