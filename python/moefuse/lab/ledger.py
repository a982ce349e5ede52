"""matrix.jsonl: one row per capsule, append-only."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

NAME = "matrix.jsonl"


def append(path: Path, row: dict) -> None:
    """Add one row in a single write under a lock; a torn last line is closed off first."""
    data = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                data = b"\n" + data
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


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
            if not isinstance(row, dict) or "capsule" not in row:
                raise ValueError("expected an object with a capsule")
            rows.append(row)
        except ValueError as error:
            complaints.append(f"[ledger] {path.name} line {number}: {error}; left out")
    return rows, complaints


def latest(rows: list[dict]) -> list[dict]:
    """The newest row per (model, variant, hardware, quick); a later line wins a tie."""
    found: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda r: r["timestamp"]):
        key = (row["model_digest"], row["variant"], row["hardware"], bool(row.get("quick")))
        found[key] = row
    return list(found.values())
