#!/bin/bash
# step_bench and the lab on a GPU machine without network: what they need in one folder of some 30 MB.
# That machine has g++ and a Python with NVIDIA's CUDA 13 libraries, as torch brings them.
#   benchmarks/cuda/portable.sh pack FOLDER      here, after ./run setup
#   . benchmarks/cuda/portable.sh env FOLDER     there, in a copy of the repository: for FOLDER/step_bench
#   . benchmarks/cuda/portable.sh lab FOLDER     there: Python's extension too, for campaign.sh
# Environment: PORTABLE_PYTHON (there; default 3.12), PORTABLE_ARCH (of the GPU; default 90),
# PORTABLE_ROOT (a folder to unpack to there; default /tmp/moefuse).
# shellcheck disable=SC2086

portable_pack() (
  set -eu
  mkdir -p "$1/wheels"
  out=$(cd "$1" && pwd) work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  version=${PORTABLE_PYTHON:-3.12}
  abi=cp${version/./}
  of() { .venv/bin/python -c "import importlib.metadata as m; print('$1==' + m.version('$1'))"; }
  fetch() {
    .venv/bin/python -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
      --implementation cp --abi $abi --abi abi3 --abi none --platform manylinux_2_35_x86_64 \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 --platform any -d "$@"
  }
  mlx=$(of mlx)
  fetch "$work" "$mlx" "mlx-cuda-13==${mlx#*==}"
  for wheel in "$work"/*.whl; do .venv/bin/python -m zipfile -e "$wheel" "$work/mlx"; done
  .venv/bin/python benchmarks/cuda/prune_fatbin.py "$work/mlx/mlx/lib/libmlx.so" \
    "${PORTABLE_ARCH:-90}"
  tar -C "$work/mlx" -c . | xz -3 -T0 >"$out/mlx.txz"
  # What the lab imports and torch's Python may lack; of typer one that needs nothing more.
  fetch "$out/wheels" "$(of mlx-lm)" "$(of nanobind)" "$(of jsonschema)" \
    "$(of jsonschema-specifications)" "$(of referencing)" "$(of rpds-py)" typer==0.16.0 click==8.1.8
  build=build/$(uname -s)-$(uname -m)
  strip -g -o "$work/libmoefuse.a" "$build/libmoefuse.a"
  g++ -std=gnu++20 -O2 -Iinclude -I"$work/mlx/mlx/include" benchmarks/cuda/step_bench.cpp \
    "$work/libmoefuse.a" -o "$out/step_bench" -L"$work/mlx/mlx/lib" -lmlx -ldl -lpthread -s \
    -Wl,--allow-shlib-undefined
  xz -T0 <"$work/libmoefuse.a" >"$out/libmoefuse.a.xz"
  du -sh "$out"
)

portable_env() {
  root=${PORTABLE_ROOT:-/tmp/moefuse}
  if [ ! -d "$root/mlx" ]; then
    mkdir -p "$root" && tar -xJf "$1/mlx.txz" -C "$root" || return
  fi
  site=$(python3 -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
  libraries=$root/mlx/lib
  for folder in "$site"/nvidia/*/lib "$site"/nvidia/*/lib/x86_64 "$site"/torch/lib; do
    [ -d "$folder" ] && libraries=$libraries:$folder
  done
  export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export PYTHONPATH=$root:$root/site:$PWD/python PYTHON=python3 MLX_ENABLE_TF32=0
}

portable_lab() {
  portable_env "$1" || return
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$root/site" \
    "$1"/wheels/*.whl || return
  xz -dc "$1/libmoefuse.a.xz" >"$root/libmoefuse.a" || return
  nanobind=$root/site/nanobind
  flags="-std=gnu++20 -O1 -fPIC -fvisibility=hidden -DNB_DOMAIN=mlx -DNDEBUG -DMOEFUSE_HAS_AVX2
    -DMOEFUSE_HAS_AVX512 -DMOEFUSE_HAS_PLAIN -DMOEFUSE_HAS_TILES -Isrc -Iinclude
    -I$root/mlx/include -I$nanobind/include -I$nanobind/ext/robin_map/include
    -I$(python3 -c "import sysconfig; print(sysconfig.get_paths()['include'])")"
  objects=
  for source in python/moefuse/_core.cpp python/moefuse/_decoder.cpp "$nanobind/src/nb_combined.cpp"; do
    object=$root/$(basename "$source").o
    g++ $flags -c "$source" -o "$object" &
    objects="$objects $object"
  done
  wait
  g++ -shared $objects "$root/libmoefuse.a" -L"$root/mlx/lib" -lmlx -ldl -lpthread \
    -o "python/moefuse/_core$(python3 -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")"
}

case ${1:-} in
  pack | env | lab) "portable_$1" "${2:?portable.sh: FOLDER: expected one}" ;;
  *) echo "portable.sh: expected pack, env or lab, got '${1:-}'" >&2 && false ;;
esac
