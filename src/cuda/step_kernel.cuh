// The persistent kernel: the stages in their order.
#pragma once
#include "attention.cuh"
#include "experts.cuh"
#include "lm_head.cuh"
#include "loader.cuh"

namespace moefuse::cuda {

static_assert(sizeof(Control) <= kControlBytes && sizeof(Layer) % 16 == 0);

template <class G>
MOEFUSE_DEVICE void init_control(const StepParams& p, Control& s, int block) {
  barrier_init(&s.full_qkv, kLoadArrivals), barrier_init(&s.full_dense, kLoadArrivals);
  barrier_init(&s.full_down, G::kTopK * kLoadArrivals);
#pragma unroll 1
  for (uint64_t& b : s.full_item) barrier_init(&b, kLoadArrivals);
#pragma unroll 1
  for (uint64_t& b : s.full_kv) barrier_init(&b, kLoadArrivals);
#pragma unroll 1
  for (uint64_t& b : s.full_lm) barrier_init(&b, kLoadArrivals);
  s.layer[0] = p.layers[0];
  s.qkv = share(G::kQkvRows / kTileRows, block, p.blocks);
  s.output = share(G::kHidden / kTileRows, block, p.blocks);
  s.router = share(G::kExperts, block, p.blocks);
  s.items = share(G::kItems, block, p.blocks);
  release_to_copies();
}

// more: another layer follows, of this token or the next
template <class G>
MOEFUSE_DEVICE void run_layer(Warp& c, int index, bool more, uint4& gain) {
  const Layer& layer = c.layer(0);
  const bool last = index + 1 == c.p.num_layers;
  const int slice = c.warp % (G::kHidden / kSlice);
  // everything below that comes from DRAM is asked for one stage before its use
  const HeadGain head = load_head_gain(c, layer, G::kHeadDim);
  qkv_stage<G>(c, index, more, gain);
  attention_stage<G>(c, layer, head);
  gain = load_gain(layer.post_norm, slice, c.lane);
  combine_stage<G>(c);
  output_stage<G>(c);
  Fragment f;
  router_stage<G>(c, gain, f);
  select_stage<G>(c, layer);
  gate_up_stage<G>(c, !last, f);
  gain = load_gain(last ? c.p.final_norm : c.layer(1).input_norm, slice, c.lane);
  down_stage<G>(c);
  ++c.clock, ++c.layers;
}

template <class G>
MOEFUSE_DEVICE void run_tokens(Warp& c) {
  const int slice = c.warp % (G::kHidden / kSlice);
  int token = c.p.state->token;
  if (c.warp == kWarps - 1) load_qkv<G>(c, 0, 0);
#pragma unroll 1
  for (int i = 0; i < c.p.tokens; ++i, ++c.position, ++c.sampled) {
    acquire_for_copies();
    load_ahead<G>(c, c.layer(0), c.position);
    uint4 gain = load_gain(c.layer(0).input_norm, slice, c.lane);
    if (c.warp == 0) embed_stage<G>(c, token);
    stage_done(c, kEmbed);
#pragma unroll 1
    for (int layer = 0; layer < c.p.num_layers; ++layer) {
      run_layer<G>(c, layer, layer + 1 < c.p.num_layers || i + 1 < c.p.tokens, gain);
    }
    lm_head_stage<G>(c, gain);
    if (c.warp == 0) {
      token = sampled_token(c);
      if (c.block == 0 && c.lane == 0) c.p.sampled[i] = token;
    }
  }
  if (c.block == 0 && c.thread == 0) {
    *c.p.state = {c.clock, c.sampled, c.position, token};
  }
}

template <class G>
MOEFUSE_DEVICE void step(const StepParams& p, int thread, int block) {
  uint8_t* shared = shared_base();
  Control& s = *reinterpret_cast<Control*>(shared);
  const int lane = thread & 31, warp = thread >> 5;
  const State state = *p.state;
  if (thread == 0) init_control<G>(p, s, block);
  block_sync();
  Warp c{p, s, shared, warp, lane,    thread, block, state.clock, state.sampled, state.position,
         0, 0, 0,      0,    cycles()};
  run_tokens<G>(c);
}

}  // namespace moefuse::cuda
