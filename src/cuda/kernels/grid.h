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

// One lane's part of a tile of 16 rows and 256 columns. Lane 4 g + t holds rows g and g + 8; of
// both, half of each of two groups.
template <typename T>
struct Tile {
  Words<4> words[2][2];  // [row][group]
  Pair<T> scales[2], biases[2];
};

// Rows past `last` repeat it; groups past the last column get a scale of zero.
template <int COLS, typename T, typename W, typename S>
FUNC Tile<T> load_tile(Affine<W, S> m, uint row, uint last, uint slice, uint lane) {
  constexpr uint GROUPS = COLS / 64;
  Tile<T> tile;
  UNROLL for (int h = 0; h < 2; ++h) {
    uint n = row + lane / 4u + 8u * uint(h);
    n = n < last ? n : last;
    uint group = slice * 4u + lane % 4u / 2u * 2u;
    bool first = COLS % 256 == 0 || group < GROUPS, second = COLS % 256 == 0 || group + 1u < GROUPS;
    uint at = n * GROUPS + (first ? group : 0u), word = at * 8u + lane % 2u * 4u;
    tile.words[h][0] = load_stream(m.weight, word);
    tile.words[h][1] = load_stream(m.weight, word + (second ? 8u : 0u));
    if (GROUPS % 2 == 0 && COLS % 256 == 0) {
      tile.scales[h] = load_pair(m.scales, at);
      tile.biases[h] = load_pair(m.biases, at);
    } else {
      uint next = at + (second ? 1u : 0u);
      tile.scales[h] = pair_of(first ? m.scales[at] : T(0.0f), second ? m.scales[next] : T(0.0f));
      tile.biases[h] = pair_of(first ? m.biases[at] : T(0.0f), second ? m.biases[next] : T(0.0f));
    }
  }
  return tile;
}

// Eight consecutive values of a row, k a multiple of 8, to the grid. The eight lanes of a group
// come together. planes: for each 32 columns 8 words of high bytes, then 8 of low ones; each eight
// values their even ones, then their odd ones, as the nibbles of a word fall apart. steps: one a
// group; sums: of the integers of 32 columns.
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
  sum += shuffle_xor(sum, 1u);
  sum += shuffle_xor(sum, 2u);
  uint at = k / 32u * 16u + k / 8u % 4u * 2u;
  UNROLL for (int odd = 0; odd < 2; ++odd) {
    uint near = byte_permute(b[odd], b[2 + odd], 0x5140u);
    uint far = byte_permute(b[4 + odd], b[6 + odd], 0x5140u);
    planes[at + uint(odd)] = byte_permute(near, far, 0x7632u);
    planes[at + 8u + uint(odd)] = byte_permute(near, far, 0x5410u) ^ 0x80808080u;
  }
  if (lane % 8u == 0u) steps[k / 64u] = div_fast(largest, kGridTop);
  if (lane % 4u == 0u) sums[k / 32u] = float(int(sum));
}

// Words of a row's planes: behind them four zeros.
FUNC constexpr int plane_words(int columns) {
  return slices(columns) * 128 + 4;
}

// A lane's part of a row's slice as the tensor cores' second operand: column 2 t takes the high
// bytes of lane t's columns, column 2 t + 1 the low ones, so that no two lanes' sums mix. The other
// lanes' columns are zeros.
struct Planes {
  Words<4> words[2][2];
  float steps[2], sums[2];
};

template <int COLS, typename P, typename F>
FUNC Planes load_planes(P planes, F steps, F sums, uint slice, uint lane) {
  Planes p;
  uint t = lane % 4u;
  bool own = lane / 8u == t;
  UNROLL for (int j = 0; j < 2; ++j) {
    uint group = slice * 4u + t / 2u * 2u + uint(j), chunk = group * 2u + t % 2u;
    uint at = own ? chunk * 16u + lane / 4u % 2u * 8u : uint(slices(COLS)) * 128u;
    p.words[j][0] = load_shared(planes, at);
    p.words[j][1] = load_shared(planes, at + (own ? 4u : 0u));
    p.steps[j] = steps[group];
    p.sums[j] = sums[chunk];
  }
  return p;
}

// The lane's part of two rows' products: with the sum over the four lanes of a row they are whole.
template <typename T>
FUNC Floats<2> tile_dot(const Tile<T>& tile, const Planes& x) {
  Floats<2> y = zeros<2>();
  UNROLL for (int j = 0; j < 2; ++j) {
    Integers<4> c = {{int(kMagic), int(kMagic), int(kMagic), int(kMagic)}};
    UNROLL for (int i = 0; i < 4; ++i) {
      uint a = tile.words[0][j].w[i], b = tile.words[1][j].w[i];
      c = multiply_bytes(c, a & 0x0f0f0f0fu, b & 0x0f0f0f0fu, (a >> 4) & 0x0f0f0f0fu,
                         (b >> 4) & 0x0f0f0f0fu, x.words[j][i / 2].w[i % 2 * 2],
                         x.words[j][i / 2].w[i % 2 * 2 + 1]);
    }
    UNROLL for (int h = 0; h < 2; ++h) {
      float high = add_rn(as_float(uint(c.v[2 * h])), -as_float(kMagic));
      float low = add_rn(as_float(uint(c.v[2 * h + 1])), -as_float(kMagic));
      float q = fma_rn(high, 256.0f, low);  // below 2^24: exact
      float bias = mul_rn(element(tile.biases[h], j), x.sums[j]);
      y.v[h] = fma_rn(x.steps[j], fma_rn(element(tile.scales[h], j), q, bias), y.v[h]);
    }
  }
  return y;
}

