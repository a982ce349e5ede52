"""Evidence measured elsewhere joins the ledger: capsules, their rows, notebook entries."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from . import LabError, bench, capsule, environment, files, ledger, notebook

# Python 3.11.2, Debian 12's, has no filters; _check_members does not need them.
_FILTER = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def _check_members(source: Path, packed: tarfile.TarFile) -> None:
    """Raises LabError on what is no plain file or folder inside the folder it is unpacked to."""
    for member in packed.getmembers():
        path = PurePosixPath(member.name)
        plain = member.isfile() or member.isdir()
        if not plain or path.is_absolute() or ".." in path.parts:
            raise LabError(
                f"[import] {source.name}: expected plain files and folders, got {member.name!r}"
            )


@contextmanager
def _folder(source: Path) -> Iterator[Path]:
    """`source` itself, or what the packed folder `evidence.tar.gz` holds, for the block."""
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory() as kept:
        try:
            with tarfile.open(source) as packed:
                _check_members(source, packed)
                packed.extractall(kept, **_FILTER)
        except (OSError, EOFError, tarfile.TarError) as error:
            raise LabError(
                f"[import] {source.name}: expected a folder or a tar archive, got {error}"
            ) from None
        found = [path.parent for path in Path(kept).rglob(capsule.FOLDER) if path.is_dir()]
        if len(found) != 1:
            raise LabError(
                f"[import] {source.name}: expected one {capsule.FOLDER}/, got {len(found)}"
            )
        yield found[0]


def _news(source: Path, out: Path) -> dict[str, dict]:
    """Checked capsules that the ledger of `out` lacks, by relative path; a control comes first.

    A row of the source's ledger has to be its capsule's; capsules without a row are taken too:
    a stop may fall between the two writes.
    """
    names = sorted(f"{capsule.FOLDER}/{p.name}" for p in (source / capsule.FOLDER).glob("*.json"))
    if not names:
        raise LabError(f"[import] {source.name}/{capsule.FOLDER}: expected capsules, got none")
    every = {name: capsule.read(files.inside(source, name)) for name in names}
    rows, _ = ledger.read(source / ledger.NAME)
    for row in rows:
        if row["capsule"] not in every:
            raise LabError(f"[import] {row['capsule']}: expected the capsule of a row, got none")
        if row != capsule.row(every[row["capsule"]], row["capsule"]):
            raise LabError(f"[import] {row['capsule']}: row and capsule differ")
    parts = [found for found in every.values() if not capsule.is_cells(found)]
    controls = {found["control"]["capsule"] for found in parts}
    listed = {row["capsule"] for row in ledger.read(out / ledger.NAME)[0]}
    fresh = {}
    for name in sorted(every, key=lambda n: _order(every[n])):
        _require_code(name, every[name])
        here = files.inside(out, name)
        if here.exists() and capsule.read(here) != every[name]:
            raise LabError(f"[import] {name}: expected the same capsule or none, got another")
        if name not in listed:
            fresh[name] = every[name]
    for stem in controls:
        if f"{capsule.FOLDER}/{stem}.json" not in every:
            raise LabError(f"[import] {stem}: expected the control of a campaign, got none")
    return fresh


def _order(found: dict) -> tuple:
    later = capsule.is_cells(found) or found["summary"]["decision"] != "control"
    return found["meta"]["campaign"], later, found["meta"]["date"], found["variant"]


def _require_code(name: str, found: dict) -> None:
    """Only figures of code that can be checked out again enter the ledger."""
    commit = found["meta"]["git_commit"]
    if not environment.clean(commit):
        raise LabError(f"[import] {name} git_commit: expected a clean commit, got {commit}")


def take(source: Path, out: Path) -> list[str]:
    """Append what `source` has and `out` lacks; returns the new capsules' paths.

    source: an output folder of `bench`, or one packed by benchmarks/cuda/campaign.sh. Everything
    is checked before anything is written. A second call finds nothing new. A campaign that its
    machine did not live to write up gets an entry that says so.
    """
    bench.prepare(out)
    with files.alone(out), _folder(source) as folder:
        fresh = _news(folder, out)
        for name, found in fresh.items():
            if not (out / name).exists():
                capsule.write(out, Path(name).stem, found)
            ledger.append(out / ledger.NAME, capsule.row(found, name))
        written = folder / notebook.NAME
        text = written.read_text(encoding="utf-8") if written.exists() else ""
        for campaign in sorted({found["meta"]["campaign"] for found in fresh.values()}):
            if entry := notebook.of_campaign(text, campaign):
                notebook.add(out / notebook.NAME, campaign, entry)
        bench.write_up_stopped(out)
        bench.write_ranking(out)
    return list(fresh)
