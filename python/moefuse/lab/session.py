"""A loaded model whose patch is put on and taken off: one run of one side, and stock's answers."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from . import fidelity, measure, prompts, variants
from .checkpoint import Checkpoint, load
from .schedule import Plan, make_schedule
from .sides import Side
from .variants import STOCK, Variant, applied


class Session:
    """One process's model, prompts and plan.

    engine: the moefuse package (patch, unpatch, capabilities, __version__), or a stand-in;
    prompts_of: tokenizer -> prompts; tick: called with token steps done, for a progress bar; say:
    called with a line on what was found.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        engine,
        *,
        prompts_of: Callable[..., list[prompts.Prompt]],
        tick: Callable[[int], None] = lambda units: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.checkpoint, self.plan, self.engine = checkpoint, plan, engine
        self.tick, self.say = tick, say
        self.model, self.tokenizer = load(checkpoint)
        if mx.default_device().type == mx.gpu:  # while it compiles, not in front of a capsule
            checkpoint.digest_early()
        found = prompts_of(self.tokenizer)
        self.prompts = {p.name: p for p in found}
        self.schedule = make_schedule(found, plan)
        self.reference: dict[str, tuple[int, ...]] = {}  # stock's tokens, longest seen
        self.snapshots: dict[str, list] = {}  # stock's caches of long prompts
        self.self_matched = self.self_total = 0

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

    def stock_tokens(self, name: str, count: int) -> tuple[int, ...]:
        """Stock's first `count` tokens after a prompt, generated once."""
        if len(self.reference.get(name, ())) < count:
            prompt = self.prompts[name]
            run = self._generate(prompt, count, STOCK, Side(), self._snapshot(prompt))
            self._note_stock(name, run.tokens)
        return self.reference[name][:count]

    def _worst(self, side: Side) -> dict[str, tuple[int, ...]]:
        """Of each prompt's runs the one that left stock's tokens first, else the longest."""
        found = {}
        for name, runs in side.tokens.items():
            agreed = {t: fidelity.matching(self.stock_tokens(name, len(t)), t) for t in runs}
            parted = [t for t in runs if agreed[t] < len(t)]
            found[name] = min(parted, key=agreed.get) if parted else max(runs, key=len)
        return found

    def _void(self, variant: Variant, side: Side) -> str | None:
        layers = self.checkpoint.moe_layers
        return variants.did_not_run(variant, side.calls, side.decoded, layers)
