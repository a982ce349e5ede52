#!/bin/sh
# The decode step on the CUDA GPU at hand (an H100 or H200, 20 GB, about two minutes): against the CPU's
# executor and itself, then tokens a second, then through mlx-lm beside stock.
#   tests/cuda/run_on_gpu.sh [check|generations|time|mlx_lm|all]
set -e
cd "$(dirname "$0")/../.."
command -v nvidia-smi >/dev/null || { echo "skipped: no NVIDIA driver on this machine"; exit 77; }
./run setup
bench=build/$(uname -s)-$(uname -m)/benchmarks/step_bench
python=${MOEFUSE_VENV:-.venv}/bin/python
for family in qwen glm; do
  case ${1:-all} in check | all) $bench $family check long=10000 layers=2 ;; esac
  case ${1:-all} in time | all) $bench $family time rows=1,4 context=1024,128,16384 ;; esac
  case ${1:-all} in mlx_lm | all)
    PYTHONPATH=python $python benchmarks/cuda/mlx_lm_decode.py $family ;;
  esac
done
case ${1:-all} in
  generations | all) PYTHONPATH=python $python tests/cuda/generations.py ;;
esac
