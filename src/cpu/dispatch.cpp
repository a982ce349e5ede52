// Picks the kernel table once, by what the processor has.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "cpu/tables.h"
#include "cpu/tiles.h"

#ifdef MOEFUSE_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moefuse::cpu {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables;
#ifdef MOEFUSE_HAS_AVX512
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(&kKernels_avx512);
#endif
#ifdef MOEFUSE_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    tables.push_back(&kKernels_avx2);
#endif
#ifdef MOEFUSE_HAS_NEON
  tables.push_back(&kKernels_neon);
#endif
  tables.push_back(&kKernels_plain);
  return tables;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    auto tables = available_kernels();
    const char* wanted = std::getenv("MOEFUSE_ISA");
    if (!wanted || !*wanted) return *tables.front();
    std::string names;
    for (const Kernels* table : tables) {
      if (std::string(wanted) == table->isa) return *table;
      names += std::string(names.empty() ? "" : ", ") + table->isa;
    }
    throw std::invalid_argument("[moefuse] MOEFUSE_ISA: expected one of " + names + ", got " +
                                wanted);
  }();
  return chosen;
}

#ifdef MOEFUSE_HAS_TILES
extern const Tiles kTiles;

const Tiles* tiles() {
  static const Tiles* const chosen = []() -> const Tiles* {
    constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;  // of EDX; AVX512_BF16 of EAX
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0, more = 0;
    const char* wanted = std::getenv("MOEFUSE_ISA");
    if ((wanted && *wanted) || available_kernels().front() != &kKernels_avx512) return nullptr;
    if (!__get_cpuid_count(7, 1, &more, &ebx, &ecx, &edx) || !(more & 1u << 5)) return nullptr;
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    if (!(edx & kBfloat16) || !(edx & kTile)) return nullptr;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? &kTiles : nullptr;
  }();
  return chosen;
}
#else
const Tiles* tiles() {
  return nullptr;
}
#endif

int num_threads() {
  static const int threads = [] {
    if (const char* text = std::getenv("MOEFUSE_NUM_THREADS"); text && *text) {
      char* end = nullptr;
      long n = std::strtol(text, &end, 10);
      if (*end || n < 1 || n > 1024)
        throw std::invalid_argument(
            std::string("[moefuse] MOEFUSE_NUM_THREADS: expected 1 to 1024, got ") + text);
      return static_cast<int>(n);
    }
    return processors();
  }();
  return threads;
}

void check_settings() {
  kernels();
  num_threads();
}

}  // namespace moefuse::cpu
