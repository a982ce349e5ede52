// The attention half of a layer: qkv projection, grouped-query attention over the cache and the new
// token, output projection with the residual.
#pragma once
#include "loader.cuh"

namespace moefuse::cuda {

// What a lane needs to norm and rotate its head; asked for a stage ahead, because it comes from
// DRAM.
struct HeadGain {
  uint32_t low, high;
  float4 turn;
};
MOEFUSE_DEVICE HeadGain load_head_gain(const Warp& c, const Layer& layer, int head_dim) {
  const uint32_t* gain =
      reinterpret_cast<const uint32_t*>(c.warp < 8 ? layer.q_norm : layer.k_norm);
  const float* rope = c.p.rope + static_cast<size_t>(c.position) * head_dim;
  return {gain[c.lane], gain[32 + c.lane], reinterpret_cast<const float4*>(rope)[c.lane]};
}

// hidden -> qkv, bf16; then, if there is `more`, the next layer's weights may take the place
template <class G>
MOEFUSE_DEVICE void qkv_stage(Warp& c, int index, bool more, uint4 gain) {
  constexpr int kSlices = G::kHidden / kSlice, kStep = kWarps / kSlices;
  const int slice = c.warp % kSlices, tiles = c.s.qkv.end - c.s.qkv.begin, rows = tiles * kTileRows;
  float v[8];
  poll_slice(c, read_slot(c, c.p.x.hidden, c.hidden_clock(), G::kHidden / 2), slice, kQkv, v);
  mark(c, kQkv, kInput);
  const float ssq = apply_gain(v, gain);
  if (c.warp < kSlices && c.lane == 0) c.s.ssq[0][slice] = ssq;
  Fragment f;
  make_fragment(f, c.slice(), v, c.lane);
  wait(c, &c.s.full_qkv, c.layers, kQkv);
  mark(c, kQkv, kWeights);
  const Run run{c.shared + c.p.layout.qkv, tiles};
  run_products<G::kHidden>(run, c.warp / kSlices, kStep, slice, f, c.red(), c.lane);
  block_sync();
  mark(c, kQkv, kProducts);
  if (more && c.warp == kWarps - 1) load_qkv<G>(c, 1, index);
  const int r = 2 * c.thread;
  if (r < rows) {
    const float n = norm_factor<kSlices>(c.s.ssq[0], G::kHidden, c.p.eps);
    const uint32_t word = pack_bf16(sum_slices<kSlices>(c.red() + r, rows) * n,
                                    sum_slices<kSlices>(c.red() + r + 1, rows) * n);
    publish(c.p.x.qkv, c.clock, G::kQkvRows / 2, 1, (c.s.qkv.begin * kTileRows + r) / 2, word);
  }
  stage_done(c, kQkv);
}

// Scratch of attention, where the down weights will be.
struct AttentionScratch {
  uint16_t query[8][128];
  float score[2][kKvGroup + 16][8];
  float sum[4][8], maximum[8];
  float part[4][8][132];  // column d at d + d / 32: rows are written in strides of 8
};

// Norm and rotation of one head, two pairs a lane: (2 l, 2 l + 1) and the same 64 further on.
MOEFUSE_DEVICE void norm_and_rotate(uint32_t (&head)[2], const HeadGain& gain, float eps) {
  float a = bf16_low(head[0]), b = bf16_high(head[0]), x = bf16_low(head[1]);
  float y = bf16_high(head[1]);
  const float n = reciprocal_sqrt(warp_sum(a * a + b * b + x * x + y * y) / 128.f + eps);
  a = round_bf16(a * n * bf16_low(gain.low)), b = round_bf16(b * n * bf16_high(gain.low));
  x = round_bf16(x * n * bf16_low(gain.high)), y = round_bf16(y * n * bf16_high(gain.high));
  head[0] = pack_bf16(a * gain.turn.x - x * gain.turn.y, b * gain.turn.z - y * gain.turn.w);
  head[1] = pack_bf16(x * gain.turn.x + a * gain.turn.y, y * gain.turn.z + b * gain.turn.w);
}

// Warps 0..7 bring a query head each; 8 and 9 the new key and value, in split 0, which also
// appends them to the cache.
template <class G>
MOEFUSE_DEVICE void prepare_heads(Warp& c, const Layer& layer, const Span& span,
                                  const HeadGain& gain, AttentionScratch& a, uint8_t* last_slot) {
  constexpr int kWords = G::kHeadDim / 2;
  if (c.warp >= (span.fresh ? 10 : 8)) return;
  const bool key = c.warp == 8, value = c.warp == 9;
  const int head = value ? G::kQHeads + G::kKvHeads + span.head
                   : key ? G::kQHeads + span.head
                         : span.head * 8 + c.warp;
  uint32_t word[2];
  poll(c, slot(c.p.x.qkv, c.clock, G::kQkvRows / 2, 1, 0) + head * kWords + c.lane, 32, kAttention,
       word);
  if (!value) norm_and_rotate(word, gain, c.p.eps);
  uint32_t* to = reinterpret_cast<uint32_t*>(a.query[c.warp & 7]);
  if (key || value) {
    const size_t at =
        (static_cast<size_t>(span.head) * c.p.cache_stride + c.position) * kWords + c.lane;
    uint32_t* cache = reinterpret_cast<uint32_t*>(key ? layer.k_cache : layer.v_cache) + at;
    cache[0] = word[0], cache[32] = word[1];
    to = reinterpret_cast<uint32_t*>(last_slot) + (key ? kKvGroup : 2 * kKvGroup + 1) * kWords;
  }
  to[c.lane] = word[0], to[32 + c.lane] = word[1];
}

// Scores of 16 tokens with 8 heads; keys in shared memory, the new token at row kKvGroup.
MOEFUSE_DEVICE void score_tile(const Warp& c, const AttentionScratch& a, const uint8_t* keys,
                               float (*score)[8], int tile) {
  const int g = c.lane >> 2, t = c.lane & 3;
  float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = 64 * j + 16 * t;
    const uint4 k0 = *reinterpret_cast<const uint4*>(keys + (16 * tile + g) * 256 + at);
    const uint4 k1 = *reinterpret_cast<const uint4*>(keys + (16 * tile + g + 8) * 256 + at);
    const uint4 q =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const uint8_t*>(a.query[g]) + at);
    const uint32_t first[4] = {k0.x, k1.x, k0.y, k1.y}, second[4] = {k0.z, k1.z, k0.w, k1.w};
    mma_bf16(even, first, q.x, q.y);
    mma_bf16(odd, second, q.z, q.w);
  }
  constexpr float kScale = 0.08838834764831845f;  // 1 / sqrt(128)
  float* s0 = &score[16 * tile + g][2 * t];
  float* s1 = &score[16 * tile + g + 8][2 * t];
  s0[0] = (even[0] + odd[0]) * kScale, s0[1] = (even[1] + odd[1]) * kScale;
  s1[0] = (even[2] + odd[2]) * kScale, s1[1] = (even[3] + odd[3]) * kScale;
}

