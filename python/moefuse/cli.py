"""The `moefuse` command. Exit codes: 0 done; 1 measured, and the answer is no (a verdict of
fail, a missed fault, a rerun outside its interval, a stale ranking); 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .lab import LabError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Fused MoE decode for MLX, and the lab that measures it. mlx-lm's own commands on patched "
    "models: python -m moefuse.mlx_lm.",
    epilog="Example: moefuse doctor models/qwen3-moe-tiny\n\nExit codes: 0 done; 1 measured, and "
    "the answer is no; 2 bad input; 130 interrupted.",
)
# A pipe has no width: keep tables whole there rather than cut them at 80 columns.
out_console = Console(width=None if sys.stdout.isatty() else 140)
err_console = Console(stderr=True)

TINY = ("qwen3-moe-tiny", "glm4-moe-lite-tiny")
SYNTH_TOKENIZER = {"qwen3-30b-a3b": TINY[0], "glm-4.7-flash": TINY[1]}

Model = Annotated[Path, typer.Argument(help="Model folder in mlx-lm's layout.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Variants = Annotated[
    str | None,
    typer.Option(help="Comma-separated specs: name[+name...][:exact|fp32_no_fma|fp32]."),
]
Out = Annotated[Path, typer.Option(help="Folder of ledger, capsules, notebook and ranking.")]
Prompts = Annotated[Path | None, typer.Option(help="prompts.json to use instead of the model's.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(_engine().__version__)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Say it and end."),
    ] = False,
) -> None:
    pass


def _engine():
    return importlib.import_module("moefuse")


def _guarded(command: Callable) -> Callable:
    """Bad input ends in one sentence and exit code 2, never in a traceback."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            err_console.print(
                f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            kept = {
                "bench": "; what was finished is kept, --resume goes on",
                "cells": "; what was measured is kept",
            }
            err_console.print("interrupted" + kept.get(command.__name__, ""))
            raise typer.Exit(130) from None

    return run


def _tell(line: str | Text) -> None:
    """A line on stdout, never wrapped; its styles, if any, show on a terminal only."""
    out_console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_json(value) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar with the time to finish, on stderr; nothing at all when that is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console, disable=not err_console.is_terminal) as bar:
        yield bar


def _say(text: str) -> None:
    """A line of progress for logs, where there is no bar."""
    if not err_console.is_terminal:
        err_console.print(text, markup=False, highlight=False, soft_wrap=True)


def _size(text: str | None, option: str) -> tuple[int, int] | None:
    """Read `200x3` as (200 tokens, 3 runs)."""
    if text is None:
        return None
    tokens, _, runs = text.partition("x")
    if not (tokens.isdigit() and runs.isdigit() and int(tokens) >= 2 and int(runs) >= 1):
        raise LabError(f"[bench] {option}: expected TOKENSxRUNS like 200x3, got {text!r}")
    return int(tokens), int(runs)


def _command(root: Path, name: str, models: Sequence[Path], options: dict) -> str:
    """The command line a capsule shows: the same run, without paths of this machine."""
    from .lab.environment import relative

    words = ["moefuse", name, *(relative(path, root) for path in models)]
    for option, value in options.items():
        if value is True:
            words.append(option)
        elif value:
            shown = relative(value, root) if isinstance(value, Path) else str(value)
            words += [option, shown]
    return shlex.join(words)


@app.command(epilog="Example: moefuse doctor models/qwen3-moe-tiny --json")
@_guarded
def doctor(
    models: Annotated[list[Path] | None, typer.Argument(help="Model folders to look into.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Decode with the step; its stages, bytes and times.")
    ] = False,
    accumulate: Annotated[
        str, typer.Option(help="Arithmetic of --plan: exact, fp32_no_fma or fp32.")
    ] = "fp32_no_fma",
    as_json: AsJson = False,
) -> None:
    """Devices, wheels and capabilities; for each model what would be fused, and why not."""
    from .lab import doctor as lab_doctor

    if plan and not models:
        raise LabError("[doctor] --plan: expected a model folder beside it, got none")
    found = lab_doctor.examine(_engine(), models or [], accumulate if plan else None)
    if as_json:
        _print_json(found)
    else:
        for line in lab_doctor.lines(found):
            _tell(line)
    if any("error" in model for model in found["models"]):
        raise typer.Exit(2)


