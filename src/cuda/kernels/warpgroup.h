// Hopper's products of a whole warpgroup, four warps, as CUDA's dialect: they take both factors
// from shared memory and go on in the background. Comes after tensor_dialect.h.
#pragma once

// Four 8 x 8 tiles of halves to shared memory, transposed: a lane has row lane / 4, columns 2 t and
// 2 t + 1 of each, and lane 8 i + r names where column r of tile i goes.
template <typename T>
FUNC void store_turned(T* p, const Words<4>& w) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   uint(__cvta_generic_to_shared(p))),
               "r"(w.w[0]), "r"(w.w[1]), "r"(w.w[2]), "r"(w.w[3])
               : "memory");
}

// Tiles have rows of 64 halves after each other, the first eight on 1,024 bytes; the 16 bytes of
// columns 8 c to 8 c + 7 of row r stand where those of columns 8 (c ^ r % 8) would.
// A sequence is begin_products(), some multiply_tiles(), wait_for_products(), with settle() of each
// sum before and after. What threads put into tiles needs tiles_written() and a barrier in front.
FUNC void tiles_written() {
#if MOEFUSE_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
FUNC void begin_products() {
#if MOEFUSE_HOPPER
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
FUNC void wait_for_products() {
#if MOEFUSE_HOPPER
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}
// Nothing that makes or reads a sum moves across.
template <int N>
FUNC void settle(Floats<N>& c) {
  UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c.v[i])::"memory");
}
template <typename T>
FUNC unsigned long long tile_descriptor(const T* p) {
  constexpr unsigned long long SWIZZLED = 1ull << 62, EIGHT_ROWS = 1024ull / 16 << 32;
  return SWIZZLED | EIGHT_ROWS | 1ull << 16 | (uint(__cvta_generic_to_shared(p)) & 0x3ffffu) >> 4;
}
template <typename T, int N>
struct TileProduct;
#define FOUR(i) "+f"(c.v[i]), "+f"(c.v[i + 1]), "+f"(c.v[i + 2]), "+f"(c.v[i + 3])
#define TILE_PRODUCT(type, name, columns, sums, a, b, one, turned, ...)                        \
  template <>                                                                                  \
  struct TileProduct<type, columns> {                                                          \
    template <bool TURNED>                                                                     \
    static FUNC void add(Floats<columns / 2>& c, unsigned long long x, unsigned long long y) { \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " one                                       \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name  \
                   " {" sums "}, " a ", " b ", p, 1, 1, " turned ", 0; }"                      \
                   : __VA_ARGS__                                                               \
                   : "l"(x), "l"(y), "r"(1), "n"(TURNED));                                     \
    }                                                                                          \
  };
#define TILE_PRODUCTS(type, name)                                                                 \
  TILE_PRODUCT(type, name, 8, "%0, %1, %2, %3", "%4", "%5", "%6", "%7", FOUR(0))                  \
  TILE_PRODUCT(type, name, 16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11",        \
               FOUR(0), FOUR(4))                                                                  \
  TILE_PRODUCT(type, name, 24, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11", "%12", "%13",  \
               "%14", "%15", FOUR(0), FOUR(4), FOUR(8))                                           \
  TILE_PRODUCT(type, name, 48,                                                                    \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
               "%18, %19, %20, %21, %22, %23",                                                    \
               "%24", "%25", "%26", "%27", FOUR(0), FOUR(4), FOUR(8), FOUR(12), FOUR(16),         \
               FOUR(20))
#if MOEFUSE_HOPPER
TILE_PRODUCTS(bfloat16_t, "bf16")
TILE_PRODUCTS(float16_t, "f16")
#endif
#undef FOUR
#undef TILE_PRODUCT
#undef TILE_PRODUCTS

// Adds 64 x 16 times 16 x N to c: of warp w of the warpgroup rows 16 w + g and 8 further, columns
// 8 j + 2 t and the next, for lane 4 g + t. a: rows of the first, or of its transpose where TURNED;
// b: columns of the second.
template <typename T, int N, bool TURNED>
FUNC void multiply_tiles(Floats<N / 2>& c, const T* a, const T* b) {
#if MOEFUSE_HOPPER
  TileProduct<T, N>::template add<TURNED>(c, tile_descriptor(a), tile_descriptor(b));
#endif
}