// One warp's running state: two heads, a quarter of the tokens, 8 dims a lane (16 lanes a token).
struct Accumulator {
  float o[2][8], maximum[2], sum;  // sum: of head lane / 16, this lane's tokens
};

MOEFUSE_DEVICE void add_value(Accumulator& a, uint4 value, float p0, float p1) {
  float v[8];
  unpack_bf16(value, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) a.o[0][i] += p0 * v[i], a.o[1][i] += p1 * v[i];
}

MOEFUSE_DEVICE void rescale(Accumulator& a, const float (*score)[8], int head, int count,
                            bool fresh, int lane) {
  const bool in0 = lane < count, in1 = lane + 32 < count || (fresh && lane + 32 == kKvGroup);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = in0 ? score[lane][head + h] : -INFINITY;
    if (in1 && score[lane + 32][head + h] > m) m = score[lane + 32][head + h];
    m = warp_maximum(m);
    if (a.maximum[h] > m) m = a.maximum[h];
    const float keep = fast_exp(a.maximum[h] - m);
#pragma unroll
    for (int i = 0; i < 8; ++i) a.o[h][i] *= keep;
    if (lane >> 4 == h) a.sum *= keep;
    a.maximum[h] = m;
  }
}

// tokens quarter, quarter + 4, ... of the group; lane l holds the weight of the (l % 16)-th of them
// for head l / 16
MOEFUSE_DEVICE void weigh_values(const Warp& c, Accumulator& a, const uint8_t* values,
                                 const float (*score)[8], int count, bool fresh) {
  const int head = 2 * (c.warp & 3), quarter = c.warp >> 2, half = c.lane >> 4;
  rescale(a, score, head, count, fresh, c.lane);
  const int mine = quarter + 4 * (c.lane & 15);
  const bool valid = mine < count || (fresh && mine == kKvGroup);
  const float p =
      valid ? fast_exp(score[mine][head + half] - (half ? a.maximum[1] : a.maximum[0])) : 0.f;
  a.sum += p;
  const uint8_t* column = values + 16 * (c.lane & 15);
#pragma unroll 1
  for (int j = half; 4 * (j - half) + quarter < count; j += 2) {
    const int token = quarter + 4 * j;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (token < count) value = *reinterpret_cast<const uint4*>(column + token * 256);
    const float p0 = shuffle(p, j), p1 = shuffle(p, 16 + j);
    add_value(a, value, token < count ? p0 : 0.f, token < count ? p1 : 0.f);
  }
  if (fresh && quarter == kKvGroup % 4) {
    const float p0 = shuffle(p, kKvGroup / 4), p1 = shuffle(p, 16 + kKvGroup / 4);
    const uint4 value = *reinterpret_cast<const uint4*>(column + kKvGroup * 256);
    add_value(a, value, half ? 0.f : p0, half ? 0.f : p1);
  }
}

