"""How much a campaign measures, and in which order: A is stock, B the variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import fidelity, grid, prompts


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

    @property
    def beside(self) -> str:
        """The order with a second stock run behind the variant's, or in front of it."""
        return "ABC" if self.order == "AB" else "CBA"


def make_schedule(found: Sequence[prompts.Prompt], plan: Plan) -> list[Slot]:
    """A B, B A, A B ...: over two runs of a length the order is A B B A, so drift cancels."""
    slots = []
    pool = prompts.pick(found, long=False)
    for length, (tokens, runs) in plan.lengths.items():
        for i in range(runs):
            order = "AB" if i % 2 == 0 else "BA"
            slots.append(Slot(length, pool[i % len(pool)].name, tokens, order))
    return slots


def resized(plan: Plan, **lengths: tuple[int, int] | None) -> Plan:
    """The plan with some (tokens, runs) replaced. A full plan below the minimums is quick."""
    new = {**plan.lengths, **{k: v for k, v in lengths.items() if v}}
    least = FULL_PLAN.lengths
    small = any(t < least[k][0] or r < least[k][1] for k, (t, r) in new.items())
    return replace(plan, lengths=new, quick=plan.quick or small)
