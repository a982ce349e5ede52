"""Verdicts on a session's tokens and logits, and the faults that must not pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial

from . import faults, fidelity, prompts
from .oracle import Oracle, forced_logits
from .session import Session
from .sides import Side
from .variants import STOCK, Variant, applied

FAULT_PROMPTS = 2  # whose first positions every planted fault is forced through


class Gate(Session):
    """A session that judges."""

    _itself: fidelity.Itself | None = None

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.model, self.checkpoint, self.plan.chunk)

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
                name: forced_logits(self.model, self.prompts[name].ids, stock[name], at)
                for name, at in windows.items()
            }

    def sensitivity(self, kind: str, variant: Variant = STOCK, smallest: float = 2.0**-12) -> dict:
        """Verdict on ever smaller errors of one of faults.GRADED, halved until one is missed."""
        verdicts, error, caught = {}, 1.0, None
        while error >= smallest:
            verdict = self._plant(f"{kind}:{error}", variant).verdict
            verdicts[error] = verdict
            if verdict != "fail":
                break
            caught, error = error, error / 2
        return {"fault": kind, "smallest_caught": caught, "verdicts": verdicts}

    def _plant(self, name: str, variant: Variant = STOCK) -> fidelity.Fidelity:
        found = self.check_fault(name, variant)
        self.say(f"planted {name} under {variant.name}: {found.verdict}")
        return found

    def plant_all(self, beside: Variant | None, ran: bool = False) -> dict:
        """What the gate says of every fault and of none; under `beside`, of those in the weights,
        if that variant really ran.

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
            if ran:
                planted = {name: self._plant(name, beside) for name in faults.IN_WEIGHTS}
                found["faults_beside"] = {name: f.verdict for name, f in planted.items()}
                found["fault_errors_beside"] = _fault_errors(planted)
                found["undamaged"][beside.name] = self._plant(faults.NONE, beside).verdict
        return found


def _fault_errors(planted: dict[str, fidelity.Fidelity]) -> dict:
    return {
        name: {**f.record()["oracle_error"], "matched": f.matched, "total": f.total}
        for name, f in planted.items()
    }
