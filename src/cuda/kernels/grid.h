// Products with 4-bit matrices in groups of 64 on the integer tensor cores. Activations go to a
// grid of 16-bit integers of their own for each group: x = step * (256 * high + low) with |x /
// step|
// <= 32512, high and low signed bytes. Integer sums are exact, so no order of lanes or rows changes
// a bit. What is lost is at most step / 2 = max |x| of the group / 65024 an element, against
// |x| / 512 by a rounding to bfloat16.
#pragma once

constexpr float kGridTop = 32512.0f;
constexpr uint kMagic = 0x4b400000u;  // 1.5 * 2^23 as a float: its low bits hold an integer

// Slices of 256 columns: what a warp takes of 16 rows at a time.
FUNC constexpr int slices(int columns) {
  return (columns + 255) / 256;
}

// How ROWS rows of x share a product. The four lanes of a row of weights hold two groups at a time,
// two lanes each, and a group's integers are added up on their own: so the second operand has a
// pair of columns (high bytes, low bytes) for each of the two groups, zeros where the other one's
// lanes stand. Its four pairs are those of two rows of x, a set; of one row, all four groups of a
// slice. What comes out is whole groups: EACH of a slice to a lane, t % 2 and 2 + t % 2 of row t /
// 2 of a set, or of one row group t. A row's sums have the same terms in the same order either way.
template <int ROWS>
struct Sharing {
  static constexpr int SETS = (ROWS + 1) / 2, EACH = ROWS == 1 ? 1 : 2;
  static FUNC uint group(int e, uint lane) {
    return ROWS == 1 ? lane % 4u : 2u * uint(e) + lane % 2u;
  }
  static FUNC uint row(int set, uint lane) {
    return ROWS == 1 ? 0u : 2u * uint(set) + lane % 4u / 2u;
  }
};

// One lane's part of a tile of 16 rows and 256 columns. Lane 4 g + t holds rows g and g + 8; of
// both, half of each of two groups, and the scales of the groups that come out at it.
template <typename T, int EACH>
struct Tile {
  Words<4> words[2][2];  // [row][group]
  T scales[2][EACH], biases[2][EACH];
};

// Rows past `last` repeat it; groups past the last column get a scale of zero. WHOLE, of a matrix
// that ends with a whole tile, past which that one is repeated: one address of each array, the rest
// is constants, which takes fewer instructions and more registers at once.
template <int COLS, typename T, int ROWS, bool WHOLE, typename W, typename S>
FUNC Tile<T, Sharing<ROWS>::EACH> load_tile(Affine<W, S> m, uint row, uint last, uint slice,
                                            uint lane) {
  using Of = Sharing<ROWS>;
  constexpr uint GROUPS = COLS / 64;
  uint top = WHOLE ? last - 15u : last, n = WHOLE ? row : row + lane / 4u;
  n = (n < top ? n : top) + (WHOLE ? lane / 4u : 0u);
  uint apart = GROUPS * (WHOLE || n + 8u <= last ? 8u : last - n), own = Of::group(0, lane);
  W words = m.weight + (n * (GROUPS * 8u) + lane % 4u * 4u) + slice * 32u;
  S scales = m.scales + (n * GROUPS + own) + slice * 4u;
  S biases = m.biases + (n * GROUPS + own) + slice * 4u;
  if (WHOLE) {
    words = settled(words);
    scales = settled(scales);
    biases = settled(biases);
  }
  Tile<T, Of::EACH> tile;
  UNROLL for (int h = 0; h < 2; ++h) {
    uint at = h == 0 ? 0u : apart;
    UNROLL for (int p = 0; p < 2; ++p) {
      bool in = COLS % 256 == 0 || slice * 4u + uint(2 * p) + lane % 4u / 2u < GROUPS;
      tile.words[h][p] = in ? load_stream(words, at * 8u + uint(16 * p)) : no_words();
    }
    UNROLL for (int e = 0; e < Of::EACH; ++e) {
      bool in = COLS % 256 == 0 || slice * 4u + own + uint(2 * e) < GROUPS;
      tile.scales[h][e] = in ? load_one(scales, at + uint(2 * e)) : T(0.0f);
      tile.biases[h][e] = in ? load_one(biases, at + uint(2 * e)) : T(0.0f);
    }
  }
  return tile;
}

// Words of a row's planes. Each slice ends in eight zeros, so that whoever wants zeros is as far
// from them in every slice as the others are from their bytes; in banks that these leave free.
constexpr int kZeros = 128 + 4, kSliceWords = kZeros + 8;
FUNC constexpr int plane_words(int columns) {
  return slices(columns) * kSliceWords;
}

