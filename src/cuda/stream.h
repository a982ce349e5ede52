// MLX's CUDA stream and memory, for kernels that we launch ourselves.
#pragma once

#include "cuda/driver.h"
#include "mlx/mlx.h"

namespace moefuse::cuda {

namespace mx = mlx::core;

// True where this MLX's stream can be reached.
bool reachable();

// The CUDA stream of an MLX stream, after everything that MLX holds back for it is on its way.
Stream flushed(mx::Stream s);

// Where an array lies on the device. Its data() would move it to the host.
void* address(const mx::array& a);

}  // namespace moefuse::cuda
