#include "decode/read_bandwidth.h"

#include <atomic>
#include <chrono>
#include <memory>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "ops/checks.h"

namespace moefuse {

double read_bandwidth(int64_t bytes) {
  if (bytes <= 0) fail("read_bandwidth", "bytes", "a positive number", std::to_string(bytes));
  constexpr int64_t kEnough = int64_t{1} << 30, kMost = 1000;
  const auto data = std::make_unique<char[]>(bytes);
  cpu::use_huge_pages(data.get(), bytes);
  const cpu::Kernels& table = cpu::kernels();
  std::atomic<uint32_t> kept{0};
  double best = 0;
  for (int64_t pass = 0; pass < 5 || (pass < kMost && pass * bytes < kEnough); ++pass) {
    const auto start = std::chrono::steady_clock::now();
    cpu::parallel_for(bytes, [&](int64_t begin, int64_t end) {
      kept.fetch_xor(table.read(data.get() + begin, end - begin), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(bytes) / seconds.count());
  }
  return best;
}

}  // namespace moefuse
