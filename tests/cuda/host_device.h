// The device instructions of src/cuda/device.cuh on the host, so that the persistent kernel's own
// text runs without a GPU: every thread of every block is a fiber, and a collective or a spin gives
// way to the others. Arithmetic follows the device's formats; tensor-core sums are exact here.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define MOEFUSE_DEVICE inline

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

namespace moefuse::cuda {

constexpr unsigned kLoadArrivals = 1;

namespace host {

struct Collective {  // one per warp: values in, everyone reads, everyone leaves
  uint64_t in[32], out[32];
  unsigned arrived = 0, generation = 0;
};
struct Block {
  std::vector<Collective> warps;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* shared = nullptr;
  int waiting = 0;
  unsigned generation = 0;
};
struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  int thread = 0, block = 0;
  bool done = false;
};
inline Fiber* self = nullptr;
inline ucontext_t scheduler;
inline std::vector<Block>* blocks = nullptr;
inline std::function<void(int, int)>* body = nullptr;
inline unsigned fault = 0;
inline uint64_t progress = 0;  // anything that can end a wait

inline void yield() {
  swapcontext(&self->context, &scheduler);
}
inline Block& block() {
  return (*blocks)[self->block];
}
inline Collective& warp() {
  return block().warps[self->thread / 32];
}
inline void enter() {
  (*body)(self->thread, self->block);
  self->done = true;
  yield();
}

// `combine` sees the 32 inputs and fills the outputs; the lane gets its own.
template <class F>
uint64_t collective(uint64_t value, F combine) {
  Collective& w = warp();
  const unsigned generation = w.generation;
  w.in[self->thread % 32] = value;
  if (++w.arrived == 32) {
    combine(w.in, w.out);
    w.arrived = 0, ++w.generation, ++progress;
  }
  while (w.generation == generation) yield();
  return w.out[self->thread % 32];
}

// Runs body(thread, block) for every thread; throws if nothing moves any more.
inline void launch(int count, int threads, size_t shared_bytes, std::function<void(int, int)> f) {
  std::vector<Block> all(count);
  for (Block& b : all) {
    b.warps.resize(threads / 32);
    b.memory = std::make_unique<uint8_t[]>(shared_bytes + 128);
    std::memset(b.memory.get(), 0xff, shared_bytes + 128);  // unwritten bytes are NaN
    b.shared = b.memory.get() + (128 - reinterpret_cast<uintptr_t>(b.memory.get()) % 128);
  }
  blocks = &all, body = &f, fault = 0;
  constexpr size_t kStack = 32 << 10;
  std::vector<Fiber> fibers(static_cast<size_t>(count) * threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& x = fibers[i];
    x.stack = std::make_unique<char[]>(kStack);
    x.thread = static_cast<int>(i % threads), x.block = static_cast<int>(i / threads);
    getcontext(&x.context);
    x.context.uc_stack.ss_sp = x.stack.get(), x.context.uc_stack.ss_size = kStack;
    makecontext(&x.context, enter, 0);
  }
  size_t left = fibers.size();
  int idle = 0;
  while (left) {
    const uint64_t before = progress;
    for (Fiber& x : fibers) {
      if (x.done) continue;
      self = &x;
      swapcontext(&scheduler, &x.context);
      if (x.done) --left, ++progress;
    }
    idle = progress == before ? idle + 1 : 0;
    if (fault || idle > 100) {
      throw std::runtime_error("[emulator] no thread can go on, fault code " +
                               std::to_string(fault));
    }
  }
}
}  // namespace host

inline uint8_t* shared_base() {
  return host::block().shared;
}

inline float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float bf16_low(uint32_t u) {
  return as_float(u << 16);
}
inline float bf16_high(uint32_t u) {
  return as_float(u & 0xffff0000u);
}
inline uint32_t bf16_bits(float f) {
  const uint32_t u = as_bits(f);
  if (f != f) return 0x7fff;
  return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return bf16_bits(low) | bf16_bits(high) << 16;
}
inline uint16_t f16_bits(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}
inline float f16_value(uint32_t u) {
  const uint16_t low = static_cast<uint16_t>(u);
  _Float16 h;
  std::memcpy(&h, &low, 2);
  return static_cast<float>(h);
}
inline uint32_t pack_f16(float low, float high) {
  return f16_bits(low) | static_cast<uint32_t>(f16_bits(high)) << 16;
}
inline uint32_t select_or(uint32_t u, uint32_t mask, uint32_t bits) {
  return (u & mask) | bits;
}
inline float fast_exp(float x) {
  return std::exp(x);
}
inline float reciprocal_sqrt(float x) {
  return 1.f / std::sqrt(x);
}

