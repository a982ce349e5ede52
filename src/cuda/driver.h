// What the step's graph needs of the CUDA driver, found at run time.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace moefuse::cuda {

using Function = void*;
using Stream = void*;
using GraphHandle = void*;
using Executable = void*;

// Throws std::runtime_error "[cuda what] the driver's sentence" unless `status` is 0.
void check(int status, const std::string& what);

struct Shape {
  unsigned groups[3];
  unsigned threads, shared_bytes = 0;
};

// Errors of all of these are std::runtime_error. The context is MLX's, the device's primary one.
void make_current();
// Compute capability times 10: 90 for an H100.
int capability();
int multiprocessors();
// Lets `f` have as much dynamic shared memory.
void allow_shared(Function f, unsigned bytes, const std::string& name);
// Shared memory of a block of `f` without the dynamic part, in bytes.
int static_shared(Function f, const std::string& name);
// How much of a multiprocessor's memory is to be shared memory where `f` runs, if `f` needs no
// more; the rest is L1.
void prefer_shared(Function f, int percent, const std::string& name);
// Lets `f` have clusters of more than eight blocks.
void allow_clusters(Function f, const std::string& name);
// The kernels `names` (extern "C") of one source, compiled for this device: cuda/compiler.h.
std::vector<Function> compile(const std::string& source, const std::vector<std::string>& names);
// overlap: the kernel may start before the one in front of it ends; it waits for that itself.
void launch(Function f, const Shape& shape, void** arguments, Stream stream, bool overlap,
            const std::string& name);
Stream make_stream();
void synchronize(Stream stream);
// Everything launched on the stream between begin and end becomes a graph: `old` with other
// arguments where it has the same kernels, else a new one in its stead.
void begin_capture(Stream stream);
Executable end_capture(Stream stream, Executable old);
void launch(Executable graph, Stream stream);
void destroy(Executable graph);

}  // namespace moefuse::cuda
