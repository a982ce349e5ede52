#!/bin/bash
# The lab's campaigns on one NVIDIA GPU (30 GB of its memory; disk or RAM for 18 GB a model):
# synthetic checkpoints of full geometry, then campaign.py's passes, packed into
# OUT/evidence.tar.gz every 20 seconds, so that a stop at any moment leaves what was finished.
#   benchmarks/cuda/campaign.sh OUT [SECONDS] [full|isolated|cells] [rehearse]
# SECONDS (default 900): everything ends within them.
# full (default): whole models, the step beside the control, then contexts and batches.
# isolated: a few layers of each, so that stock is fast: every kernel alone and their combinations.
# cells: contexts and batches alone, a capsule a model that grows with each cell.
# rehearse: the small trained models in the checkpoints' place, quick, on any device.
# Environment: PYTHON (default .venv/bin/python), MOEFUSE_GIT_COMMIT where there is no git,
# CAMPAIGN_MODELS (default "qwen3-30b-a3b glm-4.7-flash"), CAMPAIGN_LAYERS (of isolated, default 4),
# CAMPAIGN_WEIGHTS (a folder that is kept, so that a second call goes on where the first was stopped;
# default: a folder of its own, gone at the end), CAMPAIGN_EVIDENCE (OUT/evidence.tar.gz of a run that
# was stopped, of the same commit on such a GPU: goes on with its timed runs), CAMPAIGN_KERNELS
# (OUT/kernels.tar.gz of an earlier run on such a GPU with the same MLX: saves what MLX compiles).
# Several GPUs: a call for each model with a CUDA_VISIBLE_DEVICES and CAMPAIGN_WEIGHTS of its own.
# shellcheck disable=SC2086
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
limit=${2:-900}
mode=full rehearse=
for word in "${@:3}"; do
  case $word in
    full | isolated | cells) mode=$word ;;
    rehearse) rehearse=--rehearse ;;
    *) echo "campaign: expected full, isolated, cells or rehearse, got $word" && exit 2 ;;
  esac
done
cd "$(dirname "$0")/../.." || exit 2
begin=$(date +%s)
left() { echo $((limit - $(date +%s) + begin)); }
stamped() { while IFS= read -r line; do echo "$(($(date +%s) - begin)) s  $line"; done; }

PYTHON=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export MLX_ENABLE_TF32=0 # the oracle's float32 is float32
export MOEFUSE_GIT_COMMIT=${MOEFUSE_GIT_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null)}

weights=${CAMPAIGN_WEIGHTS:-$(mktemp -d "${TMPDIR:-/tmp}/moefuse.XXXXXX")}
mkdir -p "$weights"
# Two checkpoints are 34 GB: a RAM disk gives them back fastest, where one may be had.
if [ -z "$rehearse" ] && [ -z "$(ls -A "$weights")" ]; then
  mount -t tmpfs -o size=40g moefuse "$weights" 2>/dev/null
fi
models=${CAMPAIGN_MODELS:-qwen3-30b-a3b glm-4.7-flash}
layers=
[ "$mode" = isolated ] && layers=${CAMPAIGN_LAYERS:-4}
evidence=$weights/evidence
mkdir -p "$evidence"
if [ -n "${CAMPAIGN_EVIDENCE:-}" ]; then tar -xzf "$CAMPAIGN_EVIDENCE" -C "$weights" || exit 2; fi

pack() {
  tar -czf "$weights/evidence.tar.gz" -C "$weights" evidence &&
    cp "$weights/evidence.tar.gz" "$out/.evidence" && mv "$out/.evidence" "$out/evidence.tar.gz"
}
finish() {
  trap - EXIT INT TERM
  [ -n "${packer:-}" ] && kill "$packer" 2>/dev/null
  pack # before anything that takes time
  "$PYTHON" -m moefuse.cli report --out "$evidence" --stopped --html "$evidence/report.html" ||
    echo "report failed"
  pack
  [ -n "$rehearse" ] || "$PYTHON" benchmarks/cuda/compile_ahead.py --save "$out/kernels.tar.gz"
  echo "packed: $out/evidence.tar.gz"
  [ -n "${CAMPAIGN_WEIGHTS:-}" ] && return
  umount -l "$weights" 2>/dev/null
  rm -rf "$weights"
}
exec > >(stamped | tee -a "$evidence/campaign.log") 2>&1
trap finish EXIT
trap 'exit 130' INT TERM

"$PYTHON" - $rehearse <<'PY' || exit 2
import importlib, sys

needed = ("mlx.core", "mlx_lm", "moefuse", "scipy", "jsonschema", "typer", "rich", "matplotlib")
for name in needed:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"campaign: {name}: {error}")
from moefuse.lab import environment

commit = environment.commit(environment.Path())
print(environment.device_name(), environment.gpu(), "commit", commit)
if len(sys.argv) == 1 and not environment.clean(commit):
    sys.exit(f"campaign: commit {commit}: expected a clean checkout, or none and MOEFUSE_GIT_COMMIT: "
             "what it measures could not be imported")
PY
echo "weights in $weights: $(df -h --output=avail "$weights" | tail -1) free"
(while sleep 20; do pack; done) &
packer=$!

# Each prompt that is judged costs GLM some ten seconds: three short contexts and a long one.
"$PYTHON" - "$weights/prompts.json" <<'PY' || exit 2
import json, sys

kept = ("short-1", "short-2", "short-3", "long-1")
prompts = [p for p in json.load(open("models/prompts.json")) if p["name"] in kept]
json.dump(prompts, open(sys.argv[1], "w"))
PY

# "$model" or "$model-4-layers", as rows and ranking name it.
folder() { echo "$weights/$1${layers:+-$layers-layers}"; }
checkpoint() {
  [ -e "$(folder "$1")/config.json" ] && return
  if [ -n "$rehearse" ]; then
    case $1 in qwen*) small=qwen3-moe-tiny ;; *) small=glm4-moe-lite-tiny ;; esac
    cp -r "models/$small" "$(folder "$1")"
  else
    "$PYTHON" -m moefuse.cli synth --like "$1" ${layers:+--layers "$layers"} --out "$(folder "$1")"
  fi
}
"$PYTHON" benchmarks/cuda/compile_ahead.py ${CAMPAIGN_KERNELS:+--load "$CAMPAIGN_KERNELS"} &
compiler=$!
writers=
for model in $models; do
  checkpoint "$model" &
  writers="$writers $!"
done
for writer in $writers; do wait "$writer" || echo "a checkpoint is missing"; done
echo "checkpoints written"
wait "$compiler" || echo "nothing was compiled ahead"

timeout -s INT -k 20 "$(($(left) - 15))" "$PYTHON" benchmarks/cuda/campaign.py \
  "$weights" "$evidence" "$(($(left) - 25))" "$mode" $rehearse ${layers:+--layers "$layers"} \
  --models $models
echo "campaign.py ended with $?"
