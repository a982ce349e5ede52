#!/bin/sh
# Builds the CUDA decode step, checks every stage against fp64 and measures it, on the GPU at hand
# (an H100 or H200: 20 GB of memory, a minute or two).  usage: run_on_gpu.sh [check|time|all] [context]
set -e
cd "$(dirname "$0")/../.."
command -v nvcc >/dev/null || { echo "skipped: nvcc is not on the PATH"; exit 77; }
mkdir -p build/cuda
nvcc -O3 -std=c++20 -gencode=arch=compute_90a,code=sm_90a -o build/cuda/decode_bench \
  benchmarks/cuda/decode_bench.cu src/cuda/decode_step.cu
exec build/cuda/decode_bench "$@"
