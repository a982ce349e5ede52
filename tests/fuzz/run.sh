#!/bin/sh
# Fuzzes the loader and the plan: run.sh [executions of each (20000)] [libFuzzer options]. Needs
# clang with libFuzzer, and cmake's Python to have mlx and nanobind. MOEFUSE_FUZZ names one of the
# two. What breaks a promise is left in build/fuzz.
set -eu
cd "$(dirname "$0")/../.."
runs=${1:-20000}
[ $# = 0 ] || shift
# clang 14's runtimes do not know where newer kernels put a program when they are free to choose.
fixed="setarch -R"
$fixed true 2>/dev/null || fixed=
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
  -DMOEFUSE_FUZZ=ON -DMOEFUSE_TESTS=OFF -DMOEFUSE_BENCHMARKS=OFF \
  ${PYTHON:+-DPython_EXECUTABLE="$PYTHON"} > $build.log
ninja -C $build fuzz_load fuzz_plan fuzz_seeds > $build.log || { cat $build.log; exit 1; }
mkdir -p $build/corpus-load $build/corpus-plan $build/seeds-plan
$build/tests/fuzz/fuzz_seeds $build/seeds-load
printf '\0' > $build/seeds-plan/qwen3_moe
printf '\1' > $build/seeds-plan/glm4_moe_lite
# A plan makes a hundred arrays: the stack of each allocation would take longer than the rest.
export ASAN_OPTIONS="malloc_context_size=0:quarantine_size_mb=16"
running=
for target in ${MOEFUSE_FUZZ:-load plan}; do
  case $target in
    load) options="-max_len=4096 -dict=tests/fuzz/load.dict" ;;
    plan) options="-max_len=128" ;;
  esac
  # An allocation of 64 MB, or two seconds, is out of all proportion.
  $fixed $build/tests/fuzz/fuzz_$target -runs="$runs" $options -malloc_limit_mb=64 -timeout=2 \
    -rss_limit_mb=2048 -artifact_prefix=$build/ -print_final_stats=1 "$@" \
    $build/corpus-$target $build/seeds-$target &
  running="$running $!"
done
# libFuzzer ends a finding with 77, with which this script would say that it was skipped.
found=0
for process in $running; do wait "$process" || found=1; done
exit $found
