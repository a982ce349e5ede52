#include "cuda/replay.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <utility>

#include "cuda/texts.h"
#include "metal/kernel_table.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/primitives.h"

namespace moefuse::cuda {

namespace {

const char* const kFeedText = R"(
struct Feed { uint tokens[8], places[32]; float angles[8 * 256]; };
extern "C" __global__ void @(const uint* given, Feed f, void* result, uint rows, uint width,
                             uint* tokens, uint* places, float* angles, void** result_at) {
  uint t = threadIdx.x;
  if (t == 0) *result_at = result;
  if (t < rows) tokens[t] = given ? given[t] : f.tokens[t];
  if (t < 4 * rows) places[t] = f.places[t];
  for (uint i = t; i < rows * width; i += blockDim.x) angles[i] = f.angles[i];
}
)";

}  // namespace

// A launch that is on its way, in MLX's graph: what is evaluated later on its stream comes behind
// it. One evaluation a token, with what the caller makes of the logits: each puts events on the
// stream, which cost some microseconds.
class StepNode : public mx::Primitive {
 public:
  // kept: the tokens that the launch reads and what it writes stay in memory in any case.
  StepNode(mx::Stream s, mx::array result, bool kept)
      : mx::Primitive(s), result_(std::move(result)), done_(kept) {}
  // Of a result that nobody wanted: the tokens have to live until they were read.
  ~StepNode() override {
    if (done_) return;
    try {
      mx::synchronize(stream());
    } catch (const std::exception&) {  // the next call meets it too
    }
  }
  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[cuda step] runs on a GPU only");
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>& outputs) override {
    outputs[0].copy_shared_buffer(result_, outputs[0].strides(), result_.flags(),
                                  outputs[0].size());
    done_ = true;
  }
  const char* name() const override { return "MoefuseStep"; }
  const mx::array& result() const { return result_; }

 private:
  mx::array result_;
  bool done_;  // nothing is left that has to live until the launch has ended
};

// Evaluated, or on its way in front of what comes next on the stream.
static void ready(mx::array a, mx::Stream s) {
  if (a.status() == mx::array::Status::unscheduled) mx::async_eval(a);
  if (a.event().valid() && a.event().stream() != s) a.wait();
}

std::string source_of(const std::vector<metal::Call>& calls) {
  std::set<std::string> texts = {kFeedText};
  for (const metal::Call& call : calls)
    texts.insert(text_of(call, &call == &calls.back() ? 0 : -1));
  std::vector<std::string> names;
  for (size_t i = 0; i < texts.size(); ++i) names.push_back("kernel" + std::to_string(i));
  return assemble({texts.begin(), texts.end()}, names);
}

bool can_replay() {
  const char* wish = std::getenv("MOEFUSE_CUDA_GRAPH");
  return mx::cu::is_available() && !metal::emulated() && !(wish && std::string(wish) == "0") &&
         reachable();
}

// More than 8 bytes each: MLX keeps smaller ones where the host can reach them.
Replay::Replay(int rows, int angles)
    : rows_(rows),
      width_(angles),
      overlap_(false),
      tokens_(device_zeros({16}, mx::uint32)),
      places_(device_zeros({rows, 4}, mx::uint32)),
      angles_(device_zeros({rows, angles}, mx::float32)),
      result_at_(device_zeros({4}, mx::uint32)) {
  if (rows > kMaxFeedRows || angles > kMaxAngles)
    throw std::invalid_argument("[cuda step] rotary dimensions: expected at most 256, got " +
                                std::to_string(angles));
  const char* wish = std::getenv("MOEFUSE_CUDA_OVERLAP");
  overlap_ = capability() >= 90 && !(wish && std::string(wish) == "0");
}

Replay::~Replay() {
  if (graph_) destroy(graph_);
}

std::vector<mx::array> Replay::add(const metal::Call& call) {
  Node node{call, {}, -1, nullptr, {}};
  for (size_t i = 0; i < call.shapes.size(); ++i)
    node.outputs.push_back(device_zeros(call.shapes[i], call.dtypes[i]));
  nodes_.push_back(node);
  return node.outputs;
}

void Replay::launch_node(Node& node, Stream stream) {
  std::vector<void*> pointers;
  for (void*& argument : node.arguments) pointers.push_back(&argument);
  const auto& g = node.call.groups;
  launch(node.function,
         {{unsigned(g.x), unsigned(g.y), unsigned(g.z)},
          unsigned(node.call.threads),
          unsigned(node.call.shared_bytes)},
         pointers.data(), stream, overlap_, node.call.kernel->name);
}