// quarters -> one partial result of the block, published
MOEFUSE_DEVICE void publish_partial(Warp& c, Accumulator& acc, AttentionScratch& a,
                                    const Span& span, int kv_heads) {
  const int head = 2 * (c.warp & 3), quarter = c.warp >> 2, half = c.lane >> 4;
#pragma unroll
  for (int m = 8; m; m >>= 1) acc.sum += shuffle_xor(acc.sum, m);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    acc.o[0][i] += shuffle_xor(acc.o[0][i], 16);
    acc.o[1][i] += shuffle_xor(acc.o[1][i], 16);
    a.part[quarter][head + half][8 * (c.lane & 15) + (c.lane & 15) / 4 + i] =
        half ? acc.o[1][i] : acc.o[0][i];
  }
  if ((c.lane & 15) == 0) {
    a.sum[quarter][head + half] = acc.sum;
    if (quarter == 0) a.maximum[head + half] = half ? acc.maximum[1] : acc.maximum[0];
  }
  block_sync();
  const float* part = &a.part[0][0][0];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = c.thread + i * kThreads;
    const float* from = part + at / 128 * 132 + at % 128 + at % 128 / 32;
    const float o = (from[0] + from[1056]) + (from[2112] + from[3168]);
    publish(c.p.x.partial, c.clock, kv_heads * kSplits * 1024, 1,
            (span.head * kSplits + span.split) * 1024 + at, as_bits(o));
  }
  if (c.thread < 16) {
    const int h = c.thread >> 1;
    const float sum = (a.sum[0][h] + a.sum[1][h]) + (a.sum[2][h] + a.sum[3][h]);
    publish(c.p.x.range, c.clock, kv_heads * 8 * kSplits * 2, 1,
            ((span.head * 8 + h) * kSplits + span.split) * 2 + (c.thread & 1),
            as_bits(c.thread & 1 ? sum : a.maximum[h]));
  }
}

template <class G>
MOEFUSE_DEVICE void attention_stage(Warp& c, const Layer& layer, const HeadGain& gain) {
  const Span span = make_span(c.p, c.block, c.position, G::kKvHeads);
  if (c.block < G::kKvHeads * c.p.splits) {
    AttentionScratch& a = *reinterpret_cast<AttentionScratch*>(c.shared + c.p.layout.down);
    uint8_t* slots = c.shared + c.p.layout.kv;
    const uint32_t bytes = c.p.layout.kv_slot;
    prepare_heads<G>(c, layer, span, gain, a,
                     slots + (c.kv_uses + span.groups - 1) % kKvSlots * bytes);
    block_sync();
    mark(c, kAttention, kInput);
    Accumulator acc{{}, {-INFINITY, -INFINITY}, 0.f};
#pragma unroll 1
    for (int i = 0; i < span.groups; ++i, ++c.kv_uses) {
      const int left = span.end - span.begin - i * kKvGroup, at = c.kv_uses % kKvSlots;
      const int count = left < kKvGroup ? left : kKvGroup;
      const bool fresh = span.fresh && i == span.groups - 1;
      const uint8_t* keys = slots + at * bytes;
      wait(c, &c.s.full_kv[at], c.kv_uses / kKvSlots, kAttention);
      if (16 * c.warp < count || (fresh && c.warp == kKvGroup / 16)) {
        score_tile(c, a, keys, a.score[i & 1], c.warp);
      }
      block_sync();
      mark(c, kAttention, kWeights);
      // every warp has left the group before this one, so its slot is free
      if (i > 0 && i + 1 < span.groups && c.warp == kWarps - 1) {
        load_kv<G>(c, layer, span, i + 1, c.kv_uses + 1);
      }
      weigh_values(c, acc, keys + (kKvGroup + 1) * 256, a.score[i & 1], count, fresh);
    }
    mark(c, kAttention, kProducts);
    publish_partial(c, acc, a, span, G::kKvHeads);
  }
  stage_done(c, kAttention);
}