// Eight consecutive values of a row, k a multiple of 8, to the grid. The eight lanes of a group
// come together. planes: for each group 16 words of high bytes, then 16 of low ones; each eight
// values their even ones, then their odd ones, as the nibbles of a word fall apart. steps and sums
// (of the integers): one a group.
template <typename P, typename F>
FUNC void store_on_grid(Floats<8> v, uint k, P planes, F steps, F sums, uint lane) {
  uint top = 0u;  // as bits, so that NaN is the largest
  UNROLL for (int i = 0; i < 8; ++i) {
    uint bits = as_uint(v.v[i]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  for (uint m = 1; m < 8u; m <<= 1) {
    uint other = shuffle_xor(top, m);
    top = other > top ? other : top;
  }
  float largest = as_float(top), scale = largest > 0.0f ? div_fast(kGridTop, largest) : 0.0f;
  uint b[8], sum = 0u;
  UNROLL for (int i = 0; i < 8; ++i) {
    b[i] = as_uint(fma_rn(v.v[i], scale, as_float(kMagic + 128u)));
    sum += b[i] - (kMagic + 128u);
  }
  for (uint m = 1; m < 8u; m <<= 1) sum += shuffle_xor(sum, m);
  uint at = k / 256u * kSliceWords + k % 256u / 64u * 32u + k / 8u % 8u * 2u;
  UNROLL for (int odd = 0; odd < 2; ++odd) {
    uint near = byte_permute(b[odd], b[2 + odd], 0x5140u);
    uint far = byte_permute(b[4 + odd], b[6 + odd], 0x5140u);
    planes[at + uint(odd)] = byte_permute(near, far, 0x7632u);
    planes[at + 16u + uint(odd)] = byte_permute(near, far, 0x5410u) ^ 0x80808080u;
  }
  F to = lane % 8u == 0u ? steps : sums;
  float value = lane % 8u == 0u ? div_fast(largest, kGridTop) : float(int(sum));
  if (lane % 8u < 2u) to[k / 64u] = value;
  if (lane < 8u) planes[k / 256u * kSliceWords + kZeros + lane] = 0u;
}

// A lane's part of the second operand, of ROWS rows of x, and of the groups that come out at it.
template <int ROWS>
struct Planes {
  using Of = Sharing<ROWS>;
  Words<4> words[Of::SETS][2][2];  // [set][groups][half]
  float steps[Of::SETS][Of::EACH], sums[Of::SETS][Of::EACH];
};

template <int COLS, int ROWS, typename P, typename F>
FUNC Planes<ROWS> load_planes(P planes, F steps, F sums, uint slice, uint lane) {
  using Of = Sharing<ROWS>;
  constexpr int WORDS = plane_words(COLS), GROUPS = slices(COLS) * 4;
  Planes<ROWS> x;
  uint t = lane % 4u, pair = lane / 8u;  // of columns
  UNROLL for (int set = 0; set < Of::SETS; ++set) {
    UNROLL for (int p = 0; p < 2; ++p) {
      uint row = ROWS == 1 ? 0u : uint(2 * set) + pair / 2u;
      bool own = ROWS == 1 ? pair == uint(2 * p) + t / 2u : pair % 2u == t / 2u;
      if (ROWS % 2 != 0 && ROWS > 1) own = own && row < uint(ROWS);
      uint at = row * WORDS + (uint(2 * p) + t / 2u) * 32u + lane / 4u % 2u * 16u + t % 2u * 8u;
      at = slice * kSliceWords + (own ? at : uint(kZeros));
      x.words[set][p][0] = load_shared(planes, at);
      x.words[set][p][1] = load_shared(planes, at + 4u);
    }
    UNROLL for (int e = 0; e < Of::EACH; ++e) {
      uint row = Of::row(set, lane), group = slice * 4u + Of::group(e, lane);
      if (ROWS % 2 != 0) row = row < uint(ROWS) ? row : uint(ROWS - 1);
      x.steps[set][e] = steps[row * GROUPS + group];
      x.sums[set][e] = sums[row * GROUPS + group];
    }
  }
  return x;
}

// Of rows g and g + 8 of a tile, the products of the groups that come out at a lane.
template <int ROWS>
struct Products {
  Floats<2> v[Sharing<ROWS>::SETS][Sharing<ROWS>::EACH];
};

template <int ROWS>
FUNC Products<ROWS> no_products() {
  using Of = Sharing<ROWS>;
  Products<ROWS> y;
  UNROLL for (int i = 0; i < Of::SETS * Of::EACH; ++i) y.v[i / Of::EACH][i % Of::EACH] = zeros<2>();
  return y;
}

// y and a tile's products.
template <int ROWS, typename T>
FUNC Products<ROWS> tile_dot(Products<ROWS> y, const Tile<T, Sharing<ROWS>::EACH>& tile,
                             const Planes<ROWS>& x) {
  using Of = Sharing<ROWS>;
  constexpr int MAGIC = int(kMagic);
  UNROLL for (int set = 0; set < Of::SETS; ++set) {
    Integers<4> c[2] = {{{MAGIC, MAGIC, MAGIC, MAGIC}}, {{MAGIC, MAGIC, MAGIC, MAGIC}}};
    if (ROWS == 1) c[1] = {{0, 0, 0, 0}};  // a lane's group is in one of both
    UNROLL for (int i = 0; i < 8; ++i) {
      int p = i / 4, word = i % 4;
      uint a = tile.words[0][p].w[word], b = tile.words[1][p].w[word];
      Words<4> columns = x.words[set][p][word / 2];
      c[p] = multiply_bytes(c[p], a & 0x0f0f0f0fu, b & 0x0f0f0f0fu, (a >> 4) & 0x0f0f0f0fu,
                            (b >> 4) & 0x0f0f0f0fu, columns.w[word % 2 * 2],
                            columns.w[word % 2 * 2 + 1]);
    }
    if (ROWS == 1) {
      UNROLL for (int i = 0; i < 4; ++i) c[0].v[i] += c[1].v[i];
    }
    UNROLL for (int i = 0; i < 2 * Of::EACH; ++i) {
      int e = i / 2, h = i % 2;
      float high = add_rn(as_float(uint(c[e].v[2 * h])), -as_float(kMagic));
      float low = add_rn(as_float(uint(c[e].v[2 * h + 1])), -as_float(kMagic));
      float q = fma_rn(high, 256.0f, low);  // below 2^25: rounded once
      float bias = mul_rn(float(tile.biases[h][e]), x.sums[set][e]);
      float& sum = y.v[set][e].v[h];
      sum = fma_rn(x.steps[set][e], fma_rn(float(tile.scales[h][e]), q, bias), sum);
    }
  }
  return y;
}

// The sums over a tile's four groups of a set's rows, in the order that whole_row has.
template <int ROWS>
FUNC Floats<2> row_sums(const Products<ROWS>& y, int set) {
  using Of = Sharing<ROWS>;
  Floats<2> whole = zeros<2>();
  UNROLL for (int h = 0; h < 2; ++h) {
    float first = y.v[set][0].v[h], last = y.v[set][Of::EACH - 1].v[h];
    first = add_rn(first, shuffle_xor(first, 1u));
    last = ROWS == 1 ? shuffle_xor(first, 2u) : add_rn(last, shuffle_xor(last, 1u));
    whole.v[h] = add_rn(first, last);
  }
  return whole;
}

// Sums of a slice's four groups wait in shared memory, a row's beside each other.
template <int ROWS, typename P>
FUNC void store_tile(const Products<ROWS>& y, P parts, int stride, uint row, uint lane) {
  using Of = Sharing<ROWS>;
  UNROLL for (int set = 0; set < Of::SETS; ++set) {
    uint of = Of::row(set, lane);
    if (ROWS % 2 == 0 || of < uint(ROWS)) {
      UNROLL for (int i = 0; i < 2 * Of::EACH; ++i) {
        uint at = (row + lane / 4u + 8u * uint(i % 2)) * 4u + Of::group(i / 2, lane);
        parts[of * uint(stride) + at] = y.v[set][i / 2].v[i % 2];
      }
    }
  }
}

// What a warp of WARPS takes of TILES tiles: every WARPS-th of TILES * slices(COLS) pieces, DEPTH
// of them on their way at a time (0: all). Where all of a tile's slices fall to the same warps,
// each warp adds its own up: then `parts` holds one sum for each warp, else one for each slice.
template <typename T, int COLS, int TILES, int WARPS, int ROWS, int DEPTH = 0>
struct Share {
  static constexpr int SLICES = slices(COLS), PIECES = TILES * SLICES;
  static constexpr int COUNT = (PIECES + WARPS - 1) / WARPS;
  static constexpr int HELD = DEPTH > 0 && DEPTH < COUNT ? DEPTH : COUNT;
  static constexpr bool EVEN = PIECES % WARPS == 0;
  static constexpr bool OWN = TILES == 1 || SLICES % WARPS == 0;
  static constexpr int PARTS = SLICES < WARPS ? SLICES : (OWN ? WARPS : SLICES);
  static constexpr int FLOATS = PARTS * TILES * 64;  // of parts, one row of x
  Tile<T, Sharing<ROWS>::EACH> tiles[HELD];
};

// Its piece i of a matrix's rows from `row` on.
template <typename T, int COLS, int TILES, int WARPS, int ROWS, bool WHOLE, typename W, typename S>
FUNC Tile<T, Sharing<ROWS>::EACH> load_piece(Affine<W, S> m, uint row, uint last, int i, uint warp,
                                             uint lane) {
  using Of = Share<T, COLS, TILES, WARPS, ROWS>;
  uint piece = warp + uint(i) * WARPS;
  if (!Of::EVEN) piece = piece < uint(Of::PIECES) ? piece : uint(Of::PIECES - 1);
  return load_tile<COLS, T, ROWS, WHOLE>(m, row + piece / Of::SLICES * 16u, last,
                                         piece % Of::SLICES, lane);
}

template <typename T, int COLS, int TILES, int WARPS, int ROWS, bool WHOLE, int DEPTH = 0,
          typename W, typename S>
FUNC Share<T, COLS, TILES, WARPS, ROWS, DEPTH> load_share(Affine<W, S> m, uint row, uint last,
                                                          uint warp, uint lane) {
  using Of = Share<T, COLS, TILES, WARPS, ROWS, DEPTH>;
  Of share;
  UNROLL for (int i = 0; i < Of::HELD; ++i) {
    share.tiles[i] = load_piece<T, COLS, TILES, WARPS, ROWS, WHOLE>(m, row, last, i, warp, lane);
  }
  return share;
}

// more(i): piece i. parts: of each row of x [PARTS][TILES * 16][4].
template <typename T, int COLS, int TILES, int WARPS, int ROWS, int DEPTH, typename M, typename P,
          typename F>
FUNC void dot_pieces(Share<T, COLS, TILES, WARPS, ROWS, DEPTH>& share, M more, P planes, F steps,
                     F sums, F parts, uint warp, uint lane) {
  using Of = Share<T, COLS, TILES, WARPS, ROWS, DEPTH>;
  constexpr int RUN = Of::OWN ? (Of::COUNT + TILES - 1) / TILES : 1;  // pieces added up
  UNROLL for (int i = 0; i < Of::COUNT; i += RUN) {
    uint first = warp + uint(i) * WARPS, tile = first / Of::SLICES;
    uint part = Of::OWN ? warp : first % Of::SLICES;
    Products<ROWS> y = no_products<ROWS>();
    UNROLL for (int j = i; j < i + RUN && j < Of::COUNT; ++j) {
      uint piece = warp + uint(j) * WARPS;
      if (Of::EVEN || piece < uint(Of::PIECES)) {
        Planes<ROWS> x = load_planes<COLS, ROWS>(planes, steps, sums, piece % Of::SLICES, lane);
        y = tile_dot<ROWS, T>(y, share.tiles[j % Of::HELD], x);
      }
      if (j + Of::HELD < Of::COUNT) share.tiles[j % Of::HELD] = more(j + Of::HELD);
    }
    if (Of::EVEN || first < uint(Of::PIECES)) {
      store_tile<ROWS>(y, parts, Of::FLOATS, (part * TILES + tile) * 16u, lane);
    }
  }
}

template <typename T, int COLS, int TILES, int WARPS, int ROWS, typename P, typename F>
FUNC void dot_share(Share<T, COLS, TILES, WARPS, ROWS>& share, P planes, F steps, F sums, F parts,
                    uint warp, uint lane) {
  auto none = [&](int) { return share.tiles[0]; };
  dot_pieces<T, COLS, TILES, WARPS, ROWS, 0>(share, none, planes, steps, sums, parts, warp, lane);
}

// The product of a row, by the four lanes that hold its sums: lane 4 i + t of thread 4 row + t.
template <int PARTS, int ROWS, typename P>
FUNC float whole_row(P parts, uint thread_at) {
  float sum = parts[thread_at];
  UNROLL for (int s = 1; s < PARTS; ++s) sum = add_rn(sum, parts[uint(s) * (ROWS * 4) + thread_at]);
  sum = add_rn(sum, shuffle_xor(sum, 1u));
  return add_rn(sum, shuffle_xor(sum, 2u));
}

// Sum over PARTS arrays of ROWS each, in their order.
template <int PARTS, int ROWS, typename P>
FUNC float sum_slices(P parts, uint row) {
  float sum = parts[row];
  UNROLL for (int s = 1; s < PARTS; ++s) sum = add_rn(sum, parts[uint(s) * ROWS + row]);
  return sum;
}

// A thread's part of a row of COLS values: eight of every THREADS * 8, zeros past the end.
template <int COLS, int THREADS>
struct RowPart {
  static constexpr int COUNT = (slices(COLS) * 32 + THREADS - 1) / THREADS;
  Floats<8> v[COUNT];
};

template <int COLS, int THREADS, typename X>
FUNC RowPart<COLS, THREADS> load_row(X x, uint thread_at) {
  RowPart<COLS, THREADS> part;
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    uint k = (thread_at + uint(i) * THREADS) * 8u;
    part.v[i] = zeros<8>();
    if (k < uint(COLS)) part.v[i] = load_fresh(x, k);
  }
  return part;
}

// ROWS of them, `stride` apart: all on their way before the first is put down.
template <int ROWS, int COLS, int THREADS, typename X>
FUNC void load_rows(RowPart<COLS, THREADS> (&rows)[ROWS], X x, int stride, uint thread_at) {
  UNROLL for (int r = 0; r < ROWS; ++r) {
    rows[r] = load_row<COLS, THREADS>(x + r * stride, thread_at);
  }
}

// A row times a norm's gains.
template <int COLS, int THREADS>
FUNC RowPart<COLS, THREADS> gained(RowPart<COLS, THREADS> row,
                                   const RowPart<COLS, THREADS>& gains) {
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    UNROLL for (int j = 0; j < 8; ++j) row.v[i].v[j] = mul_rn(row.v[i].v[j], gains.v[i].v[j]);
  }
  return row;
}

