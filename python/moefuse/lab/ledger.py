"""matrix.jsonl: one row per capsule, append-only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

from . import files

NAME = "matrix.jsonl"
KEYS = ("capsule", "model_digest", "variant", "hardware", "timestamp")  # what a row is found by


def append(path: Path, row: dict) -> None:
    """Add one row in a single write under a lock, whole or not at all (LabError).

    A torn last line, which a machine that stopped may leave, is closed off first.
    """
    data = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with files.told_by_name(path), path.open("a+b", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                data = b"\n" + data
        try:
            if stream.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(size)
            raise


def read(path: Path) -> tuple[list[dict], list[str]]:
    """(rows in order, complaints about lines that are no rows); no file is no rows."""
    if not path.exists():
        return [], []
    rows, complaints = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in KEYS):
                raise ValueError(f"expected an object with the strings {', '.join(KEYS)}")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            complaints.append(f"[ledger] {path.name} line {number}: {error}; left out")
    return rows, complaints


def latest(rows: list[dict]) -> list[dict]:
    """The newest row per (model, variant, hardware, quick); a later line wins a tie."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda r: r["timestamp"]):
        key = (row["model_digest"], row["variant"], row["hardware"], bool(row.get("quick")))
        found[key] = row
    return list(found.values())
