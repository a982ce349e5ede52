// Attention's products on tiles of bfloat16 (AMX), for mode fp32: another order of sums than
// kernels()'s, so the bits are those of this processor's kind alone, at several times the rate.
#pragma once

#include "cpu/kernels.h"

namespace moefuse::cpu {

struct Tiles {
  static constexpr int kMaxDim = 1024, kMaxHeads = 32;

  // Like the members of Kernels with these names, not exact; src/cpu/tiles.cpp has the bounds.
  void (*dots)(const RowsArgs& rows, const float* q, int heads, float* out, int64_t out_stride);
  void (*weighted_sum)(const RowsArgs& rows, const float* weights, int heads,
                       int64_t weights_stride, float* out);
};

// With as few heads kernels() is as fast, or faster: the tiles are half empty.
constexpr int kLeastTileHeads = 8;

// Whether the tiles take these rows.
inline bool fit_tiles(const RowsArgs& rows, int heads) {
  return rows.dtype == Dtype::bfloat16 && rows.dim % 32 == 0 && rows.dim <= Tiles::kMaxDim &&
         heads <= Tiles::kMaxHeads;
}

// Null where the processor or the system has none, or MOEFUSE_ISA asks for a table by its name.
const Tiles* tiles();

}  // namespace moefuse::cpu