// To the grid, by THREADS threads. row_barrier() has to follow.
template <int COLS, int THREADS, typename P, typename F>
FUNC void row_on_grid(const RowPart<COLS, THREADS>& row, P planes, F steps, F sums,
                      uint thread_at) {
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    uint k = (thread_at + uint(i) * THREADS) * 8u;
    if (k < uint(slices(COLS)) * 256u) {
      store_on_grid(row.v[i], k, planes, steps, sums, thread_at % 32u);
    }
  }
}

// The same of row * gains; each warp leaves its sum of squares of the row in squares[warp]: the
// norm's scale comes after the product.
template <int COLS, int THREADS, typename P, typename F>
FUNC void normed_row_on_grid(const RowPart<COLS, THREADS>& row, const RowPart<COLS, THREADS>& gains,
                             P planes, F steps, F sums, F squares, uint thread_at) {
  float square = 0.0f;
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    UNROLL for (int j = 0; j < 8; ++j) square = fma_rn(row.v[i].v[j], row.v[i].v[j], square);
  }
  row_on_grid<COLS, THREADS>(gained<COLS, THREADS>(row, gains), planes, steps, sums, thread_at);
  square = lane_sum(square);
  if (thread_at % 32u == 0u) squares[thread_at / 32u] = square;
}

