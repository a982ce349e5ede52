"""A campaign: one model, stock against stock, then each variant against stock, in pairs.

Everything runs in one process on one loaded model: a side is the model with its patch on or off.
Each variant's capsule and row are on disk before the next variant starts.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from . import (
    LabError,
    capsule,
    environment,
    faults,
    fidelity,
    files,
    grid,
    ledger,
    measure,
    notebook,
    prompts,
    resume,
    roofline,
    stats,
    variants,
)
from .checkpoint import Checkpoint, load
from .variants import STOCK, Variant, applied


@dataclass(frozen=True)
class Plan:
    """How much is measured. lengths: name -> (tokens, runs)."""

    lengths: dict[str, tuple[int, int]]
    quick: bool = False
    prompt_limit: int | None = None  # keep only the last tokens of each prompt
    extra_tokens: int = 64  # budget of a prompt that is judged but not timed; 0 skips those
    chunk: int = fidelity.CHUNK
    grid: grid.Grid | None = None  # context lengths and batches, beside the pairs


FULL_PLAN = Plan({"short": (200, 3), "long": (1024, 2)})
FAULT_PROMPTS = 2  # whose first positions every planted fault is forced through
QUICK_PLAN = Plan(
    {"short": (40, 2), "long": (56, 1)}, quick=True, prompt_limit=24, extra_tokens=0, chunk=32
)


@dataclass(frozen=True)
class Slot:
    """One pair of runs: which prompt, how many tokens, which side first (A is stock)."""

    length: str
    prompt: str
    tokens: int
    order: str

    def record(self) -> dict:
        return {"length": self.length, "prompt": self.prompt, "order": self.order}


@dataclass
class Side:
    """All runs of one side of one variant."""

    runs: list[measure.Run] = field(default_factory=list)
    tokens: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)  # by prompt
    calls: dict[str, int] = field(default_factory=dict)
    decoded: int = 0
    patterns: list[str] = field(default_factory=list)
    modules_patched: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def count(self, report, before: dict[str, int]) -> None:
        """Add what a patch report has counted since `before`."""
        calls = {name: n - before.get(name, 0) for name, n in report.calls.items()}
        self.add(
            {
                "calls": calls,
                "fallbacks": report.fallbacks,
                "decoded": 0,
                "patterns": list(report.patterns),
                "modules_patched": report.modules_patched,
            }
        )

    def counted(self) -> dict:
        """All but the runs and their tokens."""
        return {k: v for k, v in vars(self).items() if k not in ("runs", "tokens")}

    def add(self, counted: dict) -> None:
        """Add what counted() of another side tells."""
        for name in ("calls", "fallbacks"):
            mine = getattr(self, name)
            for key, times in counted[name].items():
                mine[key] = mine.get(key, 0) + times
        self.decoded += counted["decoded"]
        self.patterns = counted["patterns"] or self.patterns
        self.modules_patched = counted["modules_patched"] or self.modules_patched

    def rates(self) -> dict:
        """This side's half of a capsule."""
        prefill = [run.prefill_tok_s for run in self.runs]
        return {
            "decode_tok_s": [run.decode_tok_s for run in self.runs],
            "prefill_tok_s": prefill,
            "first_token_s": [run.first_token_s for run in self.runs],
            "median_decode_tok_s": statistics.median(run.decode_tok_s for run in self.runs),
            "median_prefill_tok_s": statistics.median(p for p in prefill if p is not None),
            "peak_mem_gb": max(run.peak_mem_gb for run in self.runs),
            "peak_mlx_gb": max(run.peak_mlx_gb for run in self.runs),
        }


def make_schedule(found: Sequence[prompts.Prompt], plan: Plan) -> list[Slot]:
    """A B, B A, A B ...: over two runs of a length the order is A B B A, so drift cancels."""
    slots = []
    pool = prompts.pick(found, long=False)
    for length, (tokens, runs) in plan.lengths.items():
        for i in range(runs):
            order = "AB" if i % 2 == 0 else "BA"
            slots.append(Slot(length, pool[i % len(pool)].name, tokens, order))
    return slots


