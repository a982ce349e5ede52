"""mlx-lm's own commands on a patched model: `python -m moefuse.mlx_lm generate --model ...`.

The arguments, the output and the exit code are mlx_lm's; MOEFUSE_* and ZMLX_* flags choose what is
fused. A model of a family that patch() does not know is told once and runs as it is. With
MOEFUSE_LOG=info stderr says what was fused, and at the end what ran and what fell back.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import flags
from .families import FAMILIES
from .patch import PatchReport, patch

log = logging.getLogger("moefuse")
COMMANDS = ("generate", "chat", "server", "cache_prompt", "perplexity", "evaluate", "benchmark")
_LOADERS = ("load", "sharded_load")


def _patching(load: Callable, reports: list[PatchReport]) -> Callable:
    @functools.wraps(load)
    def loaded(*args, **kwargs):
        found = load(*args, **kwargs)
        model = found[0]
        kind = getattr(model, "model_type", None)
        if kind in FAMILIES:
            report = patch(model)
            reports.append(report)
            fused = ", ".join(report.patterns) or "nothing"
            log.info("%s: %s fused in %d modules", kind, fused, report.modules_patched)
        else:
            log.warning("%s is not among %s: it runs as it is", kind, sorted(FAMILIES))
        return found

    return loaded


@contextmanager
def patched_loaders(command: str, reports: list[PatchReport] | None = None) -> Iterator:
    """mlx_lm's module of that name, whose loaders patch what they load while the block lasts.

    reports: gets a report for each model that was patched.
    """
    reports = [] if reports is None else reports
    module = importlib.import_module(f"mlx_lm.{command}")
    before = {name: getattr(module, name) for name in _LOADERS if hasattr(module, name)}
    for name, load in before.items():
        setattr(module, name, _patching(load, reports))
    try:
        yield module
    finally:
        for name, load in before.items():
            setattr(module, name, load)


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("moefuse: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level.upper())
    log.propagate = False


def main() -> None:
    """Entry point of `python -m moefuse.mlx_lm`; exit code 2 on a wrong command or flag."""
    usage = (
        f"usage: python -m moefuse.mlx_lm COMMAND ..., COMMAND one of {', '.join(COMMANDS)}\n\n"
        'Example: MOEFUSE_LOG=info python -m moefuse.mlx_lm generate --model PATH --prompt "Hi"\n\n'
        "Exit codes: mlx_lm's own; 2 for an unknown command or a flag that cannot be read."
    )
    command = sys.argv[1].removeprefix("mlx_lm.") if len(sys.argv) > 1 else None
    if command in ("-h", "--help"):
        print(usage)
        return
    try:
        if command not in COMMANDS:
            raise ValueError(f"[mlx_lm] command: expected one of {COMMANDS}, got {command!r}")
        if (level := flags.check()) is not None:
            _log_to_stderr(level)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    reports: list[PatchReport] = []
    try:
        with patched_loaders(command, reports) as module:
            module.main()
    finally:
        for report in reports:
            log.info("ran %s, fell back %s", report.calls or "nothing", report.fallbacks or "never")


if __name__ == "__main__":
    main()
