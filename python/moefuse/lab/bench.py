"""Drives campaigns from start to notebook entry, and repeats a stored measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import (
    LabError,
    capsule,
    checkpoint,
    files,
    ledger,
    notebook,
    prompts,
    ranking,
    sweep,
    variants,
)
from .campaign import Campaign
from .resume import stored, unfinished
from .schedule import Plan
from .variants import STOCK, Variant


@dataclass
class Outcome:
    """What one model's campaign left behind."""

    control: dict
    found: list[dict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # variant -> why
    left: list[str] = field(default_factory=list)  # not started before the deadline

    @property
    def missed_faults(self) -> list[str]:
        return [k for k, v in self.control["control"]["faults"].items() if v != "fail"]


def prepare(out: Path) -> None:
    """Make the output folder ready, or raise before anything is measured."""
    files.require_writable(out)
    files.require_writable(out / capsule.FOLDER)
    schema = capsule.SCHEMA_PATH.read_text(encoding="utf-8")
    beside = out / capsule.SCHEMA_NAME
    if not beside.exists() or beside.read_text(encoding="utf-8") != schema:
        files.write_atomic(beside, schema)


def check_inputs(
    found: checkpoint.Checkpoint, plan: Plan, prompt_file: Path | None, root: Path
) -> None:
    """Raise on tensors or a tokenizer that contradict the config, or unfit prompts."""
    checkpoint.load_weights(found, lazy=True)
    path = prompt_file or prompts.find_file(found.path, root)
    prompts.load(checkpoint.read_tokenizer(found), path, plan.prompt_limit)


def open_campaign(
    found: checkpoint.Checkpoint,
    plan: Plan,
    engine,
    *,
    prompt_file: Path | None,
    root: Path,
    out: Path,
    command: str,
    resume: bool = False,
    tick: Callable[[int], None] = lambda units: None,
    say: Callable[[str], None] = lambda line: None,
) -> Campaign:
    """A campaign on a checked model; with `resume`, the unfinished one with equal settings."""
    path = prompt_file or prompts.find_file(found.path, root)
    identity = unfinished(out, found, plan, root) if resume else None
    choose = partial(prompts.load, path=path, limit=plan.prompt_limit)
    return Campaign(
        found,
        plan,
        engine,
        prompts_of=choose,
        root=root,
        out=out,
        command=command,
        identity=identity,
        tick=tick,
        say=say,
    )


def run(
    campaign: Campaign,
    wanted: Sequence[Variant],
    told: Callable[[str, int], None] = lambda name, done: None,
    deadline: float | None = None,
    shared: bool = False,
) -> Outcome:
    """Measure the control and every variant that has no capsule yet, then write it up.

    told(variant name, how many are done) is called before each measurement. After the deadline
    (time.monotonic) no variant is started and nothing is written up: `--resume` goes on there.
    shared: the first variant is measured together with the control.
    """
    have = stored(campaign.out, campaign.id)
    told(STOCK.name, 0)
    if STOCK.name in have:
        beside = wanted[0] if shared and wanted and wanted[0].name not in have else None
        campaign.adopt_control(have[STOCK.name], beside)
        outcome = Outcome(have[STOCK.name])
    else:
        campaign.say(campaign.forecast(wanted, shared))
        outcome = Outcome(campaign.measure_control(wanted[0] if shared and wanted else None))
    for done, variant in enumerate(wanted, 1):
        told(variant.name, done)
        if variant.name in have:
            outcome.found.append(have[variant.name])
            continue
        late = deadline is not None and time.monotonic() > deadline
        if late and variant not in campaign.beside:
            outcome.left.append(variant.name)
            continue
        try:
            outcome.found.append(campaign.measure_variant(variant))
        except LabError:
            raise
        except (ValueError, NotImplementedError, RuntimeError) as error:
            outcome.skipped[variant.name] = str(error)[:500]
    told("", len(wanted) + 1)
    if outcome.left:
        return outcome
    text = notebook.entry(outcome.control, outcome.found, outcome.skipped)
    notebook.add(campaign.out / notebook.NAME, campaign.id, text)
    campaign.slots.forget()
    return outcome


def write_up_stopped(out: Path) -> list[str]:
    """Notebook entries of what a stop left without one; returns their names."""
    book = out / notebook.NAME
    written = notebook.read(out)
    rows, _ = ledger.read(out / ledger.NAME)
    names = []
    for name in dict.fromkeys(row["campaign"] for row in rows):
        have = stored(out, name)
        control = have.pop(STOCK.name, None)
        former = notebook.of_campaign(written, name)
        if control and (not former or notebook.STOPPED in former):
            notebook.add(book, name, notebook.entry(control, list(have.values()), {}, True))
            names.append(name)
    return names + sweep.write_up(out)


def write_ranking(out: Path) -> list[str]:
    """Regenerate RANKING.md; returns complaints about the ledger."""
    text, complaints = ranking.render(out)
    files.write_atomic(out / ranking.NAME, text)
    return complaints


def rerun(
    path: Path,
    engine,
    *,
    root: Path,
    model: Path | None = None,
    prompt_file: Path | None = None,
    tick: Callable[[int], None] = lambda units: None,
) -> dict:
    """Repeat a capsule's pairs -> old interval, new median ratio, whether it lies inside; and
    stock's rate then and now (tok/s), which tells a machine that others share from one at rest.

    Raises LabError when the model or a prompt is not the capsule's. Writes nothing.
    """
    old = capsule.read(path)
    found = checkpoint.recorded(old["model"], root, model)
    lengths = {k: (old["max_tokens"][k], old["runs"][k]) for k in old["max_tokens"]}
    source = prompt_file or prompts.find_file(found.path, root)
    campaign = Campaign(
        found,
        Plan(lengths, quick=old["meta"]["quick"]),
        engine,
        prompts_of=partial(prompts.recorded, path=source, records=old["prompts"]),
        root=root,
        out=path.parent,
        command=old["meta"]["command"],
        keep=False,
        tick=tick,
    )
    sides, done, void = campaign.run_pairs(variants.parse(old["variant"]))
    rates = [[r.decode_tok_s for r in sides[side].runs] for side in "AB"]
    median = statistics.median(b / a for a, b in zip(*rates, strict=True))
    low, high = old["summary"]["interval"]
    return {
        "capsule": path.name,
        "variant": old["variant"],
        "old_interval": [low, high],
        "old_speedup": old["summary"]["decode_speedup"],
        "new_median": median,
        "old_stock_tok_s": old["baseline"]["median_decode_tok_s"],
        "new_stock_tok_s": statistics.median(rates[0]),
        "new_ratios": [b / a for a, b in zip(*rates, strict=True)],
        "inside": void is None and low <= median <= high,
        "void": void,
        "pairs": len(done),
    }


def ledger_rows(out: Path, outcome: Outcome) -> list[dict]:
    """The ledger rows of a campaign, control first."""
    mine = {outcome.control["meta"]["campaign"]}
    rows, _ = ledger.read(out / ledger.NAME)
    return [row for row in rows if row["campaign"] in mine]
