// What the texts of this folder need of CUDA beyond dialect_cuda.h: wide loads, tensor cores, early
// starts, clusters. Comes after lanes.h.
#pragma once

#if __CUDA_ARCH__ >= 900
#define MOEFUSE_HOPPER 1
#else
#define MOEFUSE_HOPPER 0
#endif

#define groups_x gridDim.x
#define ROLLED _Pragma("unroll 1")

// The next kernel's blocks may come onto the device, up to their own wait_for_inputs().
FUNC void let_next_start() {
#if MOEFUSE_HOPPER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Ends when the kernels in front have and their results are to be seen.
FUNC void wait_for_inputs() {
#if MOEFUSE_HOPPER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a warp's lanes wrote to shared memory before, all of them see behind it.
FUNC void warp_barrier() {
  __syncwarp();
}

template <int N>
struct Integers {
  int v[N];
};

// An address that is made here, to which others are added as constants: compilers would rather make
// each of them from its index.
template <typename T>
FUNC const T* settled(const T* p) {
  asm("" : "+l"(p));
  return p;
}

// One 16-bit constant, asked for where it stands.
template <typename T>
FUNC T load_one(const T* p, uint at) {
  unsigned short bits;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(p + at));
  return *reinterpret_cast<T*>(&bits);
}

FUNC Words<4> no_words() {
  Words<4> zero = {{0u, 0u, 0u, 0u}};
  return zero;
}
// 16 bytes that nobody reads again soon.
template <typename T>
FUNC Words<4> load_stream(const T* p, uint at) {
  Words<4> w;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.w[0]), "=r"(w.w[1]), "=r"(w.w[2]), "=r"(w.w[3])
               : "l"(p + at));
  return w;
}

// 16 bytes that an earlier kernel may have written while this one was waiting. Through L1: blocks
// beside each other ask for the same rows, and L2 hands a line out to one reader after the other.
FUNC Words<4> load_cached(const void* p) {
  Words<4> w;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.w[0]), "=r"(w.w[1]), "=r"(w.w[2]), "=r"(w.w[3])
               : "l"(p)
               : "memory");
  return w;
}

// The kernel's one array whose size the launch gives.
#define DYNAMIC_SHARED_ARRAY(type, name, size)                     \
  extern __shared__ __align__(1024) unsigned char dynamic_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_bytes)
template <typename T>
FUNC float* as_floats(T* p) {
  return reinterpret_cast<float*>(p);
}

// 16 bytes to shared memory.
template <typename T>
FUNC void store_zeros(T* to) {
  *reinterpret_cast<Words<4>*>(to) = {{0u, 0u, 0u, 0u}};
}
FUNC void store_four(float* to, const Floats<4>& v) {
  *reinterpret_cast<float4*>(to) = {v.v[0], v.v[1], v.v[2], v.v[3]};
}
// 16 bytes to it, in the background: wait_for_copies<N>() ends when all of the thread's own have
// but those of the last N commits.
template <typename T>
FUNC void copy_async(T* to, const T* from) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint(__cvta_generic_to_shared(to))),
      "l"(from)
      : "memory");
}
FUNC void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
FUNC void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// N consecutive values of T, aligned as wide as one load of a part of them may be.
template <int N, typename T>
FUNC Floats<N> load_values(const T* p) {
  constexpr int WIDTH = (N & -N) * int(sizeof(T));
  struct alignas(WIDTH < 16 ? WIDTH : 16) Aligned {
    T v[N];
  };
  Aligned all = *reinterpret_cast<const Aligned*>(p);
  Floats<N> f;
  UNROLL for (int i = 0; i < N; ++i) f.v[i] = float(all.v[i]);
  return f;
}

template <typename T>
FUNC Floats<8> load_fresh(const T* p, uint at) {
  struct alignas(16) Eight {
    T v[8];
  };
  Words<4> w = load_cached(p + at);
  Eight e = *reinterpret_cast<Eight*>(&w);
  Floats<8> f;
  UNROLL for (int i = 0; i < 8; ++i) f.v[i] = float(e.v[i]);
  return f;
}
FUNC Floats<8> load_fresh(const float* p, uint at) {
  Floats<8> f;
  UNROLL for (int h = 0; h < 2; ++h) {
    Words<4> w = load_cached(p + at + 4 * h);
    UNROLL for (int i = 0; i < 4; ++i) f.v[4 * h + i] = as_float(w.w[i]);
  }
  return f;
}

