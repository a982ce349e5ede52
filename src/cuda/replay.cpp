#include "cuda/replay.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "metal/kernel_table.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/primitives.h"

// Of MLX's CUDA wheel for Linux; other wheels do not have them.
#ifdef __linux__
namespace mlx::core::cu {
class CommandEncoder {
 public:
  __attribute__((weak)) void commit();
};
__attribute__((weak)) CommandEncoder& get_command_encoder(Stream s);
}  // namespace mlx::core::cu
#endif

namespace moefuse::cuda {

namespace {

// mlx/backend/cuda/device.h: a CommandEncoder begins with a reference to its Device and the handle
// of its stream.
struct EncoderHead {
  void* device;
  Stream stream;
};

bool reachable() {
#ifdef __linux__
  return &mx::cu::get_command_encoder != nullptr;
#else
  return false;
#endif
}

// The CUDA stream of an MLX stream, after everything that MLX holds back for it is on its way.
Stream flushed(mx::Stream s) {
#ifdef __linux__
  auto& encoder = mx::cu::get_command_encoder(s);
  encoder.commit();
  return reinterpret_cast<EncoderHead*>(&encoder)->stream;
#else
  throw std::runtime_error("[cuda step] expected Linux");
#endif
}

const char* type_name(mx::Dtype dtype) {
  if (dtype == mx::bfloat16) return "bfloat16_t";
  if (dtype == mx::float16) return "float16_t";
  if (dtype == mx::float32) return "float";
  if (dtype == mx::uint32) return "uint";
  throw std::invalid_argument("[cuda step] dtype: expected a float or uint32, got another");
}

const char* const kFeedText = R"(
struct Feed { uint tokens[8], places[32]; float angles[8 * 256]; };
extern "C" __global__ void feed(const uint* given, Feed f, uint rows, uint width, uint* tokens,
                                uint* places, float* angles) {
  uint t = threadIdx.x;
  if (t < rows) tokens[t] = given ? given[t] : f.tokens[t];
  if (t < 4 * rows) places[t] = f.places[t];
  for (uint i = t; i < rows * width; i += blockDim.x) angles[i] = f.angles[i];
}
)";

// A kernel's text behind its name: parameters, template arguments as constants, body.
std::string text_of(const metal::Call& call) {
  const metal::KernelText& k = *call.kernel;
  std::string text = "(";
  for (size_t i = 0; i < call.inputs.size(); ++i)
    text +=
        std::string("const ") + type_name(call.inputs[i].dtype()) + "* " + k.input_names[i] + ", ";
  for (size_t i = 0; i < call.dtypes.size(); ++i)
    text += std::string(i ? ", " : "") + type_name(call.dtypes[i]) + "* " + k.output_names[i];
  text += ") {\n";
  for (size_t i = 0; i < call.args.size(); ++i) {
    const auto& arg = call.args[i];
    const std::string& name = k.template_names[i];
    if (auto* type = std::get_if<mx::Dtype>(&arg))
      text += "using " + name + " = " + type_name(*type) + ";\n";
    else if (auto* n = std::get_if<int>(&arg))
      text += "constexpr int " + name + " = " + std::to_string(*n) + ";\n";
    else
      text += "constexpr bool " + name + " = " + (std::get<bool>(arg) ? "true" : "false") + ";\n";
  }
  return text + (k.waits ? "" : "wait_for_inputs();\n") + k.cuda_body + "}\n";
}

// Functions by their text, for all models of the process.
std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> built;
  return built;
}

// A function's key: its attributes on a line, then its text.
std::string key_of(const metal::Call& call) {
  const int cluster = call.kernel->cluster;
  const std::string dims =
      cluster > 1 ? "__cluster_dims__(" + std::to_string(cluster) + ", 1, 1)" : "";
  return dims + " __launch_bounds__(" + std::to_string(call.threads) + ", " +
         std::to_string(call.resident) + ") \n" + text_of(call);
}

std::string assemble(const std::vector<std::string>& keys, const std::vector<std::string>& names) {
  std::string source = metal::cuda_header();
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto end = keys[i].find('\n');
    source += keys[i] == kFeedText ? keys[i]
                                   : "extern \"C\" __global__ void " + keys[i].substr(0, end) +
                                         names[i] + keys[i].substr(end + 1);
  }
  return source;
}

std::vector<std::string> names_of(const std::vector<std::string>& keys) {
  std::vector<std::string> names;
  names.reserve(keys.size());
  for (const std::string& key : keys)
    names.push_back(key == kFeedText ? "feed" : "kernel" + std::to_string(names.size()));
  return names;
}

