#include "cuda/cuda_step.h"

#include <algorithm>
#include <cstdlib>

#include "metal/step_limits.h"
#include "ops/checks.h"
#include "ops/sample_greedy.h"

namespace moefuse::cuda {

namespace {

std::vector<mx::array> arrays_of(const std::vector<LayerCache>& caches) {
  std::vector<mx::array> arrays;
  for (const LayerCache& c : caches) arrays.insert(arrays.end(), {c.keys, c.values});
  return arrays;
}

std::vector<void*> addresses_of(const std::vector<LayerCache>& caches) {
  std::vector<void*> addresses;
  for (const LayerCache& c : caches)
    addresses.insert(addresses.end(), {address(c.keys), address(c.values)});
  return addresses;
}

// Other devices have other clusters and other shared memory: nobody has run these kernels there.
bool tensor_wanted() {
  const char* wish = std::getenv("MOEFUSE_CUDA_TENSOR");
  return capability() == 90 && !(wish && std::string(wish) == "0");
}

}  // namespace

CudaStep::CudaStep(const Plan& plan, Accumulate accumulate)
    : plan_(plan),
      accumulate_(accumulate),
      routers_([](const metal::Call& call) { return metal::launch(call, mx::Device::gpu); }),
      tensor_(tensor_wanted() && tensor_refusal(plan).empty()) {
  if (!tensor_) metal::check_limits(plan_);
}
// Steps whose results nobody waited for still write to what goes with the graphs.
CudaStep::~CudaStep() {
  try {
    wait();
  } catch (const std::exception&) {  // the next call on that stream meets it too
  }
}

// The graph of this many rows and stretches, on these caches.
Replay& CudaStep::recorded(int rows, int longest, bool greedy,
                           const std::vector<LayerCache>& caches) {
  const int splits = cache_splits(plan_.config, longest);
  std::unique_ptr<Replay>& found = recorded_[{rows, splits, greedy}];
  if (found) {
    if (auto addresses = addresses_of(caches); addresses != found->borrowed()) {
      wait();
      found->borrow(addresses);
    }
    return *found;
  }
  auto replay = std::make_unique<Replay>(rows, metal::rope_of(plan_).dims);
  const metal::WalkInputs inputs = {rows, caches, replay->tokens(), replay->places(),
                                    replay->angles()};
  const auto add = [&](const metal::Call& call) { return replay->add(call); };
  mx::array result{0};
  if (tensor_ && rows <= kTensorRows) {
    result = TensorWalk(plan_, accumulate_, constants_, routers_, inputs, add, multiprocessors(),
                        splits, greedy)
                 .walk();
  } else {
    result = metal::Walk(plan_, accumulate_, constants_, inputs, add).walk();
    if (greedy) result = sample_by_parts(result, add);
  }
  replay->record(result, arrays_of(caches));
  found = std::move(replay);
  return *found;
}

mx::array CudaStep::run(const std::vector<StepRow>& rows, const std::vector<LayerCache>& caches,
                        const std::optional<mx::array>& tokens, bool greedy) {
  metal::check_rows(rows, caches);
  ++calls_;
  const mx::Stream s = mx::default_stream(mx::Device::gpu);
  if (stream_ && stream_->index != s.index) wait();
  stream_ = s;
  int longest = 0;
  for (const StepRow& row : rows) longest = std::max(longest, row.slot - row.first);
  Replay& replay = recorded(static_cast<int>(rows.size()), longest, greedy, caches);
  const auto ids = metal::tokens_of(rows);
  const auto places = metal::places_of(rows, caches[0].keys.shape(2));
  const auto angles = metal::angles_of(rows, metal::rope_of(plan_));
  Feed feed;
  std::copy(ids.begin(), ids.end(), feed.tokens);
  std::copy(places.begin(), places.end(), feed.places);
  std::copy(angles.begin(), angles.end(), feed.angles);
  return replay.run(feed, tokens);
}

void CudaStep::wait() {
  if (stream_) mx::synchronize(*stream_);
}

std::map<std::string, std::pair<int, double>> CudaStep::kernel_times(int rows) {
  const auto found = recorded_.lower_bound({rows, 0, false});
  if (found == recorded_.end() || std::get<0>(found->first) != rows || !found->second)
    fail("step", "rows", "a step of as many rows before", std::to_string(rows));
  wait();
  return found->second->times();
}

}  // namespace moefuse::cuda
