#include "cuda/driver.h"

#include <stdexcept>

#include "cuda/compiler.h"
#include "cuda/library.h"

namespace moefuse::cuda {

namespace {

// The driver's own layouts (cuda.h: CUlaunchAttribute, CUlaunchConfig).
struct LaunchAttribute {
  int id;
  int unused;
  union {
    int allowed;
    char bytes[64];
  } value;
};
struct LaunchConfig {
  unsigned groups[3], threads[3], shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
struct UpdateResult {  // CUgraphExecUpdateResultInfo
  int result;
  void *node, *from;
};
constexpr int kProgrammaticStreamSerialization = 6;
constexpr int kThreadLocalCapture = 1;
constexpr unsigned kNonBlocking = 1;
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kMultiprocessors = 16;
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kStaticShared = 1;      // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
constexpr int kCarveout = 9;          // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
constexpr int kLargeClusters = 14;    // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED

struct Driver {
  void* handle = library({"libcuda.so.1"});
  MOEFUSE_ENTRY(error_string, "cuGetErrorString", int, const char**);
  MOEFUSE_ENTRY(retain_context, "cuDevicePrimaryCtxRetain", void**, int);
  MOEFUSE_ENTRY(set_context, "cuCtxSetCurrent", void*);
  MOEFUSE_ENTRY(attribute, "cuDeviceGetAttribute", int*, int, int);
  MOEFUSE_ENTRY(load, "cuModuleLoadData", void**, const void*);
  MOEFUSE_ENTRY(function, "cuModuleGetFunction", Function*, void*, const char*);
  MOEFUSE_ENTRY(set_function, "cuFuncSetAttribute", Function, int, int);
  MOEFUSE_ENTRY(get_function, "cuFuncGetAttribute", int*, int, Function);
  MOEFUSE_ENTRY(launch, "cuLaunchKernelEx", const LaunchConfig*, Function, void**, void**);
  MOEFUSE_ENTRY(stream_create, "cuStreamCreate", Stream*, unsigned);
  MOEFUSE_ENTRY(stream_synchronize, "cuStreamSynchronize", Stream);
  MOEFUSE_ENTRY(begin, "cuStreamBeginCapture_v2", Stream, int);
  MOEFUSE_ENTRY(end, "cuStreamEndCapture", Stream, GraphHandle*);
  MOEFUSE_ENTRY(instantiate, "cuGraphInstantiateWithFlags", Executable*, GraphHandle,
                unsigned long long);
  MOEFUSE_ENTRY(update, "cuGraphExecUpdate_v2", Executable, GraphHandle, UpdateResult*);
  MOEFUSE_ENTRY(graph_launch, "cuGraphLaunch", Executable, Stream);
  MOEFUSE_ENTRY(graph_destroy, "cuGraphDestroy", GraphHandle);
  MOEFUSE_ENTRY(executable_destroy, "cuGraphExecDestroy", Executable);
};

const Driver& driver() {
  static const Driver found;
  return found;
}

}  // namespace

void check(int status, const std::string& what) {
  if (status == 0) return;
  const char* text = nullptr;
  driver().error_string(status, &text);
  throw std::runtime_error("[cuda " + what + "] " + (text ? text : "unknown error"));
}

void make_current() {
  static void* context = [] {
    void* found = nullptr;
    check(driver().retain_context(&found, 0), "context");
    return found;
  }();
  check(driver().set_context(context), "context");
}

int capability() {
  static const int value = [] {
    int major = 0, minor = 0;
    check(driver().attribute(&major, kCapabilityMajor, 0), "capability");
    check(driver().attribute(&minor, kCapabilityMinor, 0), "capability");
    return 10 * major + minor;
  }();
  return value;
}

int multiprocessors() {
  int count = 0;
  check(driver().attribute(&count, kMultiprocessors, 0), "multiprocessors");
  return count;
}

void allow_shared(Function f, unsigned bytes, const std::string& name) {
  check(driver().set_function(f, kMaxDynamicShared, static_cast<int>(bytes)), name);
}

int static_shared(Function f, const std::string& name) {
  int bytes = 0;
  check(driver().get_function(&bytes, kStaticShared, f), name);
  return bytes;
}

void prefer_shared(Function f, int percent, const std::string& name) {
  check(driver().set_function(f, kCarveout, percent), name);
}

void allow_clusters(Function f, const std::string& name) {
  check(driver().set_function(f, kLargeClusters, 1), name);
}

std::vector<Function> compile(const std::string& source, const std::vector<std::string>& names) {
  const std::string code = machine_code(source, capability());
  void* module = nullptr;
  check(driver().load(&module, code.data()), "load");
  std::vector<Function> functions;
  for (const std::string& name : names) {
    functions.push_back(nullptr);
    check(driver().function(&functions.back(), module, name.c_str()), name);
  }
  return functions;
}

void launch(Function f, const Shape& s, void** arguments, Stream stream, bool overlap,
            const std::string& name) {
  LaunchAttribute attribute = {kProgrammaticStreamSerialization, 0, {1}};
  const LaunchConfig config = {{s.groups[0], s.groups[1], s.groups[2]},
                               {s.threads, 1, 1},
                               s.shared_bytes,
                               stream,
                               &attribute,
                               overlap ? 1u : 0u};
  check(driver().launch(&config, f, arguments, nullptr), name);
}

Stream make_stream() {
  Stream stream = nullptr;
  check(driver().stream_create(&stream, kNonBlocking), "stream");
  return stream;
}

void synchronize(Stream stream) {
  check(driver().stream_synchronize(stream), "synchronize");
}

void begin_capture(Stream stream) {
  check(driver().begin(stream, kThreadLocalCapture), "capture");
}

Executable end_capture(Stream stream, Executable old) {
  GraphHandle graph = nullptr;
  UpdateResult why;
  check(driver().end(stream, &graph), "capture");
  if (old && driver().update(old, graph, &why) != 0) {
    destroy(old);
    old = nullptr;
  }
  if (!old) check(driver().instantiate(&old, graph, 0), "graph");
  check(driver().graph_destroy(graph), "graph");
  return old;
}

void launch(Executable graph, Stream stream) {
  check(driver().graph_launch(graph, stream), "step");
}

void destroy(Executable graph) {
  driver().executable_destroy(graph);
}

}  // namespace moefuse::cuda
