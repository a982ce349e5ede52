#include "ops/sample_greedy.h"

#include "mlx/backend/cuda/cuda.h"
#include "ops/checks.h"

namespace moefuse {

namespace {

constexpr const char* kOp = "sample_greedy";
constexpr int kThreads = 256, kPart = 2048;  // as in cuda/kernels/sample_greedy_parts.body

}  // namespace

mx::array sample_by_parts(const mx::array& logits, const metal::Walk::Launcher& launcher) {
  const int n = logits.shape(-1), rows = static_cast<int>(logits.size() / n);
  const int parts = metal::blocks(n, kPart);
  const auto best = launcher({&metal::kernel_text("sample_greedy_parts"),
                              {logits},
                              {logits.dtype(), n},
                              {{rows, parts}, {rows, parts}},
                              {mx::uint32, mx::uint32},
                              {parts, rows, 1},
                              kThreads});
  return launcher({&metal::kernel_text("sample_greedy"),
                   {best[0], best[1]},
                   {parts},
                   {{logits.shape().begin(), logits.shape().end() - 1}},
                   {mx::uint32},
                   {rows, 1, 1},
                   32})[0];
}

mx::array sample_greedy(const mx::array& logits, mx::StreamOrDevice s) {
  check_float(kOp, "logits", logits);
  if (logits.ndim() < 1 || logits.size() == 0)
    fail(kOp, "logits", "[..., V] with at least one number", describe(logits.shape()));
  if (!metal::serves(s) || !(mx::cu::is_available() || metal::emulated()))
    return mx::argmax(logits, -1, false, s);
  count(kOp, "cuda");
  return sample_by_parts(row_contiguous(logits, s),
                         [&](const metal::Call& call) { return metal::launch(call, s); });
}

}  // namespace moefuse