// Bytes of a multiprocessor's shared memory for so many blocks.
int Replay::shared_bytes(const Node& node, int blocks) {
  constexpr int kOfSystem = 1024;  // of each block
  return blocks * (static_shared(node.function, node.call.kernel->name) + node.call.shared_bytes +
                   kOfSystem);
}

// Bytes of shared memory that all kernels' division has to hold, or 0: each as it likes.
int Replay::common_shared_bytes() {
  constexpr int kMost = 132 * 1024;  // beyond, the others' L1 is too small
  int common = 0;
  for (const Node& node : nodes_) {
    const auto& g = node.call.groups;
    const int cluster = node.call.kernel->cluster, blocks = g.x * g.y * g.z;
    if (cluster > 1) {
      if (rows_ > 1 && g.x > cluster && shared_bytes(node, 2) <= kMost) return 0;
      // A block to a multiprocessor makes room for so many clusters but one: some of the GPU's
      // parts that a cluster must lie in have fewer multiprocessors than it has blocks.
      const int at_once = multiprocessors() / cluster - 1;
      const int bytes = shared_bytes(node, metal::blocks(blocks / cluster, at_once));
      if (bytes <= kMost) common = std::max(common, bytes);
    } else if (node.call.kernel->name == "moefuse_grid_gate_up") {
      common = std::max(common, shared_bytes(node, metal::blocks(blocks, multiprocessors())));
    }
  }
  return common;
}

// A multiprocessor divides its memory between L1, where loads on their way live, and shared memory,
// and has to be empty to divide it anew: kernels that want other parts do not overlap. All get the
// least that holds the blocks of the experts' gate and up, which has most of them, and what lets
// attention's clusters run at once; of several rows also a kernel that does not fit there, which
// divides anew in any case, as much as its own. Where several rows' caches are long, more of
// attention's blocks beside each other are worth more; that must not depend on what was recorded
// before, with the same functions.
void Replay::split_memory() {
  constexpr int kAll = 228 * 1024, kLeast = 7, kAsItLikes = -1;               // bytes, percent
  constexpr int kSteps[] = {8, 16, 32, 64, 100, 132, 164, 196, kAll / 1024};  // of Hopper, in KB
  const int common = common_shared_bytes();
  for (const Node& node : nodes_) {
    if (common == 0) {
      prefer_shared(node.function, kAsItLikes, node.call.kernel->name);
      continue;
    }
    int bytes = common;
    if (rows_ > 1) {
      const int resident = node.call.resident;
      if (resident > 1 && shared_bytes(node, 1) > common) bytes = shared_bytes(node, resident);
      const int* step = std::find_if(std::begin(kSteps), std::end(kSteps) - 1,
                                     [&](int kb) { return kb * 1024 >= bytes; });
      bytes = *step * 1024;
    }
    prefer_shared(node.function, std::max(kLeast, metal::blocks(100 * bytes, kAll)),
                  node.call.kernel->name);
  }
}

void Replay::record(const mx::array& result, const std::vector<mx::array>& borrowed) {
  make_current();
  std::vector<mx::array> needed = {tokens_, places_, angles_, result_at_};
  std::set<std::string> texts = {kFeedText};
  for (Node& node : nodes_) {
    for (size_t i = 0; i < node.outputs.size(); ++i)
      if (node.outputs[i].id() == result.id()) {
        node.result = int(i);
        node.outputs[i] = result_at_;
      }
    texts.insert(text_of(node.call, node.result));
    needed.insert(needed.end(), node.call.inputs.begin(), node.call.inputs.end());
    needed.insert(needed.end(), node.outputs.begin(), node.outputs.end());
  }
  const auto is_result = [](const Node& node) { return node.result >= 0; };
  if (!std::any_of(nodes_.begin(), nodes_.end(), is_result))
    throw std::logic_error("[cuda step] result: expected an output of add(), got another array");
  mx::eval(needed);
  needed.clear();
  mx::synchronize(mx::default_stream(mx::Device::gpu));
  compile_missing(texts);
  feed_ = function_of(kFeedText);
  std::map<std::uintptr_t, size_t> not_ours;
  for (const mx::array& a : borrowed) {
    not_ours[a.id()] = addresses_.size();
    addresses_.push_back(address(a));
  }
  for (size_t n = 0; n < nodes_.size(); ++n) {
    Node& node = nodes_[n];
    node.function = function_of(text_of(node.call, node.result));
    if (node.call.kernel->cluster > 1) allow_clusters(node.function, node.call.kernel->name);
    if (node.call.shared_bytes > 0)
      allow_shared(node.function, node.call.shared_bytes, node.call.kernel->name);
    for (const auto* arrays : {&node.call.inputs, &node.outputs})
      for (const mx::array& a : *arrays) {
        const auto found = not_ours.find(a.id());
        if (found != not_ours.end()) uses_.push_back({n, node.arguments.size(), found->second});
        node.arguments.push_back(address(a));
      }
    std::erase_if(node.call.inputs, [&](const mx::array& a) { return not_ours.count(a.id()) > 0; });
  }
  split_memory();
  capture();
  // MLX keeps 8 bytes and less where the host can reach them. Tokens are read later than logits.
  const bool few = result.nbytes() < 64;
  shape_ = result.shape();
  results_.emplace(few ? mx::Shape{16} : shape_, result.dtype(), few ? 64 : 4);
}

