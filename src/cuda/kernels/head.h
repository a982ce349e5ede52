// The head's product. Its matrix is too large to be resident: a warp walks over tiles of 16 rows,
// DEPTH pieces of 256 columns ahead of the one in work. DEPTH divides their number.
#pragma once

template <typename T, int ROWS, int DEPTH>
struct HeadRing {
  Tile<T, Sharing<ROWS>::EACH> tiles[DEPTH];
};

// The pieces of its first tile, and of those `stride` behind each other.
template <typename T, int H, int N, int ROWS, int DEPTH, typename W, typename S>
FUNC HeadRing<T, ROWS, DEPTH> load_head(Affine<W, S> m, uint tile, uint stride, uint lane) {
  constexpr int SLICES = slices(H), TILES = (N + 15) / 16;
  HeadRing<T, ROWS, DEPTH> ring;
  UNROLL for (int i = 0; i < DEPTH; ++i) {
    uint ahead = tile + uint(i) / SLICES * stride;
    if (ahead < uint(TILES)) {
      ring.tiles[i] = load_tile<H, T, ROWS, N % 16 == 0>(m, ahead * 16u, N - 1u, i % SLICES, lane);
    }
  }
  return ring;
}

// take(set, r, row, y): y is logit `row` of row r of x, one of that set of rows.
template <typename T, int H, int N, int ROWS, int DEPTH, typename W, typename S, typename P,
          typename F, typename V>
FUNC void walk_head(HeadRing<T, ROWS, DEPTH>& ring, Affine<W, S> m, uint tile, uint stride,
                    P planes, F steps, F sums, F squares, float epsilon, uint lane, V take) {
  constexpr int SLICES = slices(H), TILES = (N + 15) / 16;
  for (; tile < uint(TILES); tile += stride) {
    Products<ROWS> y = no_products<ROWS>();
    UNROLL for (int s = 0; s < SLICES; ++s) {
      Planes<ROWS> p = load_planes<H, ROWS>(planes, steps, sums, uint(s), lane);
      y = tile_dot<ROWS, T>(y, ring.tiles[s % DEPTH], p);
      uint ahead = tile + uint(s + DEPTH) / SLICES * stride;
      if (ahead < uint(TILES)) {
        ring.tiles[s % DEPTH] =
            load_tile<H, T, ROWS, N % 16 == 0>(m, ahead * 16u, N - 1u, (s + DEPTH) % SLICES, lane);
      }
    }
    UNROLL for (int set = 0; set < Sharing<ROWS>::SETS; ++set) {
      Floats<2> whole = row_sums<ROWS>(y, set);
      uint r = Sharing<ROWS>::row(set, lane), row = tile * 16u + lane / 4u;
      bool first = lane % (ROWS == 1 ? 4u : 2u) == 0u;  // of the lanes that have the row's sums
      if (first && r < uint(ROWS)) {
        float scale = scale_of_squares<8>(squares + r * 8u, H, epsilon);
        if (row < uint(N)) take(set, r, row, mul_rn(whole.v[0], scale));
        if (row + 8u < uint(N)) take(set, r, row + 8u, mul_rn(whole.v[1], scale));
      }
    }
  }
}