class Campaign:
    """State shared by the variants of one model.

    engine: the moefuse package (patch, unpatch, capabilities, __version__), or a stand-in;
    prompts_of: tokenizer -> prompts; keep: whether timed runs stay on disk for --resume;
    tick: called with token steps done, for a progress bar; say: called with a line on each timed
    run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        engine,
        *,
        prompts_of: Callable[..., list[prompts.Prompt]],
        root: Path,
        out: Path,
        command: str,
        identity: str | None = None,
        keep: bool = True,
        tick: Callable[[int], None] = lambda units: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.checkpoint, self.plan, self.engine = checkpoint, plan, engine
        self.root, self.out, self.command = root, out, command
        self.tick, self.say = tick, say
        self.model, self.tokenizer = load(checkpoint)
        if mx.default_device().type == mx.gpu:  # while it compiles, not in front of a capsule
            threading.Thread(target=_digest_early, args=(checkpoint,), daemon=True).start()
        found = prompts_of(self.tokenizer)
        self.prompts = {p.name: p for p in found}
        self.schedule = make_schedule(found, plan)
        stamp = environment.now().replace("-", "").replace(":", "")
        suffix = "-quick" if plan.quick else ""
        self.id = identity or f"{stamp}-{checkpoint.name}{suffix}"
        same = partial(settings, checkpoint, plan, root)
        self.slots = resume.Slots(out, self.id, same) if keep else None
        self.oracle = fidelity.Oracle(self.model, checkpoint, plan.chunk)
        self.reference: dict[str, tuple[int, ...]] = {}  # stock's tokens, longest seen
        self.snapshots: dict[str, list] = {}  # stock's caches of long prompts
        self.self_matched = self.self_total = 0
        self._itself: fidelity.Itself | None = None
        self.control: dict | None = None
        self.beside: dict[Variant, tuple | Exception] = {}  # pairs measured with the control
        self.roofline: dict | None = None

    # -- running --------------------------------------------------------------------------

    def units(self) -> int:
        """Work of one variant in token steps, for the progress bar."""
        timed = sum(2 * (s.tokens + len(self.prompts[s.prompt].ids)) for s in self.schedule)
        extra = sum(self.plan.extra_tokens + len(p.ids) for p in self.extra_prompts())
        return timed + extra + (self.plan.grid.units if self.plan.grid else 0)

    def extra_prompts(self) -> list[prompts.Prompt]:
        """Prompts judged for fidelity but not timed, short ones first."""
        timed = {slot.prompt for slot in self.schedule}
        rest = [p for p in self.prompts.values() if p.name not in timed]
        return sorted(rest, key=lambda p: p.is_long) if self.plan.extra_tokens else []

    def _note_stock(self, name: str, tokens: tuple[int, ...]) -> None:
        """Keep stock's first answer; count how far later ones agree with it."""
        known = self.reference.get(name, ())
        shared = min(len(known), len(tokens))
        self.self_matched += fidelity.matching(known[:shared], tokens[:shared])
        self.self_total += shared
        if len(tokens) > len(known):
            self.reference[name] = tokens

    def _snapshot(self, prompt: prompts.Prompt) -> list | None:
        """Stock's cache of a long context, computed once; short prompts have none.

        Decoding is what is judged there: a variant's own prefill runs on the short prompts,
        which take the same path.
        """
        if not prompt.is_long:
            return None
        if prompt.name not in self.snapshots:
            self.snapshots[prompt.name], _ = measure.prefill(self.model, prompt.ids)
            self.tick(len(prompt.ids))
        return self.snapshots[prompt.name]

    def _generate(self, prompt, tokens: int, variant: Variant, side: Side, cache=None):
        """One run of one side, with its counters; `cache` stands for the prompt's prefill."""
        with applied(self.model, variant, self.engine) as report:
            measure.warm_up(self.model, prompt.ids)
            before = dict(report.calls) if report else {}
            run = measure.generate(
                self.model, prompt.ids, tokens, cache=cache, on_token=lambda: self.tick(1)
            )
            if report:
                side.count(report, before)
        side.decoded += len(run.tokens)
        if cache is None:
            self.tick(len(prompt.ids))
        return run

    def _run_slot(self, at: int, letters: str, variant: Variant, sides: dict) -> None:
        """The runs of one slot in the order of `letters`: B is the variant, others are stock.

        Of a campaign that was stopped they may be on disk.
        """
        slot = self.schedule[at]
        name = self._slot_name(at, letters, variant)
        known = self.slots.found.get(name) if self.slots else None
        records = known or []
        for i, letter in enumerate(letters):
            which = variant if letter == "B" else STOCK
            if not known:
                side = Side()
                run = self._generate(self.prompts[slot.prompt], slot.tokens, which, side)
                self.say(f"{slot.length} {slot.prompt} {letter} {which.name}: {_run_line(run)}")
                records.append(resume.record(run, side.counted()))
            run = resume.run_of(records[i])
            sides[letter].add(records[i]["counted"])
            sides[letter].runs.append(run)
            if which == STOCK:
                self._note_stock(slot.prompt, run.tokens)
            if letter != "A":
                sides[letter].tokens.setdefault(slot.prompt, []).append(run.tokens)
        if self.slots and not known:
            self.slots.keep(name, records)

    @staticmethod
    def _slot_name(at: int, letters: str, variant: Variant) -> str:
        return f"{at} {letters} {variant.name}"

    def _worst(self, side: Side) -> dict[str, tuple[int, ...]]:
        """Of each prompt's runs the one that left stock's tokens first, else the longest."""
        found = {}
        for name, runs in side.tokens.items():
            agreed = {t: fidelity.matching(self.stock_tokens(name, len(t)), t) for t in runs}
            parted = [t for t in runs if agreed[t] < len(t)]
            found[name] = min(parted, key=agreed.get) if parted else max(runs, key=len)
        return found

    def run_pairs(self, variant: Variant) -> tuple[dict[str, Side], list[Slot], str | None]:
        """The timed pairs; stops after the first one if the variant did not really run."""
        sides, done = {"A": Side(), "B": Side()}, []
        void = None
        for at, slot in enumerate(self.schedule):
            self._run_slot(at, slot.order, variant, sides)
            done.append(slot)
            void = self._void(variant, sides["B"])
            if void:
                break
        return sides, done, void

    def run_beside(self, variant: Variant) -> tuple[dict[str, Side], list[Slot]]:
        """The control's pairs with a variant's run between the two stock runs of each.

        The variant's pairs share the first stock run of theirs and are kept for measure_variant.
        """
        sides = {"A": Side(), "B": Side(), "C": Side()}
        kept: tuple | Exception | None = None
        for count, slot in enumerate(self.schedule, 1):
            letters = _beside_letters(slot)
            alone = letters.replace("B", "")
            try:
                self._run_slot(count - 1, letters if kept is None else alone, variant, sides)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                if kept is not None:
                    raise
                kept = error  # the variant cannot run here: its slot again, stock alone
                for side in sides.values():
                    del side.runs[count - 1 :]
                self._run_slot(count - 1, alone, variant, sides)
                continue
            if kept is None and (void := self._void(variant, sides["B"])):
                kept = self._beside(sides, count, void)
        self.beside[variant] = kept or self._beside(sides, len(self.schedule), None)
        return {"A": sides["A"], "B": sides["C"]}, list(self.schedule)

    def _beside(self, sides: dict[str, Side], count: int, void: str | None) -> tuple:
        base = replace(sides["A"], runs=sides["A"].runs[:count])
        return {"A": base, "B": sides["B"]}, self.schedule[:count], void

    def forecast(self, variants: Sequence[Variant], shared: bool) -> str:
        """How long stock's part will take, by the rate of a few tokens."""
        prompt = self.prompts[self.schedule[0].prompt]
        measure.warm_up(self.model, prompt.ids)
        rate = measure.generate(self.model, prompt.ids, 9).decode_tok_s
        timed = sum(slot.tokens for slot in self.schedule)
        faults_ = len(faults.FAULTS) * (self.plan.lengths["short"][0] + 2 * self.plan.chunk)
        extra = len(self.extra_prompts()) * self.plan.extra_tokens
        tokens = timed * (2 + len(variants) - shared) + faults_ + extra
        return (
            f"stock decodes {rate:.1f} tok/s here: about {tokens / rate:.0f} s for its {tokens} "
            f"tokens, and the time of {len(variants)} variants, prefill, oracle and compilation"
        )

    def _void(self, variant: Variant, side: Side) -> str | None:
        layers = self.checkpoint.moe_layers
        return variants.did_not_run(variant, side.calls, side.decoded, layers)

    # -- fidelity -------------------------------------------------------------------------

    def stock_tokens(self, name: str, count: int) -> tuple[int, ...]:
        """Stock's first `count` tokens after a prompt, generated once."""
        if len(self.reference.get(name, ())) < count:
            prompt = self.prompts[name]
            run = self._generate(prompt, count, STOCK, Side(), self._snapshot(prompt))
            self._note_stock(name, run.tokens)
        return self.reference[name][:count]

    def itself(self) -> fidelity.Itself:
        """How far stock repeats itself: its logits forced twice, and tokens it gave twice."""
        if self._itself is None:
            short = prompts.pick(list(self.prompts.values()), long=False)[:FAULT_PROMPTS]
            logits = fidelity.compare(*self._beginnings(nullcontext, short))
            if self.self_total == 0 and logits["difference"] != [0.0, 0.0]:
                for prompt in short:
                    count = len(self.reference[prompt.name])
                    again = self._generate(prompt, count, STOCK, Side())
                    self._note_stock(prompt.name, again.tokens)
            self._itself = fidelity.Itself(self.self_matched, self.self_total, logits)
        return self._itself

    def judge(self, context: Callable, tokens: dict[str, tuple[int, ...]], always: int = 2):
        """Verdict on tokens that the model gave inside `context()`."""
        stock = {name: self.stock_tokens(name, len(t)) for name, t in tokens.items()}
        windows = self.oracle.windows(stock, tokens, always)
        base, truth = self.oracle.references(self.prompts, stock, windows)
        other = self._forced(context, stock, windows)
        return fidelity.judge(stock, tokens, windows, base, other, truth, self.itself())

    def check_variant(self, variant: Variant, side: Side) -> fidelity.Fidelity:
        """Verdict over the timed prompts and the extra ones."""
        for prompt in self.extra_prompts():
            cache = self._snapshot(prompt)  # by stock: the patch is not on yet
            run = self._generate(prompt, self.plan.extra_tokens, variant, side, cache)
            side.tokens[prompt.name] = [run.tokens]
        context = partial(applied, self.model, variant, self.engine)
        return self.judge(context, self._worst(side))

    def check_tokens(self, variant: Variant, count: int) -> tuple[fidelity.Fidelity, str | None]:
        """Untimed verdict over every prompt, and why it is void if the variant did not run."""
        side = Side()
        for prompt in self.prompts.values():
            run = self._generate(prompt, count, variant, side)
            side.tokens[prompt.name] = [run.tokens]
        context = partial(applied, self.model, variant, self.engine)
        return self.judge(context, self._worst(side)), self._void(variant, side)

    def check_fault(self, name: str, variant: Variant = STOCK) -> fidelity.Fidelity:
        """Plant a fault under a variant and judge it.

        Every fault is forced through the same positions, whether or not it turns a token: it has
        to be shown at least as close to the oracle as stock. Then its tokens, prompt by prompt
        until they part, and where they part the rule that every variant meets there. Where stock
        parts from itself, a fault may hide in what the variant is closer by: there it must not be
        shown further than the same variant without it, either.
        """
        short = prompts.pick(list(self.prompts.values()), long=False)
        count = self.plan.lengths["short"][0]
        plant = partial(faults.planted, self.model, name, short[0].ids)

        @contextmanager
        def context():
            with plant(), applied(self.model, variant, self.engine):
                yield

        itself, chosen = self.itself(), short[:FAULT_PROMPTS]
        base, damaged, truth = self._beginnings(context, chosen)
        forced = fidelity.compare(base, damaged, truth, itself.margin)
        if name != faults.NONE and variant != STOCK:
            whole = partial(applied, self.model, variant, self.engine)
            _, whole, _ = self._beginnings(whole, chosen)
            forced["than_whole"] = fidelity.compare(whole, damaged, truth)["shown"]
            forced["ruled_out"] = fidelity.rules_out(whole, damaged, truth)
        stock: dict[str, tuple[int, ...]] = {}
        tokens: dict[str, tuple[int, ...]] = {}
        for prompt in short:
            with plant():
                tokens[prompt.name] = self._generate(prompt, count, variant, Side()).tokens
            stock[prompt.name] = self.stock_tokens(prompt.name, count)
            if tokens[prompt.name] != stock[prompt.name]:
                break
        if forced["shown"] != "closer":
            return fidelity.not_closer(stock, tokens, forced)
        if not itself.repeats and forced.get("than_whole") == "further":
            reason = "logits shown further from the oracle than without the fault"
            return fidelity.not_closer(stock, tokens, forced, reason)
        return replace(self.judge(context, tokens, always=0), oracle_error=forced)

    def _beginnings(self, context: Callable, chosen: Sequence[prompts.Prompt]) -> tuple:
        """Logits of stock, of the model inside `context()` and of the oracle by prompt."""
        count = max(self.plan.chunk, -(-fidelity.MIN_POSITIONS // len(chosen)))
        windows = {p.name: fidelity.Window(p.name, 0, count) for p in chosen}
        stock = {p.name: self.stock_tokens(p.name, count) for p in chosen}
        base, truth = self.oracle.references(self.prompts, stock, windows)
        return base, self._forced(context, stock, windows), truth

    def _forced(self, context: Callable, stock: dict, windows: dict) -> dict:
        with context():
            return {
                name: fidelity.forced_logits(self.model, self.prompts[name].ids, stock[name], at)
                for name, at in windows.items()
            }

    def sensitivity(self, kind: str, variant: Variant = STOCK, smallest: float = 2.0**-12) -> dict:
        """Verdict on ever smaller errors of one of faults.GRADED, halved until one is missed."""
        verdicts, error, caught = {}, 1.0, None
        while error >= smallest:
            verdict = self.check_fault(f"{kind}:{error}", variant).verdict
            verdicts[error] = verdict
            if verdict != "fail":
                break
            caught, error = error, error / 2
        return {"fault": kind, "smallest_caught": caught, "verdicts": verdicts}

    # -- recording ------------------------------------------------------------------------

    def measure_control(self, beside: Variant | None = None) -> dict:
        """Stock against stock, and the gate against planted faults -> the control capsule.

        beside: a variant to measure in the same pass, which saves it a stock run a pair.
        """
        self.roofline = roofline.measure(self.model)
        if beside:
            sides, done = self.run_beside(beside)
        else:
            sides, done, _ = self.run_pairs(STOCK)
        verdict = self.judge(nullcontext, self._worst(sides["B"]))
        self.say(f"stock judged: {verdict.verdict}")
        itself = self.itself()

        def noise(found: tuple) -> list[float]:
            return list(stats.noise_interval(found[1]))

        self.control = {
            "aa_interval": noise(_speedup(sides)),
            "lengths": {k: noise(_speedup(sides, done, k)) for k in self.plan.lengths},
            "prefill_interval": noise(_prefill(sides)),
            "self_matched": itself.matched,
            "self_total": itself.total,
            "self_logits": itself.logits,
            "capsule": self._name(STOCK),
            **self._plant_all(beside),
        }
        missed = [k for k, v in self.control["faults"].items() if v != "fail"]
        told = f"not caught: {', '.join(missed)}" if missed else "every planted fault caught"
        decision = ("control", f"stock against stock; {told}")
        return self._store(STOCK, sides, done, verdict, decision)

    def _plant(self, name: str, variant: Variant = STOCK) -> fidelity.Fidelity:
        found = self.check_fault(name, variant)
        self.say(f"planted {name} under {variant.name}: {found.verdict}")
        return found

    def _plant_all(self, beside: Variant | None) -> dict:
        """What the gate says of every fault and of none; under `beside`, of those in the weights.

        Where stock does not agree with itself the gate may fail stock without any fault; a fault
        under a variant that passes without it is then the only one whose catch means something.
        """
        planted = {name: self._plant(name) for name in faults.FAULTS}
        found = {
            "faults": {name: f.verdict for name, f in planted.items()},
            "fault_errors": _fault_errors(planted),
            "undamaged": {STOCK.name: self._plant(faults.NONE).verdict},
        }
        if beside:
            found["beside"] = beside.name
            measured = self.beside[beside]
            if not isinstance(measured, Exception) and measured[2] is None:
                planted = {name: self._plant(name, beside) for name in faults.IN_WEIGHTS}
                found["faults_beside"] = {name: f.verdict for name, f in planted.items()}
                found["fault_errors_beside"] = _fault_errors(planted)
                found["undamaged"][beside.name] = self._plant(faults.NONE, beside).verdict
        return found

    def adopt_control(self, stored: dict, beside: Variant | None = None) -> None:
        """Take the control of an interrupted campaign, if it measured the same prompts.

        beside: a variant whose pairs may have been measured with it and not judged yet.
        """
        if stored["prompts"] != self._prompt_records():
            raise LabError("[resume] prompts: expected those of the campaign, got others")
        self.control = stored["control"]
        aa = self.control
        self._itself = fidelity.Itself(aa["self_matched"], aa["self_total"], aa.get("self_logits"))
        self.roofline = stored.get("roofline")
        if beside and all(
            self._slot_name(at, _beside_letters(slot), beside) in self.slots.found
            for at, slot in enumerate(self.schedule)
        ):
            self.run_beside(beside)

    def measure_variant(self, variant: Variant) -> dict:
        """Pairs, verdict, decision -> the capsule, which is on disk when this returns."""
        if self.control is None:
            raise LabError("[campaign] control: expected the A/A control first, got none")
        measured = self.beside.pop(variant, None)
        if isinstance(measured, Exception):
            raise measured
        sides, done, void = measured or self.run_pairs(variant)
        verdict = self.check_variant(variant, sides["B"])
        decision = stats.decide(
            void=void,
            verdict=verdict.verdict,
            gains=self._gains(sides, done),
            prefill_change=_prefill(sides)[0] - 1,
            prefill_noise=1 - self.control["prefill_interval"][0],
            memory=tuple(max(r.peak_mem_gb for r in sides[k].runs) for k in "AB"),
            quick=self.plan.quick,
        )
        itself = self.itself()
        if decision[1].startswith("fidelity") and not itself.repeats:
            parted = f"{itself.matched}/{itself.total} of its own tokens"
            decision = (decision[0], f"{decision[1]}; stock repeats {parted}")
        self.say(f"{variant.name} judged: {verdict.verdict}, {decision[0]}")
        return self._store(variant, sides, done, verdict, decision)

    def _gains(self, sides: dict[str, Side], done: list[Slot]) -> dict:
        found = {}
        for length in dict.fromkeys(slot.length for slot in done):
            speedup, interval = _speedup(sides, done, length)
            found[length] = {
                "decode_speedup": speedup,
                "interval": list(interval),
                "aa_interval": self.control["lengths"][length],
            }
        return found

    def _measure_grid(self, variant: Variant) -> dict:
        short = prompts.pick(list(self.prompts.values()), long=False)
        found = grid.measure_grid(
            self.model, short, self.plan.grid, variant, self.engine, self.checkpoint.moe_layers
        )
        self.tick(self.plan.grid.units)
        return found

    def _name(self, variant: Variant) -> str:
        return f"{self.id}-{variant.slug}"

    def _prompt_records(self) -> list[dict]:
        names = [slot.prompt for slot in self.schedule] + [p.name for p in self.extra_prompts()]
        return [self.prompts[name].record() for name in dict.fromkeys(names)]

    def _store(self, variant, sides, done, verdict, decision) -> dict:
        speedup, interval = _speedup(sides)
        patched = sides["B"]
        found = {
            "meta": {
                **environment.meta(self.engine, self.root, self.command),
                "campaign": self.id,
                "quick": self.plan.quick,
                "memory_source": measure.memory_source(),
            },
            "model": describe(self.checkpoint, self.root),
            "prompts": self._prompt_records(),
            "variant": variant.name,
            "max_tokens": {k: tokens for k, (tokens, _) in self.plan.lengths.items()},
            "runs": {k: runs for k, (_, runs) in self.plan.lengths.items()},
            "schedule": [slot.record() for slot in done],
            "fidelity": {**verdict.record(), "chunk": self.plan.chunk},
            "baseline": sides["A"].rates(),
            "patched": {
                **patched.rates(),
                "patterns": patched.patterns,
                "modules_patched": patched.modules_patched,
                "fallbacks": patched.fallbacks,
                "calls": patched.calls,
                "decoded_tokens": patched.decoded,
            },
            "control": self.control,
            "summary": {
                "decode_speedup": speedup,
                "interval": list(interval),
                "lengths": self._gains(sides, done),
                "prefill_change": _prefill(sides)[0] - 1,
                "decision": decision[0],
                "reason": decision[1],
            },
        }
        if self.roofline:
            found["roofline"] = self.roofline
        if self.plan.grid and not decision[0].startswith("void"):
            found["grid"] = self._measure_grid(variant)
        relative = capsule.write(self.out, self._name(variant), found)
        ledger.append(self.out / ledger.NAME, capsule.row(found, relative))
        mx.clear_cache()
        return found


def _fault_errors(planted: dict[str, fidelity.Fidelity]) -> dict:
    return {
        name: {**f.record()["oracle_error"], "matched": f.matched, "total": f.total}
        for name, f in planted.items()
    }


def _beside_letters(slot: Slot) -> str:
    """A slot's order with a second stock run behind the variant's, or in front of it."""
    return "ABC" if slot.order == "AB" else "CBA"


def _run_line(run: measure.Run) -> str:
    prefill = f", prefill {run.prefill_tok_s:.0f}" if run.prefill_s else ""
    return f"{run.decode_tok_s:.1f} tok/s{prefill}, peak {run.peak_mem_gb:.2f} GB"


def _digest_early(checkpoint: Checkpoint) -> None:
    with suppress(LabError, OSError):  # told where the digest is asked for
        _ = checkpoint.digest


def describe(checkpoint: Checkpoint, root: Path) -> dict:
    """The capsule's `model`. `synth` is what `moefuse synth` makes the same bytes from."""
    made = checkpoint.config.get("moefuse_synth")
    return {
        **({"synth": made} if made else {}),
        "path": environment.relative(checkpoint.path, root),
        "kind": checkpoint.kind,
        "digest": checkpoint.digest,
        "model_type": checkpoint.model_type,
        "geometry": checkpoint.geometry,
        "quantization": checkpoint.quantization,
    }


def _speedup(sides: dict[str, Side], done: Sequence[Slot] = (), length: str | None = None):
    """Paired decode ratio and interval, over all pairs or those of one length."""
    kept = [i for i, slot in enumerate(done) if slot.length == length] if length else None
    rates = [
        [r.decode_tok_s for i, r in enumerate(sides[k].runs) if kept is None or i in kept]
        for k in "AB"
    ]
    return stats.ratio_interval(*rates)


def _prefill(sides: dict[str, Side]):
    """Paired prefill ratio and interval over the pairs that timed a prefill."""
    pairs = [
        (a.prefill_tok_s, b.prefill_tok_s)
        for a, b in zip(sides["A"].runs, sides["B"].runs, strict=True)
        if a.prefill_s and b.prefill_s
    ]
    return stats.ratio_interval(*zip(*pairs, strict=True))


def _unlisted(out: Path, start: str = "") -> list[dict]:
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
    rows += _unlisted(out)
    ids = [r["campaign"] for r in rows if all(r.get(k) == v for k, v in same.items())]
    if kept := resume.newest(out, same):
        ids.append(kept)
    book = out / notebook.NAME
    written = book.read_text(encoding="utf-8") if book.exists() else ""
    newest = max(ids, default=None)
    entry = notebook.of_campaign(written, newest) if newest else ""
    return newest if not entry or notebook.STOPPED in entry else None


def stored(out: Path, identity: str) -> dict[str, dict]:
    """Variant name -> capsule of one campaign; those that the ledger lacks are added to it."""
    for row in _unlisted(out, identity):
        if row["campaign"] == identity:
            ledger.append(out / ledger.NAME, row)
    rows, _ = ledger.read(out / ledger.NAME)
    mine = [row for row in rows if row.get("campaign") == identity]
    return {row["variant"]: capsule.read(files.inside(out, row["capsule"])) for row in mine}


def resized(plan: Plan, **lengths: tuple[int, int] | None) -> Plan:
    """The plan with some (tokens, runs) replaced. A full plan below the minimums is quick."""
    new = {**plan.lengths, **{k: v for k, v in lengths.items() if v}}
    least = FULL_PLAN.lengths
    small = any(t < least[k][0] or r < least[k][1] for k, (t, r) in new.items())
    return replace(plan, lengths=new, quick=plan.quick or small)
