// The decode step on CUDA as one graph of our own: the calls of an executor are noted once,
// compiled together and captured; a token is then one launch of the graph on MLX's stream. Only the
// tokens, the rows' places and their rotary angles change from one launch to the next.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cuda/stream.h"
#include "cuda/turns.h"
#include "metal/launch.h"

namespace moefuse::cuda {

namespace mx = mlx::core;

constexpr int kMaxFeedRows = 8, kMaxAngles = 256;

// What changes from step to step, as a kernel's argument; its text repeats this layout.
struct Feed {
  uint32_t tokens[kMaxFeedRows], places[kMaxFeedRows * 4];
  float angles[kMaxFeedRows * kMaxAngles];
};

// True where this MLX's stream can be reached and the variable MOEFUSE_CUDA_GRAPH is not 0.
bool can_replay();

// What NVRTC would be given for these calls, the last of which gives the result: CUDA source with a
// function for each text. For compilers on machines without a GPU.
std::string source_of(const std::vector<metal::Call>& calls);

class Replay {
 public:
  // angles: floats of each row's rotary table, at most kMaxAngles.
  Replay(int rows, int angles);
  ~Replay();
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  const mx::array& tokens() const { return tokens_; }
  const mx::array& places() const { return places_; }
  const mx::array& angles() const { return angles_; }

  // Notes a call. Its outputs live as long as the replay, in device memory.
  std::vector<mx::array> add(const metal::Call& call);
  // Compiles and captures. `result`, an output of add(), is what run() returns; of `borrowed` (the
  // caches) no reference is kept: they have to live and stay in place while the graph is used.
  void record(const mx::array& result, const std::vector<mx::array>& borrowed);
  // Where the borrowed arrays lie for the graph, and others of their dtypes in their stead, as each
  // generation brings its own: half a millisecond, where recording anew takes 22. Nothing that was
  // launched may still run.
  const std::vector<void*>& borrowed() const { return addresses_; }
  void borrow(const std::vector<void*>& addresses);

  // Launched on MLX's default GPU stream, not waited for; evaluating the result only takes note of
  // it. tokens: on the device, [rows] uint32, in the place of the feed's; those of a step that is
  // on its way need not be evaluated.
  mx::array run(const Feed& feed, const std::optional<mx::array>& tokens);

  // Microseconds of each kernel's calls, all calls of one name behind each other: {calls, us each}.
  std::map<std::string, std::pair<int, double>> times();

 private:
  struct Node {
    metal::Call call;
    std::vector<mx::array> outputs;
    int result = -1;  // the output that goes where the feed says
    Function function = nullptr;
    std::vector<void*> arguments;
  };
  struct Use {
    size_t node, argument, array;
  };
  static int shared_bytes(const Node& node, int blocks);
  int common_shared_bytes();
  void split_memory();
  void launch_node(Node& node, Stream stream);
  void capture();
  void enqueue(const Feed& feed, const std::vector<mx::array>& tokens, const mx::array& result,
               Stream stream);
  mx::array in_flight(const mx::array& tokens, mx::Stream s) const;

  int rows_, width_;
  bool overlap_;
  mx::array tokens_, places_, angles_, result_at_;
  mx::Shape shape_;  // of a result, and arrays for it
  std::optional<Turns> results_;
  std::vector<Node> nodes_;
  std::vector<void*> addresses_;  // of the borrowed arrays
  std::vector<Use> uses_;         // of them by the nodes
  Function feed_ = nullptr;
  Executable graph_ = nullptr;
};

}  // namespace moefuse::cuda
