"""A campaign: one model, stock against stock, then each variant against stock, in pairs.

Everything runs in one process on one loaded model: a side is the model with its patch on or off.
Each variant's capsule and row are on disk before the next variant starts.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import mlx.core as mx

from . import (
    LabError,
    capsule,
    environment,
    fidelity,
    grid,
    ledger,
    measure,
    prompts,
    resume,
    roofline,
    stats,
)
from .gate import Gate
from .pairs import Pairs
from .schedule import Slot
from .sides import Side, decode_ratio, prefill_ratio
from .variants import STOCK, Variant


class Campaign(Pairs, Gate):
    """Measures, judges and records the variants of one model.

    Beside what a session takes: root and command, which a capsule shows; out, the folder it goes
    to; identity, of a campaign to go on with; keep, whether timed runs stay on disk for --resume.
    """

    def __init__(
        self,
        *loaded,
        root: Path,
        out: Path,
        command: str,
        identity: str | None = None,
        keep: bool = True,
        **more,
    ):
        super().__init__(*loaded, **more)
        self.root, self.out, self.command = root, out, command
        self.id = identity or self._new_id()
        same = partial(resume.settings, self.checkpoint, self.plan, root)
        self.slots = resume.Slots(out, self.id, same) if keep else None
        self.control: dict | None = None
        self.roofline: dict | None = None

    def _new_id(self) -> str:
        stamp = environment.stamp(environment.now())
        return f"{stamp}-{self.checkpoint.name}{'-quick' if self.plan.quick else ''}"

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
            "aa_interval": noise(decode_ratio(sides)),
            "lengths": {k: noise(decode_ratio(sides, done, k)) for k in self.plan.lengths},
            "prefill_interval": noise(prefill_ratio(sides)),
            "self_matched": itself.matched,
            "self_total": itself.total,
            "self_logits": itself.logits,
            "capsule": self._name(STOCK),
            **self.plant_all(beside, self._ran_beside(beside)),
        }
        missed = [k for k, v in self.control["faults"].items() if v != "fail"]
        told = f"not caught: {', '.join(missed)}" if missed else "every planted fault caught"
        decision = ("control", f"stock against stock; {told}")
        return self._store(STOCK, sides, done, verdict, decision)

    def _ran_beside(self, variant: Variant | None) -> bool:
        """Whether the variant's pairs were measured with the control's, and it really ran."""
        measured = self.beside.get(variant)
        return measured is not None and not isinstance(measured, Exception) and measured[2] is None

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
            self._slot_name(at, slot.beside, beside) in self.slots.found
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
            prefill_change=prefill_ratio(sides)[0] - 1,
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
            speedup, interval = decode_ratio(sides, done, length)
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
        speedup, interval = decode_ratio(sides)
        patched = sides["B"]
        found = {
            "meta": {
                **environment.meta(self.engine, self.root, self.command),
                "campaign": self.id,
                "quick": self.plan.quick,
                "memory_source": measure.memory_source(),
            },
            "model": self.checkpoint.record(self.root),
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
                "prefill_change": prefill_ratio(sides)[0] - 1,
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
