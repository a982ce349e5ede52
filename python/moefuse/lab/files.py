"""Writing so that a crash leaves the old file or the new one, never half of either."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import LabError


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by way of a temporary file in the same folder; LabError if that can't be."""
    with told_by_name(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                os.fchmod(stream.fileno(), 0o644)
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def told_by_name(path: Path) -> Iterator[None]:
    """A full disk says neither which file nor which folder."""
    try:
        yield
    except OSError as error:
        raise LabError(f"[output] {path}: expected to write it, got {error.strerror}") from None


def dump_json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if absent) against other lab processes."""
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for one campaign, or raise LabError while another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(
                f"[output] {folder}: expected no campaign at work there, got one"
            ) from None
        yield
    finally:
        os.close(handle)


def require_text(what: str, path: Path) -> None:
    """Raise LabError for a path that is not UTF-8: neither MLX nor a capsule can hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise LabError(
            f"[{what}] {str(path)!a}: expected a path in UTF-8, got other bytes"
        ) from None


def require_writable(folder: Path) -> None:
    """Create the output folder and prove that a file can be written, or raise LabError."""
    require_text("output", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LabError(
            f"[output] {folder}: expected a writable folder, got {error.strerror}"
        ) from None


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, refused if it leads out of `root` (also through a link)."""
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise LabError(f"[path] {relative!r}: expected a path inside the repository, got one out")
    return path
