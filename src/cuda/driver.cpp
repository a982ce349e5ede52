#include "cuda/driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <stdexcept>

#include "mlx/backend/cuda/cuda.h"

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

void* library(std::initializer_list<const char*> names) {
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

struct Driver {
  void* handle = library({"libcuda.so.1"});
#define ENTRY(name, symbol_name, ...) \
  int (*name)(__VA_ARGS__) = symbol<int (*)(__VA_ARGS__)>(handle, symbol_name)
  ENTRY(error_string, "cuGetErrorString", int, const char**);
  ENTRY(retain_context, "cuDevicePrimaryCtxRetain", void**, int);
  ENTRY(set_context, "cuCtxSetCurrent", void*);
  ENTRY(attribute, "cuDeviceGetAttribute", int*, int, int);
  ENTRY(load, "cuModuleLoadData", void**, const void*);
  ENTRY(function, "cuModuleGetFunction", Function*, void*, const char*);
  ENTRY(set_function, "cuFuncSetAttribute", Function, int, int);
  ENTRY(get_function, "cuFuncGetAttribute", int*, int, Function);
  ENTRY(launch, "cuLaunchKernelEx", const LaunchConfig*, Function, void**, void**);
  ENTRY(stream_create, "cuStreamCreate", Stream*, unsigned);
  ENTRY(stream_synchronize, "cuStreamSynchronize", Stream);
  ENTRY(begin, "cuStreamBeginCapture_v2", Stream, int);
  ENTRY(end, "cuStreamEndCapture", Stream, GraphHandle*);
  ENTRY(instantiate, "cuGraphInstantiateWithFlags", Executable*, GraphHandle, unsigned long long);
  ENTRY(update, "cuGraphExecUpdate_v2", Executable, GraphHandle, UpdateResult*);
  ENTRY(graph_launch, "cuGraphLaunch", Executable, Stream);
  ENTRY(graph_destroy, "cuGraphDestroy", GraphHandle);
  ENTRY(executable_destroy, "cuGraphExecDestroy", Executable);
};

struct Compiler {
  void* handle = library({"libnvrtc.so.13", "libnvrtc.so.12"});
  ENTRY(create, "nvrtcCreateProgram", void**, const char*, const char*, int, const char* const*,
        const char* const*);
  ENTRY(compile, "nvrtcCompileProgram", void*, int, const char* const*);
  ENTRY(destroy, "nvrtcDestroyProgram", void**);
  ENTRY(log_size, "nvrtcGetProgramLogSize", void*, size_t*);
  ENTRY(log, "nvrtcGetProgramLog", void*, char*);
  ENTRY(code_size, "nvrtcGetCUBINSize", void*, size_t*);
  ENTRY(code, "nvrtcGetCUBIN", void*, char*);
};
#undef ENTRY

const Driver& driver() {
  static const Driver found;
  return found;
}

// Where cuda_bf16.h is: beside MLX's wheel, as MLX itself looks for it, or in a toolkit.
std::string include_path() {
  namespace fs = std::filesystem;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&mlx::core::cu::is_available), &info)) {
    const fs::path packages = fs::path(info.dli_fname).parent_path().parent_path().parent_path();
    for (const char* folder : {"cu13", "cuda_runtime"}) {
      const fs::path path = packages / "nvidia" / folder / "include";
      if (fs::exists(path / "cuda_bf16.h")) return path.string();
    }
  }
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* home = std::getenv(name)) return std::string(home) + "/include";
  return "/usr/local/cuda/include";
}

void check_compiler(const Compiler& c, int status, void* program) {
  if (status == 0) return;
  size_t size = 0;
  c.log_size(program, &size);
  std::string log(size, ' ');
  c.log(program, log.data());
  throw std::runtime_error("[cuda compile] " + log);
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
  static const Compiler c;
  void* program = nullptr;
  check_compiler(c, c.create(&program, source.c_str(), "moefuse.cu", 0, nullptr, nullptr), program);
  const std::string arch =
      "--gpu-architecture=sm_" + std::to_string(capability()) + (capability() >= 90 ? "a" : "");
  const std::string include = "--include-path=" + include_path();
  const char* options[] = {arch.c_str(), include.c_str(), "--std=c++17"};
  check_compiler(c, c.compile(program, 3, options), program);
  size_t size = 0;
  check_compiler(c, c.code_size(program, &size), program);
  std::string code(size, ' ');
  check_compiler(c, c.code(program, code.data()), program);
  c.destroy(&program);
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
