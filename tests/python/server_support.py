"""mlx-lm's server as a child on a free loopback port, stock or patched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 300  # on a machine with much else to do


@dataclass
class Server:
    """base: its address; pid: the process that serves."""

    base: str
    pid: int


def child_env(**extra: str) -> dict[str, str]:
    """This environment without flags of ours, with this interpreter's path, offline."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOEFUSE_", "ZMLX_"))}
    path = os.pathsep.join(p for p in sys.path if p)
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **extra}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(child: subprocess.Popen, base: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{base}/health", timeout=5).close()
            return
        except OSError:
            if child.poll() is not None or time.monotonic() > deadline:
                told = log.read_text()[-2000:]
                raise RuntimeError(f"the server did not come up: {told}") from None
            time.sleep(0.2)


@contextmanager
def serve(module: str, model: Path, log: Path, **env: str) -> Iterator[Server]:
    """`python -m MODULE server` on `model`; module is mlx_lm or moefuse.mlx_lm."""
    port = _free_port()
    words = ["server", "--model", str(model), "--port", str(port), "--temp", "0"]
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *words], env=child_env(**env), stdout=out, stderr=out
        )
    base = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(child, base, log)
        yield Server(base, child.pid)
    finally:
        child.terminate()
        child.wait(timeout=30)