inline uint64_t shuffle_bits(uint64_t v, int from) {
  const uint64_t packed = host::collective(
      v, [](const uint64_t* in, uint64_t* out) { std::memcpy(out, in, 32 * sizeof(uint64_t)); });
  (void)packed;
  // the outputs stay valid until the warp's next collective, which this lane has not entered
  return host::warp().out[from & 31];
}
inline float shuffle(float v, int lane) {
  return as_float(static_cast<uint32_t>(shuffle_bits(as_bits(v), lane)));
}
inline uint32_t shuffle(uint32_t v, int lane) {
  return static_cast<uint32_t>(shuffle_bits(v, lane));
}
inline int lane_id() {
  return host::self->thread % 32;
}
inline float shuffle_xor(float v, int mask) {
  return shuffle(v, lane_id() ^ mask);
}
inline uint64_t shuffle_xor(uint64_t v, int mask) {
  return shuffle_bits(v, lane_id() ^ mask);
}
template <class F>
uint32_t warp_reduce(uint32_t v, F f) {
  return static_cast<uint32_t>(host::collective(v, [&](const uint64_t* in, uint64_t* out) {
    uint64_t r = in[0];
    for (int i = 1; i < 32; ++i) r = f(r, in[i]);
    for (int i = 0; i < 32; ++i) out[i] = r;
  }));
}
inline uint32_t warp_max(uint32_t v) {
  return warp_reduce(v, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
inline uint32_t warp_add(uint32_t v) {
  return warp_reduce(v, [](uint64_t a, uint64_t b) { return a + b; });
}
inline int first_bit(uint32_t v) {
  return __builtin_ctz(v);
}
inline uint32_t warp_ballot(bool v) {
  return static_cast<uint32_t>(host::collective(v, [](const uint64_t* in, uint64_t* out) {
    uint64_t r = 0;
    for (int i = 0; i < 32; ++i) r |= in[i] << i;
    for (int i = 0; i < 32; ++i) out[i] = r;
  }));
}
inline void warp_sync() {
  warp_add(0);
}
inline void block_sync() {
  host::Block& b = host::block();
  const int threads = 32 * static_cast<int>(b.warps.size());
  const unsigned generation = b.generation;
  if (++b.waiting == threads) b.waiting = 0, ++b.generation, ++host::progress;
  while (b.generation == generation) host::yield();
}

// One lane's registers of an mma, gathered from the warp: A [16][16], B [16][8], C [16][8].
struct MmaLane {
  float c[4];
  uint32_t a[4], b0, b1;
};
template <class Value>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
  MmaLane lane{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, b0, b1};
  host::collective(reinterpret_cast<uint64_t>(&lane), [&](const uint64_t* in, uint64_t*) {
    auto at = [&](int l) { return reinterpret_cast<MmaLane*>(in[l]); };
    auto half = [&](uint32_t u, int i) { return value(i ? u >> 16 : u & 0xffff); };
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 8; ++col) {
        float& out = at(row % 8 * 4 + col / 2)->c[row / 8 * 2 + col % 2];
        double sum = out;
        for (int k = 0; k < 16; ++k) {
          const MmaLane* x = at(row % 8 * 4 + k % 8 / 2);
          const MmaLane* y = at(col * 4 + k % 8 / 2);
          sum +=
              double{half(x->a[row / 8 + k / 8 * 2], k % 2)} * half(k < 8 ? y->b0 : y->b1, k % 2);
        }
        out = static_cast<float>(sum);
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = lane.c[i];
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint32_t u) { return f16_value(u); });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint32_t u) { return bf16_low(u); });
}

inline uint32_t load_shared_word(const uint32_t* p) {
  return *p;
}
inline uint2 load_shared_pair(const uint32_t* p) {
  return {p[0], p[1]};
}
inline uint4 load_shared_quad(const uint32_t* p) {
  return {p[0], p[1], p[2], p[3]};
}
inline void store_shared_word(uint32_t* p, uint32_t v) {
  *p = v, ++host::progress;
}
inline uint64_t load_shared_key(const uint64_t* p) {
  return *p;
}
inline void store_shared_key(uint64_t* p, uint64_t v) {
  *p = v, ++host::progress;
}
inline long long cycles() {
  return 0;
}
inline void forget(int&) {}

inline void spin(unsigned&, unsigned*, unsigned code) {
  host::yield();
  if (false) host::fault = code;
}

// mbarrier: low 16 bits pending arrivals, next 16 the full count, then a bit of phase; the copies
// here are immediate, so announced bytes are already there.
struct HostBarrier {
  uint16_t pending, count;
  uint32_t phase;
};
inline HostBarrier& host_barrier(uint64_t* b) {
  return *reinterpret_cast<HostBarrier*>(b);
}
inline void barrier_init(uint64_t* b, unsigned arrivals) {
  host_barrier(b) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void barrier_arrive(uint64_t* b) {
  HostBarrier& h = host_barrier(b);
  ++host::progress;
  if (--h.pending == 0) h.pending = h.count, ++h.phase;
}
inline bool barrier_done(uint64_t* b, unsigned parity) {
  return (host_barrier(b).phase & 1) != parity;
}
inline void announce(uint64_t*, unsigned) {}
inline void copy_in(void* to, const void* from, unsigned bytes, uint64_t*) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 ||
      reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "copy of %u bytes to %p from %p is not in 16-byte units\n", bytes, to,
                 from);
    std::abort();
  }
  std::memcpy(to, from, bytes);
}
inline void finish(uint64_t* b) {  // after every lane's copies
  warp_sync();
  if (lane_id() == 0) barrier_arrive(b);
}
inline void release_to_copies() {}
inline void acquire_for_copies() {}
inline void publish_fence() {}

}  // namespace moefuse::cuda
