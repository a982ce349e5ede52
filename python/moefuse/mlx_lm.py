"""mlx-lm's own commands on a patched model: `python -m moefuse.mlx_lm generate --model ...`.

The arguments, the output and the exit code are mlx_lm's; MOEFUSE_* and ZMLX_* flags choose what is
fused. A model of a family that patch() does not know is told once and runs as it is.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .families import FAMILIES
from .patch import patch

log = logging.getLogger("moefuse")
COMMANDS = ("generate", "chat", "server", "cache_prompt", "perplexity", "evaluate", "benchmark")
_LOADERS = ("load", "sharded_load")


def _patching(load: Callable) -> Callable:
    @functools.wraps(load)
    def loaded(*args, **kwargs):
        found = load(*args, **kwargs)
        model = found[0]
        kind = getattr(model, "model_type", None)
        if kind in FAMILIES:
            report = patch(model)
            fused = ", ".join(report.patterns) or "nothing"
            log.info("%s: %s fused in %d modules", kind, fused, report.modules_patched)
        else:
            log.warning("%s is not among %s: it runs as it is", kind, sorted(FAMILIES))
        return found

    return loaded


@contextmanager
def patched_loaders(command: str) -> Iterator:
    """mlx_lm's module of that name, whose loaders patch what they load while the block lasts."""
    module = importlib.import_module(f"mlx_lm.{command}")
    before = {name: getattr(module, name) for name in _LOADERS if hasattr(module, name)}
    for name, load in before.items():
        setattr(module, name, _patching(load))
    try:
        yield module
    finally:
        for name, load in before.items():
            setattr(module, name, load)


def main() -> None:
    """Entry point of `python -m moefuse.mlx_lm`; exit code 2 on an unknown command."""
    usage = f"usage: python -m moefuse.mlx_lm COMMAND ..., COMMAND one of {', '.join(COMMANDS)}"
    command = sys.argv[1].removeprefix("mlx_lm.") if len(sys.argv) > 1 else None
    if command in ("-h", "--help"):
        print(usage)
        return
    if command not in COMMANDS:
        print(f"[mlx_lm] command: expected one of {COMMANDS}, got {command!r}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    with patched_loaders(command) as module:
        module.main()


if __name__ == "__main__":
    main()
