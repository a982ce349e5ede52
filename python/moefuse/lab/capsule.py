"""Repro capsules: written whole and checked against the schema, or not at all."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jsonschema

from . import LabError, cells, files

FOLDER = "repro_capsules"
SCHEMA_NAME = "capsule.schema.json"
SCHEMA_PATH = Path(__file__).with_name(SCHEMA_NAME)


@cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text(encoding="utf-8")))


def check(capsule: dict, name: str) -> None:
    """Raise LabError for the first field that breaks the schema, or cells that do not add up."""
    error = jsonschema.exceptions.best_match(_validator().iter_errors(capsule))
    if error:
        raise LabError(f"[capsule] {name} {error.json_path}: {error.message}")
    if is_cells(capsule):
        cells.check(capsule, name)


def is_cells(capsule: dict) -> bool:
    """Whether it holds cells, and no variant's part of a campaign."""
    return capsule.get("kind") == cells.KIND


def write(out: Path, name: str, capsule: dict, again: bool = False) -> str:
    """Store a capsule that is new by name; returns its path relative to `out`.

    again: put it in the place of what this process has stored by that name.
    """
    check(capsule, name)
    relative = f"{FOLDER}/{name}.json"
    (out / FOLDER).mkdir(exist_ok=True)
    path = files.inside(out / FOLDER, f"{name}.json")
    if path.exists() and not again:
        raise LabError(f"[capsule] {relative}: expected a new name, got one already taken")
    files.write_atomic(path, files.dump_json(capsule))
    return relative


def read(path: Path) -> dict:
    """A stored capsule, checked. Raises LabError when it is absent, torn or off schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"[capsule] {path.name}: expected a file, got {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LabError(f"[capsule] {path.name}: expected JSON, got {error}") from None
    check(found, path.name)
    return found


def row(capsule: dict, relative: str) -> dict:
    """The ledger row of a capsule stored at `relative`."""
    meta, model = capsule["meta"], capsule["model"]
    return {
        "model_id": Path(model["path"]).name,
        "model_family": model["model_type"],
        "architecture": "moe",
        "model_kind": model["kind"],
        "variant": capsule["variant"],
        "quick": meta["quick"],
        "campaign": meta["campaign"],
        "env": meta["env"],
        "hardware": meta["device"],
        "versions": {k: meta[f"{k}_version"] for k in ("mlx", "mlx_lm", "moefuse")},
        "git_commit": meta["git_commit"],
        "timestamp": meta["date"],
        **(cells.row(capsule) if is_cells(capsule) else _pairs(capsule)),
        "capsule": relative,
        "model_digest": model["digest"],
    }


def _pairs(capsule: dict) -> dict:
    """What a row says of a variant's pairs and its verdict."""
    fidelity, summary = capsule["fidelity"], capsule["summary"]
    base, patched = capsule["baseline"], capsule["patched"]
    return {
        "patterns_applied": patched["patterns"],
        "fidelity": fidelity["verdict"],
        "fidelity_detail": f"{fidelity['matched']}/{fidelity['total']} tokens identical",
        "modules_patched": patched["modules_patched"],
        "decode_tps_baseline": base["median_decode_tok_s"],
        "decode_tps_patched": patched["median_decode_tok_s"],
        "decode_speedup": summary["decode_speedup"],
        "decode_runs_baseline": base["decode_tok_s"],
        "decode_runs_patched": patched["decode_tok_s"],
        "prefill_tps_baseline": base["median_prefill_tok_s"],
        "prefill_tps_patched": patched["median_prefill_tok_s"],
        "prefill_change": summary["prefill_change"],
        "peak_mem_baseline_gb": base["peak_mem_gb"],
        "peak_mem_patched_gb": patched["peak_mem_gb"],
        "max_tokens": capsule["max_tokens"],
        "gen_tokens": patched["decoded_tokens"],
        "runs": capsule["runs"],
        "decision": summary["decision"],
        "reason": summary["reason"],
    }
