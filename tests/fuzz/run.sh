#!/bin/sh
# Fuzzes the loader: run.sh [executions (20000)] [libFuzzer options]. Needs clang with libFuzzer,
# and cmake's Python to have mlx and nanobind. What breaks a promise is left in build/fuzz.
set -eu
cd "$(dirname "$0")/../.."
runs=${1:-20000}
[ $# = 0 ] || shift
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' \
  > "$probe/probe.cpp"
if ! clang++ -fsanitize=fuzzer,address "$probe/probe.cpp" -o "$probe/probe" 2>/dev/null; then
  echo "skipped: no clang++ with libFuzzer here"
  exit 77
fi
build=build/fuzz
[ -e $build/build.ninja ] || cmake -S . -B $build -G Ninja -DCMAKE_CXX_COMPILER=clang++ \
  -DCMAKE_C_COMPILER=clang -DMOEFUSE_FUZZ=ON -DMOEFUSE_TESTS=OFF -DMOEFUSE_BENCHMARKS=OFF \
  ${PYTHON:+-DPython_EXECUTABLE="$PYTHON"} > $build.log
ninja -C $build fuzz_load fuzz_seeds > $build.log
mkdir -p $build/corpus
$build/tests/fuzz/fuzz_seeds $build/seeds
# An input is at most 4 KB: an allocation of 64 MB, or two seconds, is out of all proportion.
exec $build/tests/fuzz/fuzz_load -runs="$runs" -max_len=4096 -malloc_limit_mb=64 -timeout=2 \
  -rss_limit_mb=2048 -dict=tests/fuzz/load.dict -artifact_prefix=$build/ -print_final_stats=1 "$@" \
  $build/corpus $build/seeds
