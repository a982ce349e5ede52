#!/bin/sh
# The decode step on the CUDA GPU at hand (an H100 or H200, 20 GB, some minutes): against the CPU's
# executor and itself, under compute-sanitizer where the CUDA toolkit is, then tokens a second, then
# through mlx-lm beside stock, then the trained models' texts.
#   tests/cuda/run_on_gpu.sh [check|sanitizer|time|mlx_lm|generations|all]
set -e
cd "$(dirname "$0")/../.."
command -v nvidia-smi >/dev/null || { echo "skipped: no NVIDIA driver on this machine"; exit 77; }
./run setup
bench=build/$(uname -s)-$(uname -m)/benchmarks/step_bench
python=${MOEFUSE_VENV:-.venv}/bin/python
for family in qwen glm; do
  case ${1:-all} in check | all) $bench $family check long=10000 layers=2 ;; esac
  case ${1:-all} in sanitizer | all)
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 "$bench" $family long=4 layers=2
      done
    else
      echo "skipped: no compute-sanitizer on this machine"
    fi ;;
  esac
  case ${1:-all} in time | all) $bench $family time rows=1,4 context=1024,128,16384 ;; esac
  case ${1:-all} in mlx_lm | all)
    PYTHONPATH=python $python benchmarks/cuda/mlx_lm_decode.py $family ;;
  esac
done
case ${1:-all} in
  generations | all) PYTHONPATH=python $python tests/cuda/generations.py ;;
esac
