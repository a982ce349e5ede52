"""What a stop leaves of a campaign: its capsules, and timed runs, which go to disk as they end.

Runs are a file a campaign, gone when it is written up: its settings on the first line, then a
line a slot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from . import capsule, environment, files, ledger, notebook
from .checkpoint import Checkpoint
from .measure import Run
from .schedule import Plan

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


def unlisted(out: Path, start: str = "") -> list[dict]:
    """Rows of capsules that the ledger lacks: a process died between the two writes."""
    rows, _ = ledger.read(out / ledger.NAME)
    listed = {row["capsule"] for row in rows}
    whole = [p.name for p in (out / capsule.FOLDER).glob("*.json") if p.name.startswith(start)]
    missing = sorted({f"{capsule.FOLDER}/{name}" for name in whole} - listed)
    return [capsule.row(capsule.read(out / name), name) for name in missing]


def settings(checkpoint: Checkpoint, plan: Plan, root: Path) -> dict:
    """What two parts of one campaign have in common, by the names that a ledger's row has."""
    return {
        "model_digest": checkpoint.digest,
        "hardware": environment.device_name(),
        "quick": plan.quick,
        "max_tokens": {k: tokens for k, (tokens, _) in plan.lengths.items()},
        "runs": {k: runs for k, (_, runs) in plan.lengths.items()},
        "git_commit": environment.commit(root),
        "env": environment.flags(),
    }


def unfinished(out: Path, checkpoint: Checkpoint, plan: Plan, root: Path) -> str | None:
    """Id of the newest campaign with these settings, code and machine, if not written up yet."""
    rows, _ = ledger.read(out / ledger.NAME)
    same = settings(checkpoint, plan, root)
    rows += unlisted(out)
    ids = [r["campaign"] for r in rows if all(r.get(k) == v for k, v in same.items())]
    if kept := newest(out, same):
        ids.append(kept)
    written = notebook.read(out)
    name = max(ids, default=None)
    entry = notebook.of_campaign(written, name) if name else ""
    return name if not entry or notebook.STOPPED in entry else None


def stored(out: Path, identity: str) -> dict[str, dict]:
    """Variant name -> capsule of one campaign; those that the ledger lacks are added to it."""
    for row in unlisted(out, identity):
        if row["campaign"] == identity:
            ledger.append(out / ledger.NAME, row)
    rows, _ = ledger.read(out / ledger.NAME)
    mine = [row for row in rows if row.get("campaign") == identity]
    return {row["variant"]: capsule.read(files.inside(out, row["capsule"])) for row in mine}