void compile_missing(const std::set<std::string>& keys) {
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  std::vector<std::string> missing;
  for (const std::string& key : keys)
    if (!functions().count(key)) missing.push_back(key);
  if (missing.empty()) return;
  const auto names = names_of(missing);
  const std::vector<Function> built = compile(assemble(missing, names), names);
  for (size_t i = 0; i < missing.size(); ++i) functions()[missing[i]] = built[i];
}

mx::array device_zeros(const mx::Shape& shape, mx::Dtype dtype) {
  return mx::zeros(shape, dtype, mx::Device::gpu);
}

}  // namespace

// One launch in MLX's graph, so that what follows waits for it.
class StepNode : public mx::Primitive {
 public:
  StepNode(mx::Stream s, Replay& replay, const Feed& feed)
      : mx::Primitive(s), replay_(replay), feed_(feed) {}
  void eval_cpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("[cuda step] runs on a GPU only");
  }
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    replay_.enqueue(feed_, inputs, flushed(stream()));
    replay_.copy_->eval_gpu({*replay_.result_}, outputs);
  }
  const char* name() const override { return "MoefuseStep"; }

 private:
  Replay& replay_;
  Feed feed_;
};

// mlx/backend/cuda/allocator.h: a buffer begins with its address.
void* address(const mx::array& a) {
  auto buffer = a.buffer();
  return *static_cast<char**>(buffer.ptr()) + a.offset();
}

std::string source_of(const std::vector<metal::Call>& calls) {
  std::set<std::string> keys = {kFeedText};
  for (const metal::Call& call : calls) keys.insert(key_of(call));
  const std::vector<std::string> list(keys.begin(), keys.end());
  return assemble(list, names_of(list));
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
      angles_(device_zeros({rows, angles}, mx::float32)) {
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
  Node node{call, {}, nullptr, {}};
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
  std::vector<mx::array> needed = {tokens_, places_, angles_};
  std::set<std::string> texts = {kFeedText};
  for (Node& node : nodes_) {
    texts.insert(key_of(node.call));
    needed.insert(needed.end(), node.call.inputs.begin(), node.call.inputs.end());
    needed.insert(needed.end(), node.outputs.begin(), node.outputs.end());
  }
  mx::eval(needed);
  needed.clear();
  mx::synchronize(mx::default_stream(mx::Device::gpu));
  compile_missing(texts);
  feed_ = functions().at(kFeedText);
  std::map<std::uintptr_t, size_t> not_ours;
  for (const mx::array& a : borrowed) {
    not_ours[a.id()] = addresses_.size();
    addresses_.push_back(address(a));
  }
  for (size_t n = 0; n < nodes_.size(); ++n) {
    Node& node = nodes_[n];
    node.function = functions().at(key_of(node.call));
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

  result_ = result;
  auto copy = mx::fast::cuda_kernel(
      "moefuse_copy", {"from"}, {"to"},
      "unsigned i = blockIdx.x * blockDim.x + threadIdx.x; if (i < N) to[i] = from[i];");
  const int size = static_cast<int>(result.size());
  copy_ =
      copy({result}, {result.shape()}, {result.dtype()}, {(size + 255) / 256 * 256, 1, 1},
           {256, 1, 1}, {{"N", size}}, std::nullopt, false, mx::default_stream(mx::Device::gpu))[0]
          .primitive_ptr();
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

void Replay::enqueue(const Feed& feed, const std::vector<mx::array>& tokens, Stream stream) {
  make_current();
  void* given = tokens.empty() ? nullptr : address(tokens[0]);
  void* to[] = {address(tokens_), address(places_), address(angles_)};
  unsigned rows = rows_, width = width_;
  void* arguments[] = {&given, const_cast<Feed*>(&feed), &rows, &width, &to[0], &to[1], &to[2]};
  launch(feed_, {{1, 1, 1}, 256}, arguments, stream, false, "feed");
  launch(graph_, stream);
}

mx::array Replay::run(const Feed& feed, const std::optional<mx::array>& tokens) {
  const mx::Stream s = mx::default_stream(mx::Device::gpu);
  std::vector<mx::array> inputs;
  if (tokens) inputs.push_back(*tokens);
  auto logits = mx::array::make_arrays({result_->shape()}, {result_->dtype()},
                                       std::make_shared<StepNode>(s, *this, feed), inputs)[0];
  mx::async_eval(logits);
  return logits;
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
