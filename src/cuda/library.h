// Functions of libraries that are found at run time: neither a toolkit nor its headers are needed
// to build.
#pragma once

#include <dlfcn.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace moefuse::cuda {

// The first of `names` that there is. Throws std::runtime_error naming the first.
inline void* library(std::initializer_list<const char*> names) {
  for (const char* name : names)
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
  throw std::runtime_error(std::string("[cuda] ") + *names.begin() + ": not found");
}

template <class F>
F symbol(void* handle, const char* name) {
  void* found = dlsym(handle, name);
  if (!found) throw std::runtime_error(std::string("[cuda] ") + name + ": not in the library");
  return reinterpret_cast<F>(found);
}

}  // namespace moefuse::cuda

// A member of a struct that has `handle`: the library's function of that name, which returns 0
// where all went well.
#define MOEFUSE_ENTRY(name, symbol_name, ...) \
  int (*name)(__VA_ARGS__) = ::moefuse::cuda::symbol<int (*)(__VA_ARGS__)>(handle, symbol_name)
