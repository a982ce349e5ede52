// The few device instructions that the decode step uses, under names. tests/cuda/host_device.h
// gives the same names on the host, so that the step's own text can be run and checked without a
// GPU.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef MOEFUSE_CUDA_HOST
#include "host_device.h"
#else
#define MOEFUSE_DEVICE __device__ __forceinline__
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MOEFUSE_BULK_COPY 1  // one thread asks the copy engine for kilobytes
#else
#define MOEFUSE_BULK_COPY 0  // sm_80: every copying lane moves 16 bytes at a time
#endif

namespace moefuse::cuda {

MOEFUSE_DEVICE uint8_t* shared_base() {
  extern __shared__ __align__(128) uint8_t step_shared[];
  return step_shared;
}
MOEFUSE_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- conversions; the first argument lands in the low half
MOEFUSE_DEVICE float bf16_low(uint32_t u) {
  return __uint_as_float(u << 16);
}
MOEFUSE_DEVICE float bf16_high(uint32_t u) {
  return __uint_as_float(u & 0xffff0000u);
}
MOEFUSE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MOEFUSE_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MOEFUSE_DEVICE float as_float(uint32_t u) {
  return __uint_as_float(u);
}
MOEFUSE_DEVICE uint32_t as_bits(float f) {
  return __float_as_uint(f);
}
// (u & mask) | bits in one instruction
MOEFUSE_DEVICE uint32_t select_or(uint32_t u, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(u), "r"(mask), "r"(bits));
  return r;
}
MOEFUSE_DEVICE float fast_exp(float x) {
  return __expf(x);
}
MOEFUSE_DEVICE float reciprocal_sqrt(float x) {
  return rsqrtf(x);
}

// ---- warp
MOEFUSE_DEVICE float shuffle(float v, int lane) {
  return __shfl_sync(~0u, v, lane);
}
MOEFUSE_DEVICE uint32_t shuffle(uint32_t v, int lane) {
  return __shfl_sync(~0u, v, lane);
}
MOEFUSE_DEVICE float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(~0u, v, mask);
}
MOEFUSE_DEVICE uint64_t shuffle_xor(uint64_t v, int mask) {
  return __shfl_xor_sync(~0u, static_cast<unsigned long long>(v), mask);
}
MOEFUSE_DEVICE uint32_t warp_max(uint32_t v) {
  return __reduce_max_sync(~0u, v);
}
MOEFUSE_DEVICE uint32_t warp_add(uint32_t v) {
  return __reduce_add_sync(~0u, v);
}
MOEFUSE_DEVICE int first_bit(uint32_t v) {
  return __ffs(static_cast<int>(v)) - 1;
}
MOEFUSE_DEVICE uint32_t warp_ballot(bool v) {
  return __ballot_sync(~0u, v);
}
MOEFUSE_DEVICE void warp_sync() {
  __syncwarp();
}
MOEFUSE_DEVICE void block_sync() {
  __syncthreads();
}

// ---- tensor cores: c += A[16 x 16] B[16 x 8]
MOEFUSE_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MOEFUSE_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- memory seen by every SM (L2)
MOEFUSE_DEVICE uint32_t load_shared_word(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MOEFUSE_DEVICE uint2 load_shared_pair(const uint32_t* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p)
               : "memory");
  return v;
}
MOEFUSE_DEVICE uint4 load_shared_quad(const uint32_t* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
MOEFUSE_DEVICE void store_shared_word(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MOEFUSE_DEVICE uint64_t load_shared_key(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
MOEFUSE_DEVICE void store_shared_key(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
MOEFUSE_DEVICE long long cycles() {
  return clock64();
}
// The compiler may no longer assume it knows v: addresses made from it are not kept over stages.
MOEFUSE_DEVICE void forget(int& v) {
  asm volatile("" : "+r"(v));
}

// ---- waits end: a wait of seconds is a fault, never a hang. `since` starts at 0; the code names
// the stage.
constexpr unsigned kSpinCycles = 3u << 30;
static __device__ __noinline__ void stop(unsigned* fault, unsigned code) {
  *reinterpret_cast<volatile unsigned*>(fault) = code;
  __threadfence_system();
  __trap();
}
MOEFUSE_DEVICE void spin(unsigned& since, unsigned* fault, unsigned code) {
  unsigned now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  now |= 1u;
  if (since == 0) since = now;
  if (now - since >= kSpinCycles) stop(fault, code);
}

// ---- mbarriers: `arrivals` arrivals, plus the bytes announced, complete a phase
MOEFUSE_DEVICE void barrier_init(uint64_t* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
               : "memory");
}
MOEFUSE_DEVICE bool barrier_done(uint64_t* b, unsigned parity) {
  unsigned done;
#if MOEFUSE_BULK_COPY
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
#endif
  return done;
}

// ---- weights into shared memory: announce(), then copies by any lanes of one warp, then finish()
#if MOEFUSE_BULK_COPY
constexpr unsigned kLoadArrivals = 1;
MOEFUSE_DEVICE void announce(uint64_t* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
}
MOEFUSE_DEVICE void copy_in(void* to, const void* from, unsigned bytes, uint64_t* b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(b))
      : "memory");
}
MOEFUSE_DEVICE void finish(uint64_t*) {}
// shared memory used by ordinary loads and stores is about to be written by the copy engine
MOEFUSE_DEVICE void release_to_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// rows of the KV cache stored by other SMs are about to be read by the copy engine
MOEFUSE_DEVICE void acquire_for_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
#else
constexpr unsigned kLoadArrivals = 32;
MOEFUSE_DEVICE void announce(uint64_t*, unsigned) {}
MOEFUSE_DEVICE void copy_in(void* to, const void* from, unsigned bytes, uint64_t*) {
  for (unsigned i = 0; i < bytes; i += 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                 "l"(static_cast<const char*>(from) + i)
                 : "memory");
  }
}
MOEFUSE_DEVICE void finish(uint64_t* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b))
               : "memory");
}
MOEFUSE_DEVICE void release_to_copies() {}
MOEFUSE_DEVICE void acquire_for_copies() {}
#endif
MOEFUSE_DEVICE void publish_fence() {
  __threadfence();
}

}  // namespace moefuse::cuda
#endif

namespace moefuse::cuda {

MOEFUSE_DEVICE float round_bf16(float x) {
  return bf16_low(pack_bf16(x, 0.f));
}
MOEFUSE_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) v += shuffle_xor(v, m);
  return v;
}
MOEFUSE_DEVICE float warp_maximum(float v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    const float other = shuffle_xor(v, m);
    v = other > v ? other : v;
  }
  return v;
}
// sum over the four lanes that share a row of an mma tile
MOEFUSE_DEVICE float quad_sum(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}
// order-preserving map of floats to unsigned; NaN sorts by its sign, so selection is always total
MOEFUSE_DEVICE uint32_t sortable(float f) {
  const uint32_t u = as_bits(f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
MOEFUSE_DEVICE void unpack_bf16(uint4 u, float (&v)[8]) {
  v[0] = bf16_low(u.x), v[1] = bf16_high(u.x), v[2] = bf16_low(u.y), v[3] = bf16_high(u.y);
  v[4] = bf16_low(u.z), v[5] = bf16_high(u.z), v[6] = bf16_low(u.w), v[7] = bf16_high(u.w);
}

}  // namespace moefuse::cuda