template <typename T>
FUNC Words<4> load_shared(const T* p, uint at) {
  return *reinterpret_cast<const Words<4>*>(p + at);
}

FUNC uint lane_max(uint v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, v);
#else
  for (uint m = 16; m > 0; m >>= 1) {
    uint other = shuffle_xor(v, m);
    v = other > v ? other : v;
  }
  return v;
#endif
}
FUNC uint byte_permute(uint a, uint b, uint selector) {
  return __byte_perm(a, b, selector);
}
// Within 2 ulp, in the range that steps of a grid have.
FUNC float div_fast(float a, float b) {
  return __fdividef(a, b);
}
// 1 / sqrt(x) within 2 ulp.
FUNC float rsqrt_fast(float x) {
  return rsqrtf(x);
}
// 2^x within 2 ulp.
FUNC float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 x 32 unsigned times 32 x 8 signed bytes, plus c.
FUNC Integers<4> multiply_bytes(Integers<4> c, uint a0, uint a1, uint a2, uint a3, uint b0,
                                uint b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c.v[0]), "+r"(c.v[1]), "+r"(c.v[2]), "+r"(c.v[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  return c;
}

template <typename T>
struct Halves;
#define HALVES(type, name)                                                                   \
  template <>                                                                                \
  struct Halves<type> {                                                                      \
    static FUNC Floats<4> multiply(Floats<4> c, uint a0, uint a1, uint a2, uint a3, uint b0, \
                                   uint b1) {                                                \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                             \
          ".f32 {%0, %1, %2, %3}, "                                                          \
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                    \
          : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])                           \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                           \
      return c;                                                                              \
    }                                                                                        \
  };
HALVES(bfloat16_t, "bf16")
HALVES(float16_t, "f16")
#undef HALVES

// 16 x 16 times 16 x 8 of T, plus c.
template <typename T>
FUNC Floats<4> multiply_halves(Floats<4> c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  return Halves<T>::multiply(c, a0, a1, a2, a3, b0, b1);
}
// Two numbers as T, the first in the low half.
template <typename T>
FUNC uint two_halves(float a, float b) {
  T pair[2] = {T(a), T(b)};
  return *reinterpret_cast<uint*>(pair);
}
// An 8 x 8 tile of halves, transposed: lane 4 g + t has columns 2 t and 2 t + 1 of row g.
FUNC uint transposed(uint halves) {
  uint t;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(t) : "r"(halves));
  return t;
}

// The blocks of a cluster meet where all have arrived; what they wrote before is not made visible:
// that costs a wait for every store of theirs. Values go by send_part instead.
FUNC void cluster_arrive() {
#if MOEFUSE_HOPPER
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
FUNC void cluster_wait() {
#if MOEFUSE_HOPPER
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// In shared memory: counts the bytes that have come from the cluster's blocks.
using Arrivals = unsigned long long;
// By one thread, before its block arrives.
FUNC void expect_parts(Arrivals* arrivals, uint bytes) {
#if MOEFUSE_HOPPER
  uint at = uint(__cvta_generic_to_shared(arrivals));
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}
// N = 2 or 4 floats at p, aligned to all of them, in the shared memory of the cluster's block
// `rank`, whose arrivals count them.
template <int N>
FUNC void send_part(float* p, Arrivals* arrivals, uint rank, Floats<N> v) {
#if MOEFUSE_HOPPER
  uint there, count;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(uint(__cvta_generic_to_shared(p))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(count)
      : "r"(uint(__cvta_generic_to_shared(arrivals))), "r"(rank));
  if (N == 2) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
            there),
        "f"(v.v[0]), "f"(v.v[1]), "r"(count)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(there),
        "f"(v.v[0]), "f"(v.v[1]), "f"(v.v[N - 2]), "f"(v.v[N - 1]), "r"(count)
        : "memory");
  }
#endif
}
// Ends when all that was expected has come.
FUNC void wait_for_parts(Arrivals* arrivals) {
#if MOEFUSE_HOPPER
  uint at = uint(__cvta_generic_to_shared(arrivals)), done = 0u;
  while (done == 0u) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(at)
        : "memory");
  }
#endif
}
