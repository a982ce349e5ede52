// One decode step on one GPU as one persistent kernel: what it reads, what it writes, and the
// shape of its shared memory. Plain data, shared by the host and the device.
//
// One block sits on every SM for a whole token, so the stages of a layer need no launches. Weights
// stream into shared memory ahead of the stages that need them, while the SMs wait for each other's
// results. Results travel through small rings in L2 and are their own flags: a slot
// starts as kEmpty words, which no arithmetic here produces, and a reader spins on the very words
// it needs. Every sum has a fixed order, whatever the number of SMs.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MOEFUSE_BOTH __host__ __device__
#else
#define MOEFUSE_BOTH
#endif

namespace moefuse::cuda {

constexpr uint32_t kEmpty = 0xffffffffu;  // as two bf16 or one float: a NaN no instruction returns
constexpr int kRing = 4;                  // slots of every exchange buffer; two layers are in use
constexpr int kReplicas = 1;              // copies of the vectors that every SM reads at once
constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 8;    // rows of one mma tile
constexpr int kSlice = 256;     // columns of one unit of work
constexpr int kGroupSize = 64;  // quantisation group
constexpr int kKvGroup = 48;    // cached tokens in one slot of shared memory, plus the new one
constexpr int kKvSlots = 2;
constexpr int kMaxItems = 32;  // gate/up tiles of one block
constexpr int kSplits = 32;    // parts of the context of one kv head
constexpr uint32_t kControlBytes = 4096;

// Affine 4-bit rows as MLX stores them: weight [rows, K / 8] (nibble i of a word is column i),
// scales and biases [rows, K / 64] in bf16. The 8-bit router packs four columns a word.
struct Matrix {
  const uint32_t* weight;
  const uint16_t* scales;
  const uint16_t* biases;
};

// k_cache and v_cache: [kv_heads, cache_stride, head_dim] bf16
struct alignas(16) Layer {
  Matrix q, k, v, o, router, gate, up, down;
  const uint16_t *input_norm, *post_norm, *q_norm, *k_norm;
  uint16_t *k_cache, *v_cache;
};

struct State {
  int clock;     // layers run since the rings were emptied; their position
  int sampled;   // tokens run since then; `hidden` moves on once a layer and once a token
  int position;  // tokens in the cache
  int token;     // the next token to run
};

// Exchange rings, [kRing] slots each; words hold two bf16 or one float.
struct Exchange {
  uint32_t* hidden;   // [ring][replica][hidden / 2]       input of a layer
  uint32_t* middle;   // [ring][replica][hidden / 2]       after attention
  uint32_t* qkv;      // [ring][qkv_rows / 2]
  uint32_t* partial;  // [ring][kv_heads][splits][8][head_dim]  unnormalised attention
  uint32_t* range;    // [ring][kv_heads][8][splits][2]    its maximum and sum
  uint32_t* context;  // [ring][replica][q_heads * head_dim / 2]
  uint32_t* scores;   // [ring][replica][experts]          router logits
  uint32_t* act;      // [ring][replica][top_k * width / 2]
  uint64_t* keys;     // [ring][blocks]  best (logit, token) of a block; 0 is empty
};

// Byte offsets in shared memory.
struct Layout {
  uint32_t slices, red, qkv, dense, kv, items, down, total;
  uint32_t red_floats, kv_slot;
};

struct StepParams {
  const Layer* layers;  // device array
  Matrix embed, lm_head;
  const uint16_t* final_norm;
  const float* rope;  // [max_context][head_dim / 2][2] cosine and sine
  Exchange x;
  State* state;
  float* logits;        // [vocab] of the last token
  int* sampled;         // [tokens] greedy choices of this launch
  unsigned* fault;      // host memory: the stage that waited in vain
  long long* timeline;  // [stages][kParts] cycles of block 0, or null
  Layout layout;
  int num_layers, tokens, cache_stride, blocks, splits;
  float eps;
};

enum Part { kInput, kWeights, kProducts, kEnd, kParts };
enum Stage {
  kQkv,
  kAttention,
  kCombine,
  kOutput,
  kRouter,
  kSelect,
  kGateUp,
  kDown,
  kLmHead,
  kEmbed,
  kStages
};
constexpr const char* kStageNames[kStages] = {
    "qkv",        "attention",   "attention_combine", "o_proj",  "moe_router",
    "moe_select", "moe_gate_up", "moe_down",          "lm_head", "embed"};

struct Range {
  int begin, end;
};
MOEFUSE_BOTH constexpr Range share(int total, int block, int blocks) {
  return {total * block / blocks, total * (block + 1) / blocks};
}

// bytes of one tile: 8 rows of K nibbles, then their scales and biases
MOEFUSE_BOTH constexpr uint32_t weight_bytes(int K) {
  return kTileRows * K / 2;
}
MOEFUSE_BOTH constexpr uint32_t scale_bytes(int K) {
  return kTileRows * K / kGroupSize * 2;
}
MOEFUSE_BOTH constexpr uint32_t tile_bytes(int K) {
  return weight_bytes(K) + 2 * scale_bytes(K);
}

// Shapes are compile-time: the units of every stage then unroll. One line per model geometry.
template <int kHidden_, int kQHeads_, int kKvHeads_, int kExperts_, int kTopK_, int kWidth_,
          int kVocab_>
struct Geometry {
  static constexpr int kHidden = kHidden_, kQHeads = kQHeads_, kKvHeads = kKvHeads_;
  static constexpr int kHeadDim = 128, kExperts = kExperts_, kTopK = kTopK_, kWidth = kWidth_;
  static constexpr int kVocab = kVocab_, kContext = kQHeads * kHeadDim;
  static constexpr int kQkvRows = (kQHeads + 2 * kKvHeads) * kHeadDim;
  static constexpr int kItems = kTopK * kWidth / kTileRows;  // gate/up tile pairs of a token
  static_assert(kQHeads == 8 * kKvHeads, "the mma tile of attention holds eight heads");
  static_assert(kHidden % kSlice == 0 && kWarps % (kHidden / kSlice) == 0);
  static_assert(kContext % kSlice == 0 && kWarps % (kContext / kSlice) == 0);
  static_assert(kWidth % kSlice == 0 && kWarps % kTopK == 0 && kExperts % 32 == 0);
};
using Qwen3_30B_A3B = Geometry<2048, 32, 4, 128, 8, 768, 151936>;
// small enough for the host emulator; every stage keeps its shape
using TinyMoe = Geometry<512, 8, 1, 32, 8, 256, 1024>;

}  // namespace moefuse::cuda
