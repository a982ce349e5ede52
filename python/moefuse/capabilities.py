"""What this machine, these wheels and this process's flags allow."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil

import mlx.core as mx

from . import _core, flags
from .zmlx import has_zmlx_primitive


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, dict]:
    cpu = {"available": True, "fused": True, "reason": None}
    if not mx.is_available(mx.gpu):
        return {"cpu": cpu, "gpu": {"available": False, "fused": False, "reason": "MLX sees none"}}
    if mx.metal.is_available():
        reason = "emulated, never run on Apple hardware"
        return {"cpu": cpu, "gpu": {"available": True, "fused": True, "reason": reason}}
    return {"cpu": cpu, "gpu": {"available": True, "fused": True, "reason": None}}


def capabilities() -> dict:
    """A dict of plain JSON types.

    isa: the CPU instruction set in use; threads; versions of mlx, mlx_lm and moefuse (None: not
    installed as a package); devices: available, fused, and the reason why not, or a warning; nvcc,
    cuda, metal: found or not; zmlx_primitive: whether mx.gather_qmm_swiglu is ours; step: whether
    the whole decode step is built; flags: those set.
    """
    return {
        "isa": _core.cpu_isa(),
        "threads": _core.cpu_threads(),
        "versions": {name: _version(name.replace("_", "-")) for name in ("mlx", "mlx_lm")}
        | {"moefuse": _version("moefuse")},
        "devices": _devices(),
        "nvcc": shutil.which("nvcc") is not None,
        "cuda": mx.cuda.is_available(),
        "metal": mx.metal.is_available(),
        "zmlx_primitive": has_zmlx_primitive(),
        "step": importlib.util.find_spec("moefuse.step") is not None,
        "variants": list(flags.VARIANTS),
        "flags": flags.in_force(),
    }
