#!/bin/bash
# The lab's campaigns on one NVIDIA GPU (24 GB of its memory, 40 GB of disk or RAM): synthetic
# checkpoints of both models' full geometry, then campaign.py's passes, packed into
# OUT/evidence.tar.gz every 20 seconds, so that a stop at any moment leaves what was finished.
#   benchmarks/cuda/campaign.sh OUT [SECONDS] [rehearse]
# SECONDS (default 900): everything ends within them. `rehearse`: two layers, quick, on any device.
# Environment: PYTHON (default .venv/bin/python), MOEFUSE_GIT_COMMIT where there is no git,
# MOEFUSE_WEIGHTS (a folder that is kept, so that a second call goes on where the first was stopped;
# default: a folder of its own, gone at the end).
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
limit=${2:-900}
mode=${3:-full}
cd "$(dirname "$0")/../.." || exit 2
begin=$(date +%s)
left() { echo $((limit - $(date +%s) + begin)); }
say() { echo "[$(($(date +%s) - begin)) s] $*"; }

PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export MLX_ENABLE_TF32=0 # the oracle's float32 is float32
export MOEFUSE_GIT_COMMIT=${MOEFUSE_GIT_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null)}

weights=${MOEFUSE_WEIGHTS:-$(mktemp -d "${TMPDIR:-/tmp}/moefuse.XXXXXX")}
mkdir -p "$weights"
# Two checkpoints are 34 GB: a RAM disk gives them back fastest, where one may be had.
if [ "$mode" = full ] && [ -z "$(ls -A "$weights")" ]; then
  mount -t tmpfs -o size=40g moefuse "$weights" 2>/dev/null
fi
evidence=$weights/evidence
mkdir -p "$evidence"
cp models/prompts.json "$weights/prompts.json"

pack() {
  tar -czf "$out/.evidence.tar.gz" -C "$weights" evidence && mv "$out/.evidence.tar.gz" "$out/evidence.tar.gz"
}
finish() {
  trap - EXIT INT TERM
  [ -n "${packer:-}" ] && kill "$packer" 2>/dev/null
  "$PYTHON" -m moefuse.cli report --out "$evidence" --stopped --html "$evidence/report.html" ||
    say "report failed"
  pack
  say "packed: $out/evidence.tar.gz"
  [ -n "${MOEFUSE_WEIGHTS:-}" ] && return
  umount -l "$weights" 2>/dev/null
  rm -rf "$weights"
}
exec > >(tee -a "$evidence/campaign.log") 2>&1
trap finish EXIT
trap 'exit 130' INT TERM

"$PYTHON" - <<'PY' || exit 2
import importlib, sys

needed = ("mlx.core", "mlx_lm", "moefuse", "scipy", "jsonschema", "typer", "rich", "matplotlib")
for name in needed:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"campaign: {name}: {error}")
from moefuse.lab import environment

print(environment.device_name(), environment.gpu(), "commit", environment.commit(environment.Path()))
PY
say "weights in $weights: $(df -h --output=avail "$weights" | tail -1) free"
(while sleep 20; do pack; done) &
packer=$!

small=
[ "$mode" = rehearse ] && small="--layers 2 --vocab 4096 --dtype float32"
synth() { # shellcheck disable=SC2086
  [ -e "$weights/$1/config.json" ] && return
  "$PYTHON" -m moefuse.cli synth --like "$1" $small --out "$weights/$1"
}
if [ "$mode" = full ] && [ ! -d "$weights/glm-4.7-flash" ] &&
  [ "$(df --output=avail -k "$weights" | tail -1)" -lt 36000000 ]; then
  say "too little room for two checkpoints: Qwen alone"
  synth qwen3-30b-a3b || exit 1
else
  synth qwen3-30b-a3b & first=$!
  synth glm-4.7-flash & second=$!
  wait $first && wait $second || exit 1
fi
say "checkpoints written"

timeout -s INT -k 20 "$(($(left) - 15))" "$PYTHON" benchmarks/cuda/campaign.py \
  "$weights" "$evidence" "$(($(left) - 25))" "$mode"
say "campaign.py ended with $?"