@app.command(
    epilog="Example: moefuse synth --like qwen3-30b-a3b --layers 2 --vocab 4096 --out synth/qwen"
)
@_guarded
def synth(
    like: Annotated[str, typer.Option(help="qwen3-30b-a3b or glm-4.7-flash.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    layers: Annotated[int | None, typer.Option(help="Layers; default: all of them.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Vocabulary; default: the real one.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of scales and activations: bfloat16, float32.")] = (
        "bfloat16"
    ),
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer to copy.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint with a real model's layer geometry and random 4-bit weights."""
    from .lab import synth as maker
    from .lab.environment import repository_root

    source = tokenizer or repository_root() / "models" / SYNTH_TOKENIZER.get(like, TINY[0])
    with _progress() as bar:
        total = (layers or maker.LIKE.get(like, {}).get("num_hidden_layers", 0)) + 1
        task = bar.add_task(f"writing {out.name}", total=total)
        config = maker.write(
            like,
            layers,
            out,
            tokenizer=source,
            vocab=vocab,
            seed=seed,
            dtype=dtype,
            tick=lambda n: bar.advance(task, n),
        )
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    if as_json:
        made = {"path": str(out), "like": like, "layers": layers, "vocab": vocab, "seed": seed}
        _print_json(made)
        return
    _tell(f"{out}: {like} geometry, {layers} layers, vocabulary {vocab}, seed {seed}")


def _deadline(minutes: float | None) -> float | None:
    """By time.monotonic, so many minutes from now."""
    return None if minutes is None else time.monotonic() + 60 * minutes


def _small_models(root: Path) -> list[Path]:
    return [root / "models" / name for name in TINY]


@app.command(epilog="Example: moefuse bench models/qwen3-moe-tiny --variants router,experts")
@_guarded
def bench(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Model folders; default: both in models/.")
    ] = None,
    variants: Variants = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look; cannot promote.")] = False,
    short: Annotated[str | None, typer.Option(help="TOKENSxRUNS, default 200x3.")] = None,
    long: Annotated[str | None, typer.Option(help="TOKENSxRUNS, default 1024x2.")] = None,
    context: Annotated[str | None, typer.Option(help="Context lengths too: 128,1k,8k.")] = None,
    batch: Annotated[str | None, typer.Option(help="Rows too, at each context: 1,2,4.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Start no variant after so long; --resume goes on.")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared-control", help="Control and first variant in one pass.")
    ] = False,
    prompts: Prompts = None,
    out: Out = Path("benchmarks"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a stop left it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure variants against stock in pairs: capsules, ledger, notebook entry, ranking."""
    from .lab import bench as driver
    from .lab import checkpoint, environment, files, grid, schedule
    from .lab import variants as specs

    root = environment.repository_root()
    deadline = _deadline(minutes)
    plan = schedule.QUICK_PLAN if quick else schedule.FULL_PLAN
    plan = schedule.resized(plan, short=_size(short, "--short"), long=_size(long, "--long"))
    plan = replace(plan, grid=grid.parse(context, batch))
    default = ",".join(specs.QUICK if quick else specs.FULL)
    wanted = [v for v in specs.parse_list(variants or default) if v.parts]
    checked = [checkpoint.inspect(folder) for folder in models or _small_models(root)]
    for found in checked:
        driver.check_inputs(found, plan, prompts, root)
    driver.prepare(out)
    options = {
        "--variants": variants, "--quick": quick, "--short": short, "--long": long,
        "--context": context, "--batch": batch, "--shared-control": shared, "--prompts": prompts,
    }  # fmt: skip
    outcomes = []
    with files.alone(out), _progress() as bar:
        for found in checked:
            command = _command(root, "bench", [found.path], options)
            outcomes.append(
                _bench_one(
                    bar, found, plan, wanted, command, root, out, prompts, resume, deadline, shared
                )
            )
            gc.collect()  # the next model's peak memory is its own
        complaints = driver.write_ranking(out)
    for complaint in complaints:
        err_console.print(complaint, markup=False)
    _show_outcomes(outcomes, out, as_json)
    if any(outcome.missed_faults for outcome in outcomes):
        raise typer.Exit(1)


def _bench_one(bar, found, plan, wanted, command, root, out, prompts, resume, deadline, shared):
    from .lab import bench as driver

    task = bar.add_task(found.name, total=None)
    campaign = driver.open_campaign(
        found,
        plan,
        _engine(),
        prompt_file=prompts,
        root=root,
        out=out,
        command=command,
        resume=resume,
        tick=lambda n: bar.advance(task, n),
        say=_say,
    )
    unit = campaign.units()
    bar.update(task, total=unit * (len(wanted) + 1))

    def told(name: str, done: int) -> None:
        bar.update(task, completed=unit * done, description=f"{found.name} {name}")
        if name:
            _say(f"{found.name}: {name} ({done + 1} of {len(wanted) + 1})")

    return driver.run(campaign, wanted, told, deadline, shared)


def _show_outcomes(outcomes, out: Path, as_json: bool) -> None:
    from .lab import bench as driver
    from .lab.notebook import span

    if as_json:
        _print_json([row for outcome in outcomes for row in driver.ledger_rows(out, outcome)])
        return
    for outcome in outcomes:
        meta = outcome.control["meta"]
        table = Table(title=f"{meta['campaign']} on {meta['device']}", title_justify="left")
        for name in ("variant", "decode", "95 %", "A/A", "tok/s", "fidelity", "decision"):
            table.add_column(name)
        for found in sorted(outcome.found, key=lambda c: -c["summary"]["decode_speedup"]):
            summary, both = found["summary"], (found["baseline"], found["patched"])
            table.add_row(
                found["variant"],
                f"{summary['decode_speedup']:.3f}x",
                span(summary["interval"]),
                span(found["control"]["aa_interval"]),
                " -> ".join(f"{side['median_decode_tok_s']:.1f}" for side in both),
                found["fidelity"]["verdict"],
                summary["decision"],
            )
        out_console.print(table)
        if outcome.left:
            _tell(f"not started: {', '.join(outcome.left)}; bench --resume goes on")
        for name, why in outcome.skipped.items():
            _tell(f"not measured: {name}: {why}")
        for name in outcome.missed_faults:
            out_console.print(f"the fidelity gate missed the planted fault {name}", style="red")
    _tell(f"ranking: {out / 'RANKING.md'}")


@app.command(epilog="Example: moefuse cells models/qwen3-moe-tiny --context 128,1k --batch 1,2,4")
@_guarded
def cells(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Model folders; default: both in models/.")
    ] = None,
    variants: Variants = "step",
    context: Annotated[str, typer.Option(help="Context lengths, tokens.")] = "128,1k",
    batch: Annotated[str, typer.Option(help="Rows, at each context.")] = "1,2,4",
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens of a row.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Pairs of each cell.")] = 4,
    minutes: Annotated[
        float | None, typer.Option(help="Start no cell after so long; what was measured is kept.")
    ] = None,
    prompts: Prompts = None,
    out: Out = Path("benchmarks"),
    as_json: AsJson = False,
) -> None:
    """Decode rates beside stock by context length and batch, a capsule a variant."""
    from .lab import bench as driver
    from .lab import checkpoint, environment, files, grid, schedule, sweep
    from .lab import variants as specs

    root = environment.repository_root()
    deadline = _deadline(minutes)
    wanted = replace(grid.parse(context, batch), tokens=tokens, runs=runs)
    chosen = [v for v in specs.parse_list(variants) if v.parts]
    checked = [checkpoint.inspect(folder) for folder in models or _small_models(root)]
    for found in checked:
        driver.check_inputs(found, schedule.FULL_PLAN, prompts, root)
    driver.prepare(out)
    options = {
        "--variants": variants, "--context": context, "--batch": batch, "--tokens": tokens,
        "--runs": runs, "--prompts": prompts,
    }  # fmt: skip
    kept = []
    with files.alone(out), _progress() as bar:
        for found in checked:
            record = sweep.Record(root, out, _command(root, "cells", [found.path], options))
            choose = sweep.chooser(found, prompts, root)
            kept += _sweep_one(bar, found, wanted, choose, chosen, record, deadline)
            gc.collect()  # the next model's peak memory is its own
        driver.write_ranking(out)
    _show(kept, sweep.lines(kept), as_json)
    if not kept:
        raise LabError("[cells] --minutes: expected time for a cell, got none")


def _sweep_one(bar, found, wanted, choose, variants, record, deadline) -> list[dict]:
    from .lab import sweep

    task = bar.add_task(f"{found.name} cells", total=wanted.size * len(variants))
    loaded = sweep.load(
        found, wanted, _engine(), choose, tick=lambda n: bar.advance(task, n), say=_say
    )
    return list(filter(None, (record.run(loaded, variant, deadline) for variant in variants)))


@app.command(epilog="Example: moefuse fidelity models/qwen3-moe-tiny --plant wrong-weight")
@_guarded
def fidelity(
    model: Model,
    variants: Variants = None,
    plant: Annotated[
        str | None, typer.Option(help="Plant a fault (or `all`) and see whether it is caught.")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="The smallest relative weight error it catches.")
    ] = False,
    behaviour: Annotated[
        bool, typer.Option("--behaviour", help="How decided stock is: margins, routing, range.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 200,
    chunk: Annotated[int, typer.Option(min=2, help="Forced positions per prompt.")] = 64,
    prompts: Prompts = None,
    as_json: AsJson = False,
) -> None:
    """Compare tokens with stock's and logits with a float32 oracle. Exit code 1 on a fail.

    With --plant and --sensitivity the fault lies under the first of --variants (default: stock),
    and exit code 1 means that it was not caught.
    """
    from .lab import behaviour as manner
    from .lab import bench as driver
    from .lab import checkpoint, environment, faults, schedule
    from .lab import prompts as prompt_kinds
    from .lab import variants as specs

    known = {*faults.FAULTS, *faults.GRADED}
    if plant and plant != "all" and plant.partition(":")[0] not in known:
        raise LabError(f"[fidelity] --plant: expected one of {sorted(known)}, got {plant}")
    wanted = specs.parse_list(variants or ",".join(specs.QUICK))
    root = environment.repository_root()
    plan = schedule.Plan({"short": (tokens, 1)}, chunk=chunk)
    judge = driver.open_campaign(
        checkpoint.inspect(model), plan, _engine(), prompt_file=prompts, root=root, out=Path(),
        command=_command(root, "fidelity", [model], {}),
    )  # fmt: skip
    under = wanted[0] if variants else specs.STOCK
    if behaviour:
        short = prompt_kinds.pick(list(judge.prompts.values()), long=False)
        measured = manner.examine(judge.model, short, tokens)
        _show([measured], manner.lines(measured), as_json)
        return
    if sensitivity:
        graded = [judge.sensitivity(kind, under) for kind in faults.GRADED]
        _show(graded, map(_sensitivity_line, graded), as_json)
        if any(found["smallest_caught"] is None for found in graded):
            raise typer.Exit(1)
        return
    if plant:
        names = list(faults.FAULTS) if plant == "all" else [plant]
        found = _each(model.name, names, lambda name: (judge.check_fault(name, under), None))
        bad = any(verdict.verdict != "fail" for verdict, _ in found.values())
    else:
        by_name = {v.name: v for v in wanted}
        found = _each(model.name, by_name, lambda name: judge.check_tokens(by_name[name], tokens))
        bad = any(verdict.verdict == "fail" or void for verdict, void in found.values())
    _show_fidelity(found, as_json)
    if bad:
        raise typer.Exit(1)


def _each(model: str, names: Collection[str], check: Callable[[str], tuple]) -> dict[str, tuple]:
    """check(name) for each name in turn, with its progress."""
    found = {}
    with _progress() as bar:
        task = bar.add_task(model, total=len(names))
        for done, name in enumerate(names, 1):
            bar.update(task, description=f"{model} {name}")
            _say(f"{model}: {name} ({done} of {len(names)})")
            found[name] = check(name)
            bar.advance(task)
    return found


def _show(found: Sequence, lines, as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    for line in lines:
        _tell(line)


def _sensitivity_line(found: dict) -> str:
    tried = ", ".join(f"{error:g} {verdict}" for error, verdict in found["verdicts"].items())
    caught = found["smallest_caught"]
    return (
        f"{found['fault']}: smallest caught {'none' if caught is None else f'{caught:g}'} ({tried})"
    )


def _show_fidelity(found: dict, as_json: bool) -> None:
    if as_json:
        shown = {name: {**v.record(), "void": void} for name, (v, void) in found.items()}
        _print_json(shown)
        return
    for name, (verdict, void) in found.items():
        error = verdict.oracle_error
        rms = f", rms error {error['variant']:.4g} (stock {error['stock']:.4g})" if error else ""
        line = f"{name}: {verdict.verdict}, {verdict.matched}/{verdict.total} tokens{rms}"
        _tell(line)
        if void:
            _tell(f"  void: {void}")
        for prompt in verdict.per_prompt:
            if prompt.verdict != "identical":
                line = f"  {prompt.name}: {prompt.verdict}; {prompt.reason}"
                _tell(line)


@app.command(epilog="Example: moefuse report --html report.html")
@_guarded
def report(
    out: Out = Path("benchmarks"),
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 1 if RANKING.md is stale.")
    ] = False,
    stopped: Annotated[
        bool, typer.Option("--stopped", help="Also write up campaigns that a stop cut short.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--import", help="First take what a folder or .tar.gz holds."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Regenerate RANKING.md from the ledger and its capsules."""
    from .lab import bench as driver
    from .lab import files, importer, ranking

    if source and check:
        raise LabError("[report] --import: expected it without --check, got both")
    for name in importer.take(source, out) if source else ():
        _say(f"imported: {name}")
    if not out.is_dir():
        raise LabError(f"[report] {out}: expected a folder with a ledger, got none")
    text, complaints = ranking.render(out)
    for complaint in complaints:
        err_console.print(complaint, markup=False)
    path = out / ranking.NAME
    if check:
        same = path.is_file() and path.read_text(encoding="utf-8") == text
        err_console.print(f"{path.name}: {'up to date' if same else 'stale'}", markup=False)
        raise typer.Exit(0 if same else 1)
    driver.prepare(out)
    if stopped:
        with files.alone(out):
            for name in driver.write_up_stopped(out):
                _say(f"written up: {name}")
        text, _ = ranking.render(out)  # with the rows of capsules that the ledger lacked
    files.write_atomic(path, text)
    if html:
        from .lab import html as page
        from .lab import rates

        files.require_writable(html.resolve().parent)
        files.write_atomic(html.resolve(), page.render(ranking.load(out)[0], rates.load(out)))
    if as_json:
        rows, _ = ranking.load(out)
        _print_json([{k: v for k, v in row.items() if k != "found"} for row in rows])


@app.command(epilog="Example: moefuse rerun benchmarks/repro_capsules/NAME.json")
@_guarded
def rerun(
    capsule: Annotated[Path, typer.Argument(help="A stored capsule.")],
    model: Annotated[Path | None, typer.Option(help="Where the model lies, if elsewhere.")] = None,
    prompts: Prompts = None,
    as_json: AsJson = False,
) -> None:
    """Repeat a capsule's measurement. Exit code 1 if a new ratio leaves its old interval."""
    from .lab import bench as driver
    from .lab import capsule as kept
    from .lab import repeat
    from .lab.environment import repository_root

    of_cells = kept.is_cells(kept.read(capsule))
    measure = repeat.rerun if of_cells else driver.rerun
    with _progress() as bar:
        task = bar.add_task(f"rerun {capsule.name}", total=None)
        found = measure(
            capsule,
            _engine(),
            root=repository_root(),
            model=model,
            prompt_file=prompts,
            tick=lambda n: bar.advance(task, n),
        )
    lines = repeat.lines(found) if of_cells else [_rerun_line(found)]
    if as_json:
        _print_json(found)
    else:
        for line in lines:
            _tell(line)
    if not found["inside"]:
        raise typer.Exit(1)


def _rerun_line(found: dict) -> str:
    low, high = found["old_interval"]
    where = "inside" if found["inside"] else "outside"
    void = f"; void: {found['void']}" if found["void"] else ""
    return (
        f"{found['variant']}: new median {found['new_median']:.3f}x lies {where} the old "
        f"interval {low:.3f}-{high:.3f}; stock decodes {found['new_stock_tok_s']:.1f} tok/s "
        f"here, {found['old_stock_tok_s']:.1f} there{void}"
    )


def _chat(tokenizer, prompt: str):
    """The prompt as the first message of a chat; a template is a program of the checkpoint's."""
    message = {"role": "user", "content": prompt}
    try:
        return tokenizer.apply_chat_template([message], add_generation_prompt=True)
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise LabError(
            f"[generate] --chat: expected a template that takes the prompt, got {first}"
        ) from error


@app.command(epilog='Example: moefuse generate models/qwen3-moe-tiny --prompt "The list type"')
@_guarded
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    variants: Annotated[
        str, typer.Option(help="One spec; `stock` leaves the model alone.")
    ] = "step",
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temp: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all tokens.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.0, help="Over the last 20 tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stream text from a patched model through mlx-lm; with --json, the text and what ran."""
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from . import ahead
    from .lab import checkpoint
    from .lab import variants as specs

    variant = specs.parse(variants)
    if not prompt:
        raise LabError("[generate] --prompt: expected text, got an empty string")
    loaded, tokenizer = checkpoint.load(checkpoint.inspect(model))
    text = _chat(tokenizer, prompt) if chat else prompt
    mx.random.seed(seed)
    sampling = {
        "sampler": make_sampler(temp=temp, top_p=top_p, min_p=min_p, top_k=top_k),
        "logits_processors": make_logits_processors(repetition_penalty=repetition_penalty),
    }
    last, said = None, ""
    with specs.applied(loaded, variant, _engine()) as report:
        if temp == 0.0 and repetition_penalty is None and ahead.serves(loaded):
            pieces = ahead.stream(loaded, tokenizer, text, max_tokens)
        else:
            pieces = stream_generate(loaded, tokenizer, text, max_tokens=max_tokens, **sampling)
        for last in pieces:
            said += last.text
            if not as_json:
                sys.stdout.write(last.text)
                sys.stdout.flush()
    if as_json:
        _print_json(
            {
                "text": said,
                "tokens": last.generation_tokens,
                "tokens_per_s": last.generation_tps,
                "finish_reason": last.finish_reason,
                "variant": variant.name,
                "calls": report.calls if report else {},
                "fallbacks": report.fallbacks if report else {},
            }
        )
        return
    sys.stdout.write("\n")
    if last is not None:
        _say(f"{variant.name}: {last.generation_tps:.1f} tokens/s, {last.finish_reason}")


def main() -> None:
    """Console entry point."""
    app()


if __name__ == "__main__":
    main()