void Replay::capture() {
  static const Stream recorder = make_stream();
  begin_capture(recorder);
  for (Node& node : nodes_) launch_node(node, recorder);
  graph_ = end_capture(recorder, std::exchange(graph_, nullptr));
}

void Replay::borrow(const std::vector<void*>& addresses) {
  make_current();
  for (const Use& use : uses_) nodes_[use.node].arguments[use.argument] = addresses[use.array];
  addresses_.clear();  // of a graph that could not be captured nothing is left
  capture();
  addresses_ = addresses;
}

void Replay::enqueue(const Feed& feed, const std::vector<mx::array>& tokens,
                     const mx::array& result, Stream stream) {
  make_current();
  void* given = tokens.empty() ? nullptr : address(tokens[0]);
  void* into = address(result);
  void* to[] = {address(tokens_), address(places_), address(angles_), address(result_at_)};
  unsigned rows = rows_, width = width_;
  void* arguments[] = {
      &given, const_cast<Feed*>(&feed), &into, &rows, &width, &to[0], &to[1], &to[2], &to[3]};
  launch(feed_, {{1, 1, 1}, 256}, arguments, stream, false, "feed");
  launch(graph_, stream);
}

mx::array Replay::run(const Feed& feed, const std::optional<mx::array>& tokens) {
  const mx::Stream s = mx::default_stream(mx::Device::gpu);
  std::vector<mx::array> inputs;
  if (tokens) inputs.push_back(in_flight(*tokens, s));
  const mx::array result = results_->take();
  enqueue(feed, inputs, result, flushed(s));
  const bool kept = results_->keeps(result) && (!tokens || results_->keeps(inputs[0]));
  return mx::array::make_arrays({shape_}, {result.dtype()},
                                std::make_shared<StepNode>(s, result, kept), inputs)[0];
}

// What this stream has in front of a launch: of a step's result that is not evaluated yet what the
// step writes to, since evaluating it would only take note.
mx::array Replay::in_flight(const mx::array& tokens, mx::Stream s) const {
  if (tokens.status() == mx::array::Status::unscheduled && tokens.has_primitive())
    if (auto* step = dynamic_cast<StepNode*>(&tokens.primitive()))
      if (step->stream() == s) return step->result();
  ready(tokens, s);
  return tokens;
}

std::map<std::string, std::pair<int, double>> Replay::times() {
  using Clock = std::chrono::steady_clock;
  make_current();
  const Stream stream = make_stream();
  std::map<std::string, std::pair<int, double>> list;
  std::set<std::pair<Function, int>> timed;
  for (const Node& first : nodes_) {
    const auto& g = first.call.groups;
    if (!timed.insert({first.function, g.x}).second) continue;
    std::string name =
        first.call.kernel->name + "<" + std::to_string(g.x) + "x" + std::to_string(g.y) + ">";
    while (list.count(name)) name += "'";  // of the same text with other arguments
    begin_capture(stream);
    int calls = 0;
    for (int round = 0; round < 4; ++round)
      for (Node& node : nodes_)
        if (node.function == first.function && node.call.groups.x == first.call.groups.x) {
          launch_node(node, stream);
          ++calls;
        }
    const Executable graph = end_capture(stream, nullptr);
    double best = 1e9;
    for (int round = 0; round < 6; ++round) {
      synchronize(stream);
      const auto start = Clock::now();
      launch(graph, stream);
      synchronize(stream);
      best =
          std::min(best, std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    destroy(graph);
    list[name] = {calls / 4, best / calls};
  }
  return list;
}

}  // namespace moefuse::cuda
