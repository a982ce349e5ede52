// Matrix-vector products of affine 4-bit rows in shared memory with a bf16 vector, on tensor cores.
//
// A unit is 8 rows x 256 columns. The vector is scaled by a power of two into fp16 (bf16 has eight
// significant bits, fp16 eleven: nothing is lost within 2^29 of the slice's largest value). A
// nibble becomes the fp16 number 1024 + q or 1024 + 16 q by one and-or, without a shift for half of
// them; the offsets leave through the accumulator's first value, and x is divided by 16 where q is
// not. Each lane of an mma quad keeps its own 32-column chunk apart (B is block diagonal), because
// a group's scale applies to its own sum only.
#pragma once
#include "device.cuh"
#include "step.h"

namespace moefuse::cuda {

struct Fragment {
  uint32_t b[16];                    // this lane's share of the block-diagonal B
  float sum[2], offset[2], unscale;  // of its two chunks: sum of x, what the fp16 offsets add
};

// The block-diagonal B from xs: [4][8 chunks] of 16 bytes; only two lanes of eight hold columns.
MOEFUSE_DEVICE void load_columns(Fragment& f, const uint32_t* xs, int lane) {
  const int g = lane >> 2, t = lane & 3, chunk = 4 * (t >> 1) + 2 * (g & 1) + (t & 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 u = make_uint4(0, 0, 0, 0);
    if ((g >> 1) == t) u = reinterpret_cast<const uint4*>(xs)[8 * i + chunk];
    f.b[4 * i] = u.x, f.b[4 * i + 1] = u.y, f.b[4 * i + 2] = u.z, f.b[4 * i + 3] = u.w;
  }
}

// Lane l of a warp brings columns 8 l .. 8 l + 7 of its slice. xs: 512 bytes of this warp.
MOEFUSE_DEVICE void make_fragment(Fragment& f, uint32_t* xs, const float (&v)[8], int lane) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t magnitude = as_bits(v[i]) & 0x7fffffffu;
    top = top > magnitude ? top : magnitude;
  }
  int exponent = static_cast<int>(warp_max(top) >> 23);
  exponent = exponent < 32 ? 32 : exponent > 240 ? 240 : exponent;
  const float scale = as_float(static_cast<uint32_t>(268 - exponent) << 23);  // largest: 2^14..2^15
  f.unscale = as_float(static_cast<uint32_t>(exponent - 14) << 23);
  float x[8], even = 0.f, odd = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = v[i] * scale;
    (i & 1 ? odd : even) += x[i];
    if (i & 1) x[i] *= 0.0625f;
  }
  even = quad_sum(even), odd = quad_sum(odd);
  warp_sync();  // the last use of xs is over in every lane
  reinterpret_cast<uint4*>(xs)[8 * (lane & 3) + (lane >> 2)] = make_uint4(
      pack_f16(x[0], x[4]), pack_f16(x[1], x[5]), pack_f16(x[2], x[6]), pack_f16(x[3], x[7]));
  warp_sync();
  load_columns(f, xs, lane);
  const int t = lane & 3;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // chunk c was summed by lanes 4 c .. 4 c + 3
    const int from_lane = 4 * (4 * (t >> 1) + (t & 1) + 2 * i);
    const float e = shuffle(even, from_lane), o = shuffle(odd, from_lane);
    f.sum[i] = e + o;
    f.offset[i] = 1024.f * e + 64.f * o;
  }
}

// A run of tiles in shared memory: all weights, then all scales, then all biases.
struct Run {
  const uint8_t* base;
  int tiles;
};
struct UnitWeights {
  uint4 a, b;
  uint32_t scales, biases;
};

// Odd rows fetch their two groups in swapped order, which spreads a warp over all banks.
template <int K>
MOEFUSE_DEVICE UnitWeights load_unit(const Run& run, int tile, int slice, int lane) {
  const int g = lane >> 2, t = lane & 3, swap = (g & 1) * 32;
  const uint8_t* w = run.base + tile * weight_bytes(K) + g * (K / 2) + slice * (kSlice / 2) +
                     (t >> 1) * 64 + (t & 1) * 16;
  const uint8_t* s = run.base + run.tiles * weight_bytes(K) + tile * scale_bytes(K) +
                     g * (K / kGroupSize * 2) + slice * 8 + (t >> 1) * 4;
  UnitWeights u;
  u.a = *reinterpret_cast<const uint4*>(w + swap);
  u.b = *reinterpret_cast<const uint4*>(w + 32 - swap);
  u.scales = *reinterpret_cast<const uint32_t*>(s);
  u.biases = *reinterpret_cast<const uint32_t*>(s + run.tiles * scale_bytes(K));
  return u;
}

MOEFUSE_DEVICE void mma_words(float (&c)[4], uint32_t a, uint32_t b, const uint32_t* x) {
  constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u, kOne = 0x64006400u;
  const uint32_t first[4] = {select_or(a, kLow, kOne), select_or(b, kLow, kOne),
                             select_or(a, kHigh, kOne), select_or(b, kHigh, kOne)};
  mma_f16(c, first, x[0], x[1]);
  const uint32_t a8 = a >> 8, b8 = b >> 8;
  const uint32_t second[4] = {select_or(a8, kLow, kOne), select_or(b8, kLow, kOne),
                              select_or(a8, kHigh, kOne), select_or(b8, kHigh, kOne)};
  mma_f16(c, second, x[2], x[3]);
}

// This lane's part of 8 row products; quad_sum completes row lane / 4.
MOEFUSE_DEVICE float unit_product(const UnitWeights& u, const Fragment& f, int lane) {
  float c[4] = {-f.offset[0], -f.offset[1], -f.offset[0], -f.offset[1]}, d[4] = {0, 0, 0, 0};
  mma_words(c, u.a.x, u.b.x, f.b);
  mma_words(d, u.a.y, u.b.y, f.b + 4);
  mma_words(c, u.a.z, u.b.z, f.b + 8);
  mma_words(d, u.a.w, u.b.w, f.b + 12);
  const bool odd = (lane >> 2) & 1;
  const float first = odd ? c[2] + d[2] : c[0] + d[0], second = odd ? c[1] + d[1] : c[3] + d[3];
  return f.unscale * (bf16_low(u.scales) * first + bf16_high(u.scales) * second +
                      bf16_low(u.biases) * f.sum[0] + bf16_high(u.biases) * f.sum[1]);
}

// Products of tiles first, first + step, ... below run.tiles with one slice. Not unrolled: four
// warps a scheduler hide a unit's latency, and a layer's code must stay small, because every SM
// fetches all of it once a layer. red: [slices][8 * run.tiles]
template <int K>
MOEFUSE_DEVICE void run_products(const Run& run, int first, int step, int slice, const Fragment& f,
                                 float* red, int lane) {
#pragma unroll 1
  for (int tile = first; tile < run.tiles; tile += step) {
    const float y = quad_sum(unit_product(load_unit<K>(run, tile, slice, lane), f, lane));
    if ((lane & 3) == 0) red[(slice * run.tiles + tile) * kTileRows + (lane >> 2)] = y;
  }
}

// the slices of one row, summed in order
template <int kSlices>
MOEFUSE_DEVICE float sum_slices(const float* red, int stride) {
  float y = 0.f;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) y += red[s * stride];
  return y;
}

}  // namespace moefuse::cuda
