"""What this machine and these models can do with moefuse, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

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
        found = checkpoint.inspect(path)
        model = checkpoint.load_weights(found, lazy=True)
    except LabError as error:
        return {"name": path.name, "error": str(error)}
    looked = {
        "name": found.name,
        "model_type": found.model_type,
        "kind": found.kind,
        "geometry": found.geometry,
        "quantization": found.quantization,
        "fused": {part: _try(engine, model, part) for part in variants.PARTS},
    }
    if plan_accumulate is not None:
        looked["plan"] = plan.examine(model, plan_accumulate)
    return looked


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


def lines(found: dict) -> Iterator[str]:
    """The same for people."""
    for key in ("moefuse", "mlx", "mlx_lm", "device", "memory_source"):
        yield f"{key:<16}{found[key]}"
    for name, value in {**found["capabilities"], **found["env"]}.items():
        yield f"{name:<16}{value}"
    for model in found["models"]:
        yield ""
        if "error" in model:
            yield f"{model['name']}: {model['error']}"
            continue
        shape = ", ".join(f"{k} {v}" for k, v in model["geometry"].items())
        yield f"{model['name']}: {model['model_type']} ({model['kind']}); {shape}"
        for part, state in model["fused"].items():
            why = "; ".join(state["fallbacks"])
            told = f"{state['modules']} modules" if state["modules"] else "not fused"
            yield f"  {part:<16}{told}{': ' + why if why else ''}"
        if "plan" in model:
            yield ""
            yield from plan.lines(model["plan"])