// ROWS of them, `stride` apart.
template <int ROWS, int COLS, int THREADS, typename X, typename P, typename F>
FUNC void normed_rows_on_grid(X x, int stride, const RowPart<COLS, THREADS>& gains, P planes,
                              F steps, F sums, F squares, uint thread_at) {
  constexpr int GROUPS = slices(COLS) * 4;
  RowPart<COLS, THREADS> rows[ROWS];
  load_rows<ROWS, COLS, THREADS>(rows, x, stride, thread_at);
  UNROLL for (int r = 0; r < ROWS; ++r) {
    normed_row_on_grid<COLS, THREADS>(rows[r], gains, planes + r * plane_words(COLS),
                                      steps + r * GROUPS, sums + r * GROUPS,
                                      squares + r * (THREADS / 32), thread_at);
  }
}

// Behind a row that WARPS warps brought to the grid, for each of which pieces of its slices wait. A
// warp that has all that it needs goes on alone: rows come to the warps of a block one by one.
template <int COLS, int WARPS>
FUNC void row_barrier() {
  if (slices(COLS) % WARPS == 0) {
    warp_barrier();
  } else {
    group_barrier();
  }
}

// Warps that hold a part of a row, eight values to a lane.
FUNC constexpr int row_warps(int columns, int warps) {
  return slices(columns) < warps ? slices(columns) : warps;
}

template <int WARPS, typename F>
FUNC float scale_of_squares(F squares, float count, float eps) {
  float sum = squares[0];
  UNROLL for (int i = 1; i < WARPS; ++i) sum = add_rn(sum, squares[i]);
  return rsqrt_fast(fma_rn(sum, 1.0f / count, eps));
}
