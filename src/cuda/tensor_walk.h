// The walk with CUDA's own kernel texts (cuda/kernels): 4-bit matrices in groups of 64 on the
// integer tensor cores, attention by clusters. It takes a plan as a whole or not at all; what it
// does not take goes through the texts that Metal has too.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "metal/walk.h"

namespace moefuse::cuda {

// Rows that a kernel takes at once: it reads its weights once for all of them.
constexpr int kTensorRows = 4;

// Empty where the walk takes the plan, else what it does not: "layers.3, qkv: group_size 32".
std::string tensor_refusal(const Plan& plan);

// How many clusters side by side share a cache of so many positions: kernels/stretches.h.
int cache_splits(const ModelConfig& config, int cached);

// Of each layer that has a router, its gate, its norm's gains and the output projection in front of
// it as one fp32 matrix, as kernels/route.h says. Made once for a model.
class FoldedRouters {
 public:
  explicit FoldedRouters(metal::Walk::Launcher launcher) : launcher_(std::move(launcher)) {}
  const mx::array& of(int layer, const Router& router, const Matrix& o);

 private:
  metal::Walk::Launcher launcher_;
  std::map<int, mx::array> made_;
};

class TensorWalk : public metal::Walk {
 public:
  // multiprocessors: of the device. splits: stretches that the longest row asks for, as
  // cache_splits() says. greedy: the walk's result is not logits but each row's token, [rows]
  // uint32, where its largest logit stands.
  TensorWalk(const Plan& plan, Accumulate accumulate, metal::Constants& constants,
             FoldedRouters& routers, const metal::WalkInputs& inputs, Launcher launcher,
             int multiprocessors, int splits, bool greedy = false);

 protected:
  using metal::Walk::run;
  void run(const GroupedProjection& s) override;
  void run(const GroupedAttention& s) override;
  void run(const LatentProjection& s) override;
  void run(const LatentQuery& s) override;
  void run(const LatentAttention& s) override;
  void run(const LatentOutput& s) override;
  void run(const OutputProjection& s) override;
  void run(const Router&) override {}  // its logits come with the output projection
  void run(const ExpertsGateUp& s) override;
  void run(const ExpertsDown& s) override;
  void run(const DenseGateUp& s) override;
  void run(const DenseDown& s) override;
  void run(const Head& s) override;

 private:
  // Tiles of 16 rows to a block, and blocks that a multiprocessor has registers for: as few pieces
  // for the busiest one as can be.
  struct Tiling {
    int tiles = 1, resident = 1;
  };
  // Of equal ones the fewest blocks, since each brings its row to the grid for itself, or one tile
  // a block, which is faster where the weights come last.
  Tiling tiling(int tile_count, int slices, int copies = 1, bool many = false) const;
  // Tiles to a block of several rows' experts. Each block chooses its experts and brings its row to
  // the grid anew, which tiles one after the other pay for once: so that all run at once, at most
  // `resident` to a multiprocessor, and the busiest one has the fewest tiles; at most `most`.
  int tiles_at_once(int tile_count, int copies, int resident, int most) const;
  // Blocks for which a multiprocessor has to have registers: two, so that the next kernel's come
  // beside this one's, where neither several rows nor some more warps need them all; nor do 20.
  int beside(int warps) const;
  mx::array project(const mx::array& x, const Norm& norm, const Matrix& a, const Matrix* b,
                    const Matrix* c);
  // `router`: whose logits come with it, or nullptr.
  void add_to_residual(const char* kernel, std::vector<mx::array> inputs, std::vector<Arg> args,
                       const Matrix& m, const Router* router, metal::Groups groups, int warps);
  void add_to_residual(const mx::array& x, const Matrix& m, const Router* router);
  const Router* router_of_layer() const;
  mx::array router_bias();

  FoldedRouters& routers_;
  const int multiprocessors_, splits_;
  const bool greedy_;
  // What the texts are made for: the most that there may be, as a new text takes a second to
  // compile, or one.
  const int most_splits_;
  const Router* router_ = nullptr;  // of the layer
  mx::array router_logits_{0}, row_squares_{0}, latent_query_{0};
};

}  // namespace moefuse::cuda
