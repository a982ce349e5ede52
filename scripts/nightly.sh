#!/bin/sh
# What takes too long for every change: nightly.sh [soak seconds (3600)] [fuzz executions (10000000)]
# [property cases (10000)]. Ends at the first thing that fails; build/nightly holds the reports.
set -eu
cd "$(dirname "$0")/.."
soak=${1:-3600}
executions=${2:-10000000}
cases=${3:-10000}
venv=${MOEFUSE_VENV:-$PWD/.venv}
reports=build/nightly
mkdir -p $reports
./run setup
PATH="$venv/bin:$PATH"
PYTHONPATH="$PWD/python"
export PATH PYTHONPATH

# A thousand at a time: each of the refusals in them costs MLX a task of its count.
first=0
while [ "$first" -lt "$cases" ]; do
  MOEFUSE_PROPERTY_FIRST=$first MOEFUSE_PROPERTY_CASES=1000 \
    python -m pytest -q tests/python/test_property.py
  first=$((first + 1000))
done
MOEFUSE_PROPERTY_CASES=$cases python -m pytest -q tests/python/test_hardening_inputs.py
./run sanitize
./run fuzz "$executions"
for model in qwen3-moe-tiny glm4-moe-lite-tiny; do
  python tests/soak/soak.py "models/$model" --seconds "$soak" --report "$reports/soak-$model.json"
done
