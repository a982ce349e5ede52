// Every kernel text for the emulator, and a check of its buffers' sizes.
#pragma once

#include <cstddef>

#include "dialect_host.h"

#ifndef EMULATED_KERNELS  // a test of more texts than these has included its own
#define EMULATED_KERNELS MOEFUSE_KERNELS
#define DEVICE_FUNCTION
#define IN(type, name, count) emulator::Pointer<const type> name;
#define OUT(type, name, count) emulator::Pointer<type> name;
#include "callables.h"
#undef IN
#undef OUT
#endif

namespace kernels {

struct Sizes {
  size_t rows = 1, capacity = 0, batches = 0, sequences = 1;
};

inline void expect_size(const char* name, size_t got, size_t expected) {
  if (got != expected) {
    throw emulator::Error(std::string(name) + ": expected " + std::to_string(expected) +
                          " elements, got " + std::to_string(got));
  }
}

// check_sizes(kernel, sizes): every buffer holds exactly what its signature says.
#define TYPE(name)
#define INT(name) [[maybe_unused]] constexpr int name = Params::name;
#define BOOL(name) [[maybe_unused]] constexpr bool name = Params::name;
#define IN(type, name, count) expect_size(#name, kernel.name.size(), count);
#define OUT IN
#define SIZES(name, signature)                                                \
  template <class Params>                                                     \
  void check_sizes(const name<Params>& kernel, const Sizes& sizes) {          \
    [[maybe_unused]] const auto [rows, capacity, batches, sequences] = sizes; \
    signature                                                                 \
  }

EMULATED_KERNELS(SIZES)

#undef SIZES
#undef TYPE
#undef INT
#undef BOOL
#undef IN
#undef OUT
}  // namespace kernels
