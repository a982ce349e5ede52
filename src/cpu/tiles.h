// Attention's products on tiles of bfloat16 (AMX), for mode fp32: another order of sums than
// kernels()'s, so the bits are those of this processor's kind alone, at several times the rate.
#pragma once

#include "cpu/kernels.h"

namespace moefuse::cpu {

// Rows, and the queries for them as Tiles::queries leaves them.
struct TilePart {
  RowsArgs rows;
  const char* queries;
};

// src/cpu/tiles.cpp has the bounds.
struct Tiles {
  static constexpr int kMaxDim = 1024, kMaxHeads = 32;
  // What queries() writes, to a multiple of 64.
  static int64_t query_bytes(int heads, int dim) { return (heads + 7) / 8 * int64_t{32} * dim; }

  void (*queries)(const float* q, int heads, int dim, char* out);
  // out[h * out_stride + j] = the sum over the parts of query h . row j; the parts have as many
  // rows, `dim` of all of them at most kMaxDim.
  void (*dots)(const TilePart* parts, int count, int heads, float* out, int64_t out_stride);
  // out[h * out_stride + d] = sum over j of weights[h * weights_stride + j] * row j [d]. Where
  // `ask`, what follows the rows is not near yet and will be read next, as it always is for dots.
  void (*weighted_sum)(const RowsArgs& rows, const float* weights, int heads,
                       int64_t weights_stride, float* out, int64_t out_stride, bool ask);
};

// With fewer heads most of a tile is empty.
constexpr int kLeastTileHeads = 8;

// Whether the tiles take these rows.
inline bool fit_tiles(const RowsArgs& rows, int heads) {
  return rows.dtype == Dtype::bfloat16 && rows.dim % 32 == 0 && rows.dim <= Tiles::kMaxDim &&
         heads <= Tiles::kMaxHeads;
}

// Null where the processor or the system has none, or MOEFUSE_ISA asks for a table by its name.
const Tiles* tiles();

}  // namespace moefuse::cpu
