"""Timed runs on disk as they end, so that a stop costs one slot of a campaign and not its pairs.

A file a campaign, gone when it is written up: its settings on the first line, then a line a slot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from . import files
from .measure import Run

FOLDER = ".runs"


class Slots:
    """The slots of one campaign that have been measured: name -> one record a run.

    settings: what a later part has to have in common; asked for with the first slot, since it
    may take a while.
    """

    def __init__(self, out: Path, identity: str, settings: Callable[[], dict]):
        self.path = out / FOLDER / f"{identity}.jsonl"
        self.settings = settings
        self.found: dict[str, list[dict]] = {}
        lines = _lines(self.path)
        if lines and lines[0] == settings():
            self.found = {name: records for line in lines[1:] for name, records in line.items()}
            whole = "".join(json.dumps(line) + "\n" for line in lines)
            files.write_atomic(self.path, whole)  # a torn end would swallow what comes next
        else:
            self.path.unlink(missing_ok=True)

    def keep(self, name: str, records: list[dict]) -> None:
        """Add a slot; it is on disk when this returns."""
        self.found[name] = records
        with files.told_by_name(self.path):
            self.path.parent.mkdir(exist_ok=True)
            new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as stream:
                for line in [self.settings()] * new + [{name: records}]:
                    stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())

    def forget(self) -> None:
        """The campaign is written up."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def newest(out: Path, settings: dict) -> str | None:
    """Id of the newest campaign with these settings of which runs are kept."""
    found = [path.stem for path in (out / FOLDER).glob("*.jsonl") if _lines(path)[:1] == [settings]]
    return max(found, default=None)


def record(run: Run, counted: dict) -> dict:
    """A run and what its side counted meanwhile, as a line holds them."""
    return {"run": asdict(run), "counted": counted}


def run_of(found: dict) -> Run:
    """The run of a record."""
    return Run(**{**found["run"], "tokens": tuple(found["run"]["tokens"])})


def _lines(path: Path) -> list[dict]:
    """The whole lines of a file; a stop may have torn the last one."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
