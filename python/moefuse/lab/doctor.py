"""What this machine and these models can do with moefuse, and why not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_lm.utils import load_model
from rich.text import Text

from ..families import FAMILIES
from . import LabError, checkpoint, environment, plan, variants
from .measure import memory_source
from .variants import Variant, applied


def examine(engine, models: Sequence[Path], plan_accumulate: str | None = None) -> dict:
    """Everything `moefuse doctor` knows. A model that cannot be read is told in its place.

    plan_accumulate: also decode with the step in that arithmetic, and tell its plan and times.
    """
    return {
        "moefuse": engine.__version__,
        "mlx": environment.version_of("mlx"),
        "mlx_lm": environment.version_of("mlx-lm"),
        "device": environment.device_name(),
        "memory_source": memory_source(),
        "env": environment.flags(),
        "capabilities": engine.capabilities(),
        "models": [_look_at(engine, path, plan_accumulate) for path in models],
    }


def _look_at(engine, path: Path, plan_accumulate: str | None) -> dict:
    try:
        looked, model = _open(path)
    except LabError as error:
        return {"name": path.name, "error": str(error)}
    looked["fused"] = {part: _try(engine, model, part) for part in variants.PARTS}
    if plan_accumulate is not None and looked["geometry"]:
        looked["plan"] = plan.examine(model, plan_accumulate)
    return looked


def _open(path: Path) -> tuple[dict, object]:
    """(what the folder says of itself, its model with lazy weights).

    A family that patch() knows and the lab does not measure has no geometry here.
    """
    try:
        found = checkpoint.inspect(path)
    except LabError:
        kind = _model_type(path)
        if kind not in FAMILIES or kind in checkpoint.FAMILIES:
            raise
        try:
            model = load_model(path, lazy=True)[0]
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise LabError(f"[checkpoint] {path.name}: {error}") from error
        return {"name": path.name, "model_type": kind, "kind": "real", "geometry": {}}, model
    looked = {
        "name": found.name,
        "model_type": found.model_type,
        "kind": found.kind,
        "geometry": found.geometry,
        "quantization": found.quantization,
    }
    return looked, checkpoint.load_weights(found, lazy=True)


def _model_type(path: Path) -> str | None:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _try(engine, model, part: str) -> dict:
    """Patch one part and take it off again."""
    try:
        with applied(model, Variant((part,)), engine) as report:
            return {
                "modules": report.modules_patched,
                "patterns": list(report.patterns),
                "fallbacks": dict(report.fallbacks),
            }
    except (ValueError, NotImplementedError) as error:
        return {"modules": 0, "patterns": [], "fallbacks": {str(error): 1}}


def lines(found: dict) -> Iterator[str | Text]:
    """The same for people: the machine in some lines, then a block for each model."""
    can = found["capabilities"]
    yield f"moefuse {found['moefuse']}, mlx {found['mlx']}, mlx-lm {found['mlx_lm']}"
    yield f"  cpu        {can['isa']} kernels, {can['threads']} threads"
    yield from _device_lines(found["device"], can)
    made = ", ".join(name for name in ("nvcc", "cuda", "metal") if can[name]) or "none"
    yield f"  found      {made} (of nvcc, cuda, metal)"
    yield f"  step       {'built' if can['step'] else 'not built'}"
    yield f"  zmlx       mx.gather_qmm_swiglu is {'ours' if can['zmlx_primitive'] else 'not set'}"
    yield f"  memory     measured by {found['memory_source']}"
    set_flags = {**can["flags"], **found["env"]}
    yield f"  flags      {', '.join(f'{k}={v}' for k, v in set_flags.items()) or 'none set'}"
    for model in found["models"]:
        yield ""
        yield from _model_lines(model)


def _device_lines(device: str, can: dict) -> Iterator[str]:
    gpu = can["devices"]["gpu"]
    yield f"  default    {device}"
    if not gpu["available"]:
        yield f"  gpu        none ({gpu['reason']})"
    else:
        why = f" ({gpu['reason']})" if gpu["reason"] else ""
        yield f"  gpu        {'fused' if gpu['fused'] else 'stock'}{why}"


def _model_lines(model: dict) -> Iterator[str | Text]:
    if "error" in model:
        yield Text.assemble((model["name"], "bold"), ": ", (model["error"], "red"))
        return
    bits = model.get("quantization", {})
    how = f", {bits['bits']} bits in groups of {bits['group_size']}" if "bits" in bits else ""
    yield Text.assemble((model["name"], "bold"), f": {model['model_type']}, {model['kind']}{how}")
    if model["geometry"]:
        yield "  " + ", ".join(f"{k} {v}" for k, v in model["geometry"].items())
    for part, state in model["fused"].items():
        count, why = state["modules"], "; ".join(state["fallbacks"])
        what = "model" if part == "step" else "blocks"
        told = (f"fused in {count} {what}", "green") if count else ("stock", "yellow")
        yield Text.assemble(f"  {part:<16}", told, f": {why}" if why else "")
    if "plan" in model:
        yield ""
        yield from plan.lines(model["plan"])
