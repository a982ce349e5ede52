"""What a capsule says about the machine: enough to compare, nothing that names it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import mlx.core as mx

from .. import _core

FLAGS = ("ZMLX_", "MOEFUSE_", "MLX_", "OMP_")
COMMIT = "MOEFUSE_GIT_COMMIT"
ISA_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON"}  # of the kernel tables


def stamp(time: str) -> str:
    """A `now()` as names of campaigns have it."""
    return time.replace("-", "").replace(":", "")


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", "-C", str(root), *args), capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def repository_root() -> Path:
    """The git work tree around the current folder, else the current folder."""
    top = _git(Path.cwd(), "rev-parse", "--show-toplevel")
    return Path(top) if top else Path.cwd()


def commit(root: Path) -> str | None:
    """Short commit, with "-dirty" when tracked code differs from it.

    Outside git what MOEFUSE_GIT_COMMIT says: of a copy that was sent without its history.
    """
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get(COMMIT)
    code = ("CMakeLists.txt", "include", "src", "python")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return head + ("-dirty" if changed else "")


def clean(commit: str | None) -> bool:
    """Whether it names code that can be checked out again."""
    return bool(commit) and not commit.endswith("-dirty")


def relative(path: Path, root: Path) -> str:
    """Path as a capsule may show it: relative to the repository, else its last part alone."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _os_name() -> str:
    if platform.system() == "Linux":
        try:
            return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
        except OSError:
            return "Linux"
    return f"{platform.system()} {platform.mac_ver()[0]}".strip()


def device_name() -> str:
    """The default MLX device in words: `cuda: NVIDIA H200`, `cpu: Intel ..., 2 cores`.

    What the ledger tells machines apart by, so a CPU's name ends in the instruction set of the
    kernels where that is not the usual one.
    """
    device = mx.default_device()
    info = mx.device_info(device)
    name = info.get("device_name") or info.get("architecture") or platform.machine()
    if device.type == mx.cpu:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"cpu: {name}, {cores} cores{_unusual_isa()}"
    return f"{'cuda' if mx.cuda.is_available() else 'metal'}: {name}"


def _unusual_isa() -> str:
    """Two processors of one brand may differ in it. Rows older than this are all of AVX-512, so
    that goes without saying, unless MOEFUSE_ISA asks for it: that leaves the AMX tiles out."""
    isa = _core.cpu_isa()
    if isa == "avx512" and not os.environ.get("MOEFUSE_ISA"):
        return ""
    return f", {ISA_NAMES.get(isa, isa)}"


def gpu() -> dict | None:
    """The GPU that is the default device: what MLX and the driver say of it; None on a CPU."""
    device = mx.default_device()
    if device.type == mx.cpu:
        return None
    info = mx.device_info(device)
    memory = info.get("total_memory") or info.get("memory_size")
    found = {
        "name": str(info.get("device_name", "unknown")),
        "architecture": str(info.get("architecture", "unknown")),
        "memory_gb": round(memory / 1e9, 1) if memory else None,
    }
    return {**found, **_nvidia_smi()}


def _nvidia_smi() -> dict[str, str]:
    """The driver's version and the limits, by nvidia-smi; nothing where there is none."""
    fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    try:
        done = subprocess.run(
            ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"),
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [word.strip() for word in done.stdout.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=False))


def flags() -> dict[str, str]:
    """Environment settings that change what runs; a value that is a path is not repeated."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(FLAGS)}
    found.pop(COMMIT, None)
    return {k: "(a path)" if "/" in v else v for k, v in found.items()}


def version_of(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def meta(engine, root: Path, command: str) -> dict:
    """The capsule's `meta`, but for what the campaign itself adds. memory_gb is the host's."""
    capabilities = engine.capabilities()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": now(),
        "device": device_name(),
        "memory_gb": round(memory / 1e9, 1),
        **({"gpu": found} if (found := gpu()) else {}),
        "os": f"{_os_name()} {platform.machine()}",
        "mlx_version": version_of("mlx"),
        "mlx_lm_version": version_of("mlx-lm"),
        "moefuse_version": engine.__version__,
        "git_commit": commit(root),
        "python": platform.python_version(),
        "compiler": _without_paths(capabilities.get("compiler")),
        "capabilities": _without_paths(capabilities),
        "env": flags(),
        "command": command,
    }


def _without_paths(value):
    if isinstance(value, dict):
        return {str(k): _without_paths(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(v) for v in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)
