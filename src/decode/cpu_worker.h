// One thread of the CPU step: what all threads share, what each keeps to itself, and a method for
// each stage of a plan. The methods are in cpu_projection.inl, cpu_attention.inl and cpu_mlp.inl.
#pragma once

#include "cpu/moe_router.h"
#include "cpu/tiles.h"
#include "decode/cpu_step.h"
#include "decode/lines.h"

namespace moefuse {

constexpr int kBlock = 64;  // rows of a matrix in a block: some 70 kB, two microseconds of reading
// Where a task reads several matrices in turn: rows of each, enough for a stream to get going.
constexpr int kWideBlock = 256;

// Buffers between the stages, [rows, ...] each.
template <class A>
struct CpuStep<A>::Shared {
  Shared(const Plan& plan, Accumulate accumulate, int threads);

  Team team;
  Accumulate accumulate;
  cpu::Dot dot;
  cpu::Dtype cache_dtype;
  CacheShape cache_shape;
  std::vector<StepRow> rows;
  std::vector<CacheView> caches;
  A* logits = nullptr;

  std::vector<A> hidden;      // hidden_size
  Lines<A> q, k, v;           // projections; MLA: compressed query, latent with rotary key, unused
  Lines<A> q_latent, q_rope;  // MLA: heads * latent_dim, heads * rope_dim
  std::vector<A> attended;    // what the output projection takes
  std::vector<A> latents;     // MLA: heads * latent_dim
  std::vector<A> router_logits;  // experts
  std::vector<A> inner;          // [rows * top_k sorted by expert, width], or dense [rows, width]
  std::vector<A> shared_inner;   // of the shared expert
  std::vector<float> partial;    // attention over one chunk: see cpu_attention.inl
  RopeTable<A> rope;
};

template <class A>
class CpuStep<A>::Worker {
 public:
  Worker(const Plan& plan, Shared& shared, int thread);

  void set_layer(int layer) { layer_ = layer; }
  void run(const Embed& s);
  void run(const GroupedProjection& s);
  void run(const GroupedAttention& s);
  void run(const LatentProjection& s);
  void run(const LatentQuery& s);
  void run(const LatentAttention& s);
  void run(const LatentOutput& s);
  void run(const OutputProjection& s);
  void run(const Router& s);
  void run(const ExpertsGateUp& s);
  void run(const ExpertsDown& s);
  void run(const DenseGateUp& s);
  void run(const DenseDown& s);
  void run(const Head& s);

 private:
  struct Product {  // y[r * w.rows + n] = (w x_r)[n]
    cpu::QuantizedMatrix w;
    A* y;
  };

  int rows() const { return static_cast<int>(shared_.rows.size()); }
  void norm(const Norm& norm, const A* x, A* out) const;
  // Normed hidden states of all rows, as this thread's inputs.
  Inputs<A>& normed(const Norm& norm);
  void products(Inputs<A>& x, std::initializer_list<Product> list);
  void add_products(Inputs<A>& x, const Matrix& w);  // hidden += w x
  void gate_up(Inputs<A>& x, int first, int count, const cpu::QuantizedMatrix& gate,
               const cpu::QuantizedMatrix& up, A* out, int begin, int end,
               const cpu::Ahead& next = {});

  // The rows of the cache that row r attends to.
  cpu::RowsArgs cached(bool keys, int r, int head) const;
  void append(bool keys, int r, int head, const A* x) const;
  // The two ways to attend: keys and queries come in one part, or two for MLA.
  struct Part {
    bool keys;         // in the cache's keys, else its values
    const A* queries;  // [rows, heads, dim], scaled
  };
  void attend(std::initializer_list<Part> parts, bool values_in_keys, int heads, A* out);
  void attend_exact(std::initializer_list<Part> parts, bool values_in_keys, int heads, int task,
                    A* out);
  void attend_chunk(std::initializer_list<Part> parts, bool values_in_keys, int heads, int task);
  // One part of the chunk at hand: its rows, the queries of the first of its heads.
  struct ChunkPart {
    cpu::RowsArgs keys;
    const float* queries;
  };
  const cpu::Tiles* tiles_for(const cpu::RowsArgs& values, int count) const;
  void score(int count, int slots);
  void score_on_tiles(const cpu::Tiles& tiles, int count, int slots, int group);
  void merge_chunks(int heads, int dim, int task, A* out) const;
  int chunks() const;  // of the longest row

  void route(const Router& s);
  void combine_experts(const ExpertsDown& s, int begin, int end);

  const ModelConfig& config_;
  Shared& shared_;
  Team& team_;
  const int thread_;
  int layer_ = -1;
  Inputs<A> x_, inner_, shared_inner_;
  std::vector<A> normed_, scratch_, down_, scores_;
  Lines<float> queries_, floats_, sums_;
  std::vector<ChunkPart> chunk_parts_;
  std::vector<cpu::TilePart> tile_parts_;
  Lines<char> tile_queries_;
  int tile_group_ = -1;  // whose queries these are
  // The routing of this layer's rows, the same in every thread.
  cpu::Slots slots_;
  std::vector<uint32_t> experts_;
  std::vector<float> expert_weights_;
  cpu::CombineSteps combine_;
};

}  // namespace moefuse