// partial results of one head's splits -> 32 outputs, bf16
template <class G>
MOEFUSE_DEVICE void combine_stage(Warp& c) {
  constexpr int kShare = kSplits / kWarps, kTasks = G::kQHeads * 4;
#pragma unroll 1
  for (int task = c.block; task < kTasks; task += c.p.blocks) {
    const int head = task / 4, dim = task % 4 * 32;
    float m = -INFINITY, sum = 0.f, out = 0.f;
    uint2 range[1];
    uint32_t word[kShare];
    const int split = c.lane < c.p.splits ? c.lane : 0;
    poll(c,
         slot(c.p.x.range, c.clock, G::kQHeads * kSplits * 2, 1, 0) + (head * kSplits + split) * 2,
         0, kCombine, range);
    if (c.lane < c.p.splits) m = as_float(range[0].x), sum = as_float(range[0].y);
    const float weight = fast_exp(m - warp_maximum(m));
    const float share = weight / warp_sum(weight * sum);
    // a split that does not exist is read as split 0, with the weight of none
    const int first = c.warp * kShare < c.p.splits ? c.warp * kShare : 0;
    const int stride = first + kShare <= c.p.splits ? 1024 : 0;
    poll(c,
         slot(c.p.x.partial, c.clock, G::kKvHeads * kSplits * 1024, 1, 0) +
             (static_cast<size_t>(head / 8) * kSplits + first) * 1024 + head % 8 * 128 + dim +
             c.lane,
         stride, kCombine, word);
    mark(c, kCombine, kInput);
#pragma unroll
    for (int i = 0; i < kShare; ++i) out += shuffle(share, c.warp * kShare + i) * as_float(word[i]);
    c.s.combine[c.warp][c.lane] = out;
    block_sync();
    if (c.thread < 16) {
      const float* column = &c.s.combine[0][2 * c.thread];
      publish(c.p.x.context, c.clock, G::kContext / 2, kReplicas, (head * 128 + dim) / 2 + c.thread,
              pack_bf16(sum_slices<kWarps>(column, 32), sum_slices<kWarps>(column + 1, 32)));
    }
    if (task + c.p.blocks < kTasks) block_sync();
  }
  stage_done(c, kCombine);
}

// context -> middle = hidden + o_proj(context)
template <class G>
MOEFUSE_DEVICE void output_stage(Warp& c) {
  constexpr int kSlices = G::kContext / kSlice, kStep = kWarps / kSlices;
  const int slice = c.warp % kSlices, tiles = c.s.output.end - c.s.output.begin;
  const int rows = tiles * kTileRows, r = 2 * c.thread, at = (c.s.output.begin * kTileRows + r) / 2;
  uint32_t residual = 0;  // complete since the qkv stage
  if (r < rows) {
    residual = load_shared_word(read_slot(c, c.p.x.hidden, c.hidden_clock(), G::kHidden / 2) + at);
  }
  float v[8];
  poll_slice(c, read_slot(c, c.p.x.context, c.clock, G::kContext / 2), slice, kOutput, v);
  mark(c, kOutput, kInput);
  Fragment f;
  make_fragment(f, c.slice(), v, c.lane);
  wait(c, &c.s.full_dense, c.layers, kOutput);
  mark(c, kOutput, kWeights);
  const Run run{c.shared + c.p.layout.dense, tiles};
  run_products<G::kContext>(run, c.warp / kSlices, kStep, slice, f, c.red(), c.lane);
  block_sync();
  mark(c, kOutput, kProducts);
  if (r < rows) {
    const uint32_t word =
        pack_bf16(bf16_low(residual) + sum_slices<kSlices>(c.red() + r, rows),
                  bf16_high(residual) + sum_slices<kSlices>(c.red() + r + 1, rows));
    publish(c.p.x.middle, c.clock, G::kHidden / 2, kReplicas, at, word);
  }
  stage_done(c, kOutput);
}

}  // namespace moefuse::cuda
