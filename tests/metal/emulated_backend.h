// Runs the host side's calls in the emulator: the same inputs, template arguments and grid that
// would go to fast::metal_kernel. A kernel is run for the template arguments that a test registers.
#pragma once

#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "metal/launch.h"

namespace emulated {

namespace mx = mlx::core;
using emulator::Buffer;
using moefuse::metal::Call;

template <typename T>
mx::Dtype dtype_of() {
  if constexpr (std::is_same_v<T, float>) return mx::float32;
  if constexpr (std::is_same_v<T, bfloat16_t>) return mx::bfloat16;
  if constexpr (std::is_same_v<T, float16_t>) return mx::float16;
  return mx::uint32;
}

template <typename T>
Buffer<T> read(const Call& call, size_t i) {
  mx::array a = mx::contiguous(call.inputs[i]);
  a.eval();
  if (a.dtype() != dtype_of<T>()) {
    throw emulator::Error(call.kernel->name + ": input " + call.kernel->input_names[i] +
                          " has another dtype than its signature");
  }
  return Buffer<T>(std::vector<T>(a.data<T>(), a.data<T>() + a.size()));
}

template <typename T>
mx::array to_array(const Buffer<T>& b, const mx::Shape& shape, mx::Dtype dtype) {
  if (b.unwritten() != 0) throw emulator::Error("an output is not written in full");
  if (dtype != dtype_of<T>()) throw emulator::Error("an output has another dtype");
  return mx::array(b.values().begin(), shape, dtype);
}

// What the kernel wrote into an input goes back into the array's own memory (the KV cache).
template <typename T>
void write_back(const Buffer<T>& b, const mx::array& a) {
  const void* now = b.values().data();
  if (std::memcmp(a.data<T>(), now, a.nbytes()) == 0) return;
  std::memcpy(const_cast<T*>(a.data<T>()), now, a.nbytes());
}

// match_NAME<Params>(call): the call's template arguments are those of Params, in order.
#define TYPE(name) \
  same &= std::get<mx::Dtype>(call.args.at(next++)) == dtype_of<typename Params::name>();
#define INT(name) same &= std::get<int>(call.args.at(next++)) == Params::name;
#define BOOL(name) same &= std::get<bool>(call.args.at(next++)) == Params::name;
#define IN(type, name, count)
#define OUT(type, name, count)
#define MATCH(name, signature)                         \
  template <class Params>                              \
  bool match_##name(const Call& call) {                \
    size_t next = 0;                                   \
    bool same = true;                                  \
    signature return same && next == call.args.size(); \
  }
EMULATED_KERNELS(MATCH)
#undef MATCH
#undef TYPE
#undef INT
#undef BOOL
#undef IN
#undef OUT

// store_NAME<Params>: a buffer for each argument of the call.
#define TYPE(name) using name = typename Params::name;
#define INT(name)
#define BOOL(name)
#define IN(type, name, count) Buffer<type> name = read<type>(call, next_in++);
#define OUT(type, name, count) \
  Buffer<type> name =          \
      Buffer<type>::output(mx::array(call.shapes[next_out++], mx::uint8, nullptr, {}).size());
#define STORE(name, signature)        \
  template <class Params>             \
  struct store_##name {               \
    const Call& call;                 \
    size_t next_in = 0, next_out = 0; \
    signature                         \
  };
EMULATED_KERNELS(STORE)
#undef STORE
#undef TYPE
#undef INT
#undef BOOL
#undef IN
#undef OUT

#define TYPE(name)
#define INT(name)
#define BOOL(name)
#define IN(type, name, count) store.name,
#define OUT IN
#define BIND(name, signature)                     \
  template <class Params>                         \
  auto bind_##name(store_##name<Params>& store) { \
    return kernels::name<Params>{signature};      \
  }
EMULATED_KERNELS(BIND)
#undef BIND
#undef IN
#undef OUT

#define IN(type, name, count)                        \
  if (call.inputs[next_in].flags().row_contiguous) { \
    write_back(store.name, call.inputs[next_in]);    \
  }                                                  \
  ++next_in;
#define OUT(type, name, count)                                                       \
  out.push_back(to_array(store.name, call.shapes[next_out], call.dtypes[next_out])); \
  ++next_out;
#define COLLECT(name, signature)                                                         \
  template <class Params>                                                                \
  std::vector<mx::array> collect_##name(const Call& call, store_##name<Params>& store) { \
    std::vector<mx::array> out;                                                          \
    size_t next_in = 0, next_out = 0;                                                    \
    signature return out;                                                                \
  }
EMULATED_KERNELS(COLLECT)
#undef COLLECT
#undef TYPE
#undef INT
#undef BOOL
#undef IN
#undef OUT

// run_NAME<Params>(call, sizes, order)
#define RUN(name, signature)                                                             \
  template <class Params>                                                                \
  std::vector<mx::array> run_##name(const Call& call, const kernels::Sizes& sizes,       \
                                    emulator::Order order) {                             \
    store_##name<Params> store{call};                                                    \
    auto kernel = bind_##name<Params>(store);                                            \
    check_sizes(kernel, sizes);                                                          \
    const auto& g = call.groups;                                                         \
    emulator::dispatch(                                                                  \
        {uint(g.x), uint(g.y), uint(g.z)}, call.threads, order, [&kernel] { kernel(); }, \
        uint(call.kernel->cluster));                                                     \
    return collect_##name<Params>(call, store);                                          \
  }
EMULATED_KERNELS(RUN)
#undef RUN

// The backend: tries what was registered, in order, and counts the dispatches.
class Backend {
 public:
  using Match = bool (*)(const Call&);
  using Run = std::vector<mx::array> (*)(const Call&, const kernels::Sizes&, emulator::Order);

  void add(const std::string& name, Match match, Run run, kernels::Sizes sizes) {
    entries_.push_back({"moefuse_" + name, match, run, sizes});
  }
  std::vector<mx::array> operator()(const Call& call) {
    dispatched.push_back(call.kernel->name.substr(sizeof("moefuse_") - 1));
    for (const auto& e : entries_) {
      if (e.name != call.kernel->name || !e.match(call)) continue;
      kernels::Sizes sizes = e.sizes;
      if (rows) sizes.rows = *rows;
      auto out = e.run(call, sizes, order);
      results.push_back(out[0]);
      return out;
    }
    throw emulator::Error(call.kernel->name + ": called with template arguments that the test " +
                          "does not expect");
  }

  emulator::Order order = emulator::Order::forward;
  std::optional<size_t> rows;  // in the place of what was registered
  std::vector<std::string> dispatched;
  std::vector<mx::array> results;  // the first output of each

 private:
  struct Entry {
    std::string name;
    Match match;
    Run run;
    kernels::Sizes sizes;
  };
  std::vector<Entry> entries_;
};

}  // namespace emulated

#define ADD_KERNEL(backend, name, params, ...) \
  backend.add(#name, emulated::match_##name<params>, emulated::run_##name<params>, {__VA_ARGS__})
