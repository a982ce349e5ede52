"""The timed pairs: each slot of the schedule once a side, kept on disk as it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import faults, measure, resume
from .schedule import Slot
from .session import Session
from .sides import Side
from .variants import STOCK, Variant


class Pairs(Session):
    """A session that times pairs."""

    slots: resume.Slots | None = None  # where runs are kept on disk, if they are

    def __init__(self, *loaded, **more):
        super().__init__(*loaded, **more)
        self.beside: dict[Variant, tuple | Exception] = {}  # pairs measured with the control

    def units(self) -> int:
        """Work of one variant in token steps, for the progress bar."""
        timed = sum(2 * (s.tokens + len(self.prompts[s.prompt].ids)) for s in self.schedule)
        extra = sum(self.plan.extra_tokens + len(p.ids) for p in self.extra_prompts())
        return timed + extra + (self.plan.grid.units if self.plan.grid else 0)

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
            letters = slot.beside
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


def _run_line(run: measure.Run) -> str:
    prefill = f", prefill {run.prefill_tok_s:.0f}" if run.prefill_s else ""
    return f"{run.decode_tok_s:.1f} tok/s{prefill}, peak {run.peak_mem_gb:.2f} GB"
