"""LAB_NOTEBOOK.md: one entry per campaign, every sentence derived from its capsules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import files

NAME = "LAB_NOTEBOOK.md"
HEADER = """# Lab notebook

One entry per campaign or run of cells, newest last, written by `moefuse bench` and `moefuse cells`.
"""


STOPPED = "A stop left this campaign unfinished; `bench --resume` goes on with it."


def read(out: Path) -> str:
    """The notebook of a folder, empty where there is none yet."""
    path = out / NAME
    return path.read_text(encoding="utf-8") if path.exists() else ""


def span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


def result_line(found: dict) -> str:
    """One variant in one line: gain, its interval, verdict, decision."""
    s, f = found["summary"], found["fidelity"]
    return (
        f"- `{found['variant']}`: {s['decode_speedup']:.3f}x decode [{span(s['interval'])}], "
        f"prefill {s['prefill_change']:+.1%}, {f['verdict']} ({f['matched']}/{f['total']}), "
        f"{s['decision']}"
    )


def _interpretation(control: dict, found: Sequence[dict]) -> list[str]:
    aa = control["control"]
    lines = [
        f"Stock against itself spans {span(aa['aa_interval'])}: no ratio inside it means anything."
    ]
    if aa["self_matched"] < aa["self_total"]:
        lines.append(
            f"Stock is not deterministic here: {aa['self_matched']}/{aa['self_total']} tokens "
            "agree between its own runs, so identity is not attainable by any variant."
        )
        if noise := (aa.get("self_logits") or {}).get("difference"):
            lines.append(
                "The logits against the oracle decide, and a variant has to be shown closer by "
                f"more than stock's own two passes seem to differ by, {max(map(abs, noise)):.1%} "
                "of its squared error."
            )
    if "fail" in (control["fidelity"]["verdict"], aa.get("undamaged", {}).get("stock")):
        lines.append(
            "The gate fails stock against itself: it passes only what is shown closer to the "
            "oracle, and a fault caught under stock proves nothing here."
        )
    if "faults_beside" in aa:
        told = ", ".join(f"{k} {v}" for k, v in aa["faults_beside"].items())
        if aa["beside"] in aa.get("undamaged", {}):
            told += f"; without a fault {aa['undamaged'][aa['beside']]}"
        lines.append(f"Faults planted under `{aa['beside']}`: {told}.")
    for name, error in aa.get("fault_errors_beside", {}).items():
        could = "could not hide" if error["ruled_out"] else "is not shown unable to hide"
        lines.append(
            f"With `{name}` its rms error is {error['variant']:.3g} against stock's "
            f"{error['stock']:.3g}; without it it {could} such damage."
        )
    missed = [name for name, verdict in aa["faults"].items() if verdict != "fail"]
    if missed:
        lines.append(f"The fidelity gate missed planted faults ({', '.join(missed)}): distrust it.")
    else:
        lines.append("The fidelity gate failed every planted fault, as it must.")
    errors = aa.get("fault_errors", {})
    silent = [k for k, e in errors.items() if e and e.get("matched", 0) == e.get("total")]
    if silent := [name for name in silent if aa["faults"][name] == "fail"]:
        lines.append(f"Caught by their logits alone, every token equal: {', '.join(silent)}.")
    above = [c["variant"] for c in found if c["summary"]["interval"][0] > aa["aa_interval"][1]]
    lines.append(f"Beyond the A/A interval: {', '.join(f'`{v}`' for v in above) or 'none'}.")
    return lines


def _next(found: Sequence[dict], quick: bool) -> list[str]:
    decisions = {c["variant"]: c["summary"]["decision"] for c in found}
    lines = []
    void = [v for v, d in decisions.items() if d.startswith("void")]
    if void:
        lines.append(f"Find out why {', '.join(f'`{v}`' for v in void)} did not run.")
    if quick:
        lines.append("Repeat at full length (`moefuse bench` without `--quick`) before believing.")
    held = [v for v, d in decisions.items() if d == "hold"]
    if held and not quick:
        lines.append(f"More runs, or drop: {', '.join(f'`{v}`' for v in held)}.")
    return lines or ["Nothing follows from this campaign alone."]


def entry(
    control: dict, found: Sequence[dict], skipped: dict[str, str], stopped: bool = False
) -> str:
    """The text of one entry. `found`: variant capsules; `skipped`: variant -> why not measured."""
    meta, model = control["meta"], control["model"]
    sizes = ", ".join(
        f"{k} {control['max_tokens'][k]} tokens x {control['runs'][k]} runs"
        for k in control["max_tokens"]
    )
    names = ", ".join(f"`{c['variant']}`" for c in found) or "none"
    best = [c for c in found if c["summary"]["decision"] == "promote"]
    best.sort(key=lambda c: -c["summary"]["decode_speedup"])
    every = (control, *found)
    sections = {
        "Question": [
            f"Do {names} decode {Path(model['path']).name} faster than stock mlx-lm on "
            f"{meta['device']}, with stock's tokens?"
        ],
        "Code delta": [_versions(meta)],
        "Method": [
            f"`{meta['command']}`: {sizes}; A B B A order, {len(control['prompts'])} prompts, "
            f"greedy, {'quick' if meta['quick'] else 'full'} lengths. A/A control in the same "
            "campaign; bootstrap 95 % intervals of the paired ratio; peak memory by "
            f"{meta['memory_source']}."
        ],
        "Capsules": [f"- `repro_capsules/{meta['campaign']}-*.json` ({len(every)})"],
        "Results": [result_line(c) for c in every]
        + [f"- `{name}`: not measured: {why}" for name, why in skipped.items()],
        "Interpretation": _interpretation(control, found),
        "Decision": [f"Promote `{best[0]['variant']}`."] if best else ["Promote nothing."],
        "Next": [*([STOPPED] if stopped else []), *_next(found, meta["quick"])],
    }
    return _entry(meta["campaign"], sections)


def cells_entry(found: Sequence[dict]) -> str:
    """The text of a sweep's entry, from its capsules of cells, one a variant."""
    meta, model, asked = found[0]["meta"], found[0]["model"], found[0]["asked"]
    names = ", ".join(f"`{one['variant']}`" for one in found)
    contexts, batches = (" ".join(map(str, asked[k])) for k in ("contexts", "batches"))
    sections = {
        "Question": [
            f"At which contexts and batches does {names} decode {Path(model['path']).name} faster "
            f"than stock mlx-lm on {meta['device']}, and by how much?"
        ],
        "Code delta": [_versions(meta)],
        "Method": [
            f"`{meta['command']}`: contexts {contexts}; batches {batches}; {asked['tokens']} "
            f"tokens a row, {asked['runs']} pairs a cell, A B C and C B A with stock as A and C, "
            "from stock's cache, greedy. A/A is C beside A; bootstrap 95 % intervals of the paired "
            f"ratio; peak memory by {meta['memory_source']}."
        ],
        "Capsules": [f"- `repro_capsules/{meta['campaign']}-*.json` ({len(found)})"],
        "Results": [line for one in found for line in _cell_lines(one)],
        "Interpretation": [
            f"`{one['variant']}` is beyond the A/A interval in {_beyond(one)} of "
            f"{len(one['cells'])} cells." for one in found
        ],
        "Decision": ["None: cells inform, campaigns decide."],
        "Next": [_cells_next(one) for one in found],
    }  # fmt: skip
    return _entry(meta["campaign"], sections)


