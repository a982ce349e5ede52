// What every arithmetic warp carries through the step, and the rings through which SMs exchange
// vectors. A ring slot written at clock n is emptied again while slot n + 2 is written: by then
// every SM has read it, because writing n + 2 needed everybody's results of n + 1.
#pragma once
#include "device.cuh"
#include "quantized_gemv.cuh"
#include "step.h"

#ifndef MOEFUSE_TIMELINE
#define MOEFUSE_TIMELINE 0  // 1: cycles of every stage; the marks cost a few percent
#endif

namespace moefuse::cuda {

// Fixed part of shared memory. The first barriers complete once a layer, the last ones once a use.
struct Control {
  uint64_t full_qkv, full_dense, full_down, full_item[kMaxItems];
  uint64_t full_kv[kKvSlots], full_lm[kWarps];
  uint64_t best[kWarps];
  Layer layer[3];  // this one's pointers and the next two's: an address must never wait for DRAM
  int expert[8];
  float score[8], weight[8], ssq[2][kWarps], combine[kWarps][32];
  Range qkv, output, router, items;  // this block's tiles, rows and tile pairs
};

struct Warp {
  const StepParams& p;
  Control& s;
  uint8_t* shared;
  int warp, lane, thread, block;
  int clock, sampled, position;  // as in State
  int layers, kv_uses, lm_uses;  // of their barriers, since the launch
  int flip;                      // which half of `red` the next stage writes
  long long since;

  MOEFUSE_DEVICE uint32_t* slice() const {
    return reinterpret_cast<uint32_t*>(shared + p.layout.slices) + warp * (kSlice / 2);
  }
  MOEFUSE_DEVICE float* red() const {
    return reinterpret_cast<float*>(shared + p.layout.red) + (flip & 1) * p.layout.red_floats;
  }
  MOEFUSE_DEVICE Layer& layer(int ahead) const { return s.layer[(layers + ahead) % 3]; }
  MOEFUSE_DEVICE int hidden_clock() const { return clock + sampled; }
  MOEFUSE_DEVICE unsigned code(int stage) const { return (layers << 8 | stage) + 1; }
};

MOEFUSE_DEVICE void wait_barrier(uint64_t* b, unsigned parity, unsigned* fault, unsigned code) {
  unsigned count = 0;
  while (!barrier_done(b, parity & 1)) spin(count, fault, code);
}
MOEFUSE_DEVICE void wait(const Warp& c, uint64_t* b, int uses, Stage stage) {
  wait_barrier(b, uses, c.p.fault, c.code(stage));
}
MOEFUSE_DEVICE bool ready(uint32_t v) {
  return v != kEmpty;
}
MOEFUSE_DEVICE bool ready(uint2 v) {
  return ready(v.x) && ready(v.y);
}
MOEFUSE_DEVICE bool ready(uint4 v) {
  return ready(v.x) && ready(v.y) && ready(v.z) && ready(v.w);
}
MOEFUSE_DEVICE void load_shared(uint32_t& v, const uint32_t* p) {
  v = load_shared_word(p);
}
MOEFUSE_DEVICE void load_shared(uint2& v, const uint32_t* p) {
  v = load_shared_pair(p);
}
MOEFUSE_DEVICE void load_shared(uint4& v, const uint32_t* p) {
  v = load_shared_quad(p);
}

// N vectors a lane, `stride` words apart, all asked for before the first is looked at. While
// something is missing one lane asks for it: a whole warp asking again would fill L2 with
// questions.
template <class T, int N>
MOEFUSE_DEVICE void poll(const Warp& c, const uint32_t* p, int stride, Stage stage, T (&v)[N]) {
  unsigned since = 0;
#pragma unroll 1
  for (;;) {
    int missing = -1;
#pragma unroll
    for (int i = 0; i < N; ++i) load_shared(v[i], p + i * stride);
#pragma unroll
    for (int i = 0; i < N; ++i) missing = ready(v[i]) ? missing : i;
    const uint32_t lanes = warp_ballot(missing >= 0);
    if (lanes == 0) return;
    if (c.lane == first_bit(lanes)) {
      T gate;
      do {
        spin(since, c.p.fault, c.code(stage));
        load_shared(gate, p + missing * stride);
      } while (!ready(gate));
    }
    warp_sync();
  }
}

// Slot `clock` of a ring whose slots hold `replicas` copies of `words` words; readers pick a copy.
MOEFUSE_DEVICE uint32_t* slot(uint32_t* ring, int clock, int words, int replicas, int replica) {
  return ring + ((clock & (kRing - 1)) * replicas + replica) * static_cast<size_t>(words);
}
MOEFUSE_DEVICE void publish(uint32_t* ring, int clock, int words, int replicas, int at,
                            uint32_t v) {
#pragma unroll 1
  for (int r = 0; r < replicas; ++r)
    store_shared_word(slot(ring, clock, words, replicas, r) + at, v);
#pragma unroll 1
  for (int r = 0; r < replicas; ++r) {
    store_shared_word(slot(ring, clock + 2, words, replicas, r) + at, kEmpty);
  }
}
MOEFUSE_DEVICE const uint32_t* read_slot(const Warp& c, uint32_t* ring, int clock, int words) {
  return slot(ring, clock, words, kReplicas, c.block & (kReplicas - 1));
}

// Cycles since the last mark, for the first block's first warp only: a stage's input, its weights,
// its products, its end.
MOEFUSE_DEVICE void mark(Warp& c, Stage stage, Part part) {
  if (!MOEFUSE_TIMELINE) return;
  if (c.p.timeline == nullptr || c.block != 0 || c.thread != 0) return;
  const long long now = cycles();
  c.p.timeline[stage * kParts + part] += now - c.since;
  c.since = now;
}
MOEFUSE_DEVICE void stage_done(Warp& c, Stage stage) {
  mark(c, stage, kEnd);
  ++c.flip;
  forget(c.lane), forget(c.warp), forget(c.thread), forget(c.block);
}

// A slice of a published bf16 vector, 8 values a lane.
MOEFUSE_DEVICE void poll_slice(const Warp& c, const uint32_t* vector, int slice, Stage stage,
                               float (&v)[8]) {
  uint4 word[1];
  poll(c, vector + slice * (kSlice / 2) + 4 * c.lane, 0, stage, word);
  unpack_bf16(word[0], v);
}

// v = bf16(v * gain), and the slice's sum of squares before it. The norm's factor multiplies the
// products instead of the vector, so that a slice need not wait for the others.
MOEFUSE_DEVICE float apply_gain(float (&v)[8], uint4 gain) {
  float g[8], ssq = 0.f;
  unpack_bf16(gain, g);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ssq += v[i] * v[i];
    v[i] = round_bf16(v[i] * g[i]);
  }
  return warp_sum(ssq);
}
template <int kSlices>
MOEFUSE_DEVICE float norm_factor(const float* ssq, int columns, float eps) {
  return reciprocal_sqrt(sum_slices<kSlices>(ssq, 1) / columns + eps);
}
MOEFUSE_DEVICE uint4 load_gain(const uint16_t* gain, int slice, int lane) {
  return reinterpret_cast<const uint4*>(gain)[slice * (kSlice / 8) + lane];
}

}  // namespace moefuse::cuda
