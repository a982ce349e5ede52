// MLX's own Metal kernels, read from the headers of the installed wheel and run in the emulator.
// Twice: stock_apart rounds each multiply and add, stock_fused contracts them wherever the C++
// compiler can. Apple's compiler may do either (the wheel's metallib has them as llvm.fmuladd).
#pragma once

#include <cstddef>
#include <cstdint>

// One expert's matrix a row of x: out[b] = W[experts[b]] x[b]. `fast` picks the kernel as MLX does.
template <typename T>
struct StockGather {
  const uint32_t* weight;
  const T *scales, *biases, *x;
  const uint32_t *rows_of_x, *experts;
  T* out;
  int batches, out_rows, cols, x_rows, stack;
};

// One query a head against `keys` positions of KV heads, rows D long.
template <typename T>
struct StockAttention {
  const T *queries, *keys, *values;
  T* out;
  int heads, per_kv_head, positions;
  size_t capacity;
  float scale;
};

#define MOEFUSE_STOCK(space)                                 \
  namespace space {                                          \
  template <typename T, int GROUP, int BITS>                 \
  void gather_qmv(const StockGather<T>& call);               \
  template <typename T>                                      \
  void softmax(const T* in, T* out, int size);               \
  template <typename T>                                      \
  void sum_rows(const T* in, T* out, int rows, int columns); \
  template <typename T, int D>                               \
  void attention(const StockAttention<T>& call);             \
  }
MOEFUSE_STOCK(stock_apart)
MOEFUSE_STOCK(stock_fused)
#undef MOEFUSE_STOCK