FUNC Floats<2> row_sums(Floats<2> y) {
  UNROLL for (int h = 0; h < 2; ++h) {
    y.v[h] = add_rn(y.v[h], shuffle_xor(y.v[h], 1u));
    y.v[h] = add_rn(y.v[h], shuffle_xor(y.v[h], 2u));
  }
  return y;
}

// Sums of four lanes each wait in shared memory, a row's beside each other.
template <typename P>
FUNC void store_tile(Floats<2> y, P parts, uint row, uint lane) {
  parts[row * 4u + lane] = y.v[0];
  parts[row * 4u + 32u + lane] = y.v[1];
}

// What a warp of WARPS takes of TILES tiles: every WARPS-th of TILES * slices(COLS) pieces. Where
// all of a tile's slices fall to the same warps, each warp adds its own up: then `parts` holds one
// sum for each warp, else one for each slice.
template <typename T, int COLS, int TILES, int WARPS>
struct Share {
  static constexpr int SLICES = slices(COLS), PIECES = TILES * SLICES;
  static constexpr int COUNT = (PIECES + WARPS - 1) / WARPS;
  static constexpr bool EVEN = PIECES % WARPS == 0;
  static constexpr bool OWN = TILES == 1 || SLICES % WARPS == 0;
  static constexpr int PARTS = SLICES < WARPS ? SLICES : (OWN ? WARPS : SLICES);
  static constexpr int FLOATS = PARTS * TILES * 64;  // of parts, one row of x
  Tile<T> tiles[COUNT];
};

template <typename T, int COLS, int TILES, int WARPS, typename W, typename S>
FUNC Share<T, COLS, TILES, WARPS> load_share(Affine<W, S> m, uint row, uint last, uint warp,
                                             uint lane) {
  using Of = Share<T, COLS, TILES, WARPS>;
  Of share;
  UNROLL for (int i = 0; i < Of::COUNT; ++i) {
    uint piece = warp + uint(i) * WARPS;
    if (!Of::EVEN) piece = piece < uint(Of::PIECES) ? piece : uint(Of::PIECES - 1);
    share.tiles[i] =
        load_tile<COLS, T>(m, row + piece / Of::SLICES * 16u, last, piece % Of::SLICES, lane);
  }
  return share;
}

// parts: [PARTS][TILES * 16][4], one row of x.
template <typename T, int COLS, int TILES, int WARPS, typename P, typename F>
FUNC void dot_share(const Share<T, COLS, TILES, WARPS>& share, P planes, F steps, F sums, F parts,
                    uint warp, uint lane) {
  using Of = Share<T, COLS, TILES, WARPS>;
  constexpr int RUN = Of::OWN ? (Of::COUNT + TILES - 1) / TILES : 1;  // pieces added up
  UNROLL for (int i = 0; i < Of::COUNT; i += RUN) {
    uint piece = warp + uint(i) * WARPS;
    if (Of::EVEN || piece < uint(Of::PIECES)) {
      uint part = Of::OWN ? warp : piece % Of::SLICES, tile = piece / Of::SLICES;
      Floats<2> y = zeros<2>();
      UNROLL for (int j = i; j < i + RUN && j < Of::COUNT; ++j) {
        uint slice = (warp + uint(j) * WARPS) % Of::SLICES;
        if (Of::EVEN || warp + uint(j) * WARPS < uint(Of::PIECES)) {
          Planes x = load_planes<COLS>(planes, steps, sums, slice, lane);
          Floats<2> one = tile_dot<T>(share.tiles[j], x);
          UNROLL for (int h = 0; h < 2; ++h) y.v[h] = add_rn(y.v[h], one.v[h]);
        }
      }
      store_tile(y, parts, (part * TILES + tile) * 16u, lane);
    }
  }
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

// A row times a norm's gains.
template <int COLS, int THREADS>
FUNC RowPart<COLS, THREADS> gained(RowPart<COLS, THREADS> row,
                                   const RowPart<COLS, THREADS>& gains) {
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    UNROLL for (int j = 0; j < 8; ++j) row.v[i].v[j] = mul_rn(row.v[i].v[j], gains.v[i].v[j]);
  }
  return row;
}

// To the grid, by THREADS threads. A barrier has to follow.
template <int COLS, int THREADS, typename P, typename F>
FUNC void row_on_grid(const RowPart<COLS, THREADS>& row, P planes, F steps, F sums,
                      uint thread_at) {
  UNROLL for (int i = 0; i < (RowPart<COLS, THREADS>::COUNT); ++i) {
    uint k = (thread_at + uint(i) * THREADS) * 8u;
    if (k < uint(slices(COLS)) * 256u) {
      store_on_grid(row.v[i], k, planes, steps, sums, thread_at % 32u);
    }
  }
  if (thread_at < 4u) planes[uint(slices(COLS)) * 128u + thread_at] = 0u;
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
