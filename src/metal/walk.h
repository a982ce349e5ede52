// One token's way through a plan's stages as calls of the kernel table: what each stage hands to
// the next. Virtual, so that a device with kernels of its own takes the stages that they are for.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "decode/plan.h"
#include "metal/launch.h"
#include "mlx/backend/cuda/cuda.h"

namespace moefuse::metal {

// Stretches of the cache that work on one head at once, whatever the context: a row's bits may not
// depend on how long another row is. 20 heads make 160 threadgroups of 8 simdgroups.
constexpr int kSplits = 8;

// Numbers that kernels take as arrays, made once.
using Constants = std::map<float, mx::array>;

// tokens [rows], places [rows, 4] and angles [rows, rotary dims]: what the texts take under these
// names.
struct WalkInputs {
  int rows;
  const std::vector<LayerCache>& caches;
  mx::array tokens, places, angles;
};

class Walk {
 public:
  using Launcher = std::function<std::vector<mx::array>(const Call&)>;
  Walk(const Plan& plan, Accumulate accumulate, Constants& constants, const WalkInputs& inputs,
       Launcher launcher);
  virtual ~Walk() = default;

  // Logits [rows, vocab_size] in the dtype of the activations.
  mx::array walk();

 protected:
  using Arg = mx::fast::TemplateArg;

  virtual void run(const Embed& s);
  virtual void run(const GroupedProjection& s);
  virtual void run(const GroupedAttention& s);
  virtual void run(const LatentProjection& s);
  virtual void run(const LatentQuery& s);
  virtual void run(const LatentAttention& s);
  virtual void run(const LatentOutput& s);
  virtual void run(const OutputProjection& s);
  virtual void run(const Router& s);
  virtual void run(const ExpertsGateUp& s);
  virtual void run(const ExpertsDown& s);
  virtual void run(const DenseGateUp& s);
  virtual void run(const DenseDown& s);
  virtual void run(const Head& s);

  const mx::array& constant(float v);
  static void append(std::vector<mx::array>& inputs, const Matrix& m);
  std::vector<mx::array> outputs(const char* name, std::vector<mx::array> inputs,
                                 std::vector<Arg> args, std::vector<mx::Shape> shapes,
                                 std::vector<mx::Dtype> dtypes, Groups groups, int threads,
                                 int shared_bytes = 0, int resident = 1);
  mx::array output(const char* name, std::vector<mx::array> inputs, std::vector<Arg> args,
                   mx::Shape shape, Groups groups, int threads, int resident = 1);

  const Plan& plan;
  const Accumulate accumulate;
  const int rows;
  const std::vector<LayerCache>& caches;
  const mx::Dtype dtype;
  mx::Dtype activations;  // of what one stage hands to the next
  const mx::array tokens, places, angles;

  // MLX keeps a lone float of CUDA's where the host can reach it, which makes every read slow.
  bool wide_constants = mx::cu::is_available();
  int layer = -1;
  const GroupedAttention* grouped = nullptr;
  const LatentQuery* latent = nullptr;
  mx::array hidden{0}, projected{0}, query{0}, partial{0}, stats{0}, attended{0};
  mx::array normed{0}, indices{0}, weights{0}, inner{0};
  mx::array result{0};  // of walk()

 private:
  mx::array project(const mx::array& x, const Norm& norm, const Matrix& a, const Matrix* b,
                    const Matrix* c);
  mx::array add_to_residual(const mx::array& x, const Matrix& m);

  Constants& constants_;
  Launcher launcher_;
  int top_k_ = 0;
};

// The family has one rotary embedding, the same in every layer.
const Rope& rope_of(const Plan& plan);
std::vector<uint32_t> tokens_of(const std::vector<StepRow>& rows);
// Sequence, first slot, newest slot and capacity of each row.
std::vector<uint32_t> places_of(const std::vector<StepRow>& rows, int capacity);
// (cos, sin) of each row's position for each pair.
std::vector<float> angles_of(const std::vector<StepRow>& rows, const Rope& rope);
// Throws std::invalid_argument on two rows of one sequence or a cache past 32-bit places.
void check_rows(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches);

const char* router_kernel(const Router& s);
const char* gate_up_kernel(const ExpertsGateUp& s);

}  // namespace moefuse::metal