def _cell_lines(found: dict) -> list[str]:
    lines = []
    for cell in found["cells"]:
        where = f"- `{found['variant']}`, context {cell['context']}, batch {cell['batch']}: "
        if cell["void"] is not None:
            lines.append(f"{where}void: {cell['void']}")
            continue
        lines.append(
            f"{where}{cell['decode_speedup']:.3f}x decode [{span(cell['interval'])}], A/A "
            f"{span(cell['aa_interval'])}, {cell['median_baseline_tok_s']:.1f} -> "
            f"{cell['median_patched_tok_s']:.1f} tok/s, {cell['same_steps']}/"
            f"{found['asked']['tokens']} steps are stock's"
        )
    return lines


def _beyond(found: dict) -> int:
    measured = [cell for cell in found["cells"] if cell["void"] is None]
    return sum(cell["interval"][0] > cell["aa_interval"][1] for cell in measured)


def _cells_next(found: dict) -> str:
    asked = found["asked"]
    left = len(asked["contexts"]) * len(asked["batches"]) - len(found["cells"])
    if left:
        return f"A stop or the time's end left {left} cells of `{found['variant']}` unmeasured."
    return f"Nothing follows from the cells of `{found['variant']}` alone."


def _entry(campaign: str, sections: dict[str, list[str]]) -> str:
    body = "\n\n".join(f"**{name}.** " + _join(lines) for name, lines in sections.items())
    return f"\n## EXP-{campaign}\n\n{body}\n"


def _versions(meta: dict) -> str:
    return (
        f"moefuse {meta['moefuse_version']} at commit {meta['git_commit'] or 'unknown'}; "
        f"mlx {meta['mlx_version']}, mlx-lm {meta['mlx_lm_version']}. "
        "Stock and variant differ in the patch alone, put on and taken off in one process."
    )


def _join(lines: Sequence[str]) -> str:
    return "\n" + "\n".join(lines) if lines[0].startswith("- ") else " ".join(lines)


def of_campaign(text: str, name: str) -> str:
    """The entry of one campaign in the notebook's text; empty if there is none."""
    start = text.find(f"\n## EXP-{name}\n")
    if start < 0:
        return ""
    end = text.find("\n## EXP-", start + 1)
    return text[start:] if end < 0 else text[start:end]


def add(path: Path, name: str, text: str) -> None:
    """Append a campaign's entry, or put it in the place of an earlier one; whole or not at all."""
    with files.locked(path.with_name(f".{path.name}.lock")):
        old = path.read_text(encoding="utf-8") if path.exists() else HEADER
        former = of_campaign(old, name)
        files.write_atomic(path, old.replace(former, text) if former else old + text)
