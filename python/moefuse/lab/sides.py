"""What the two sides of a campaign showed: their runs and counters, and the ratios of pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import measure, stats
from .schedule import Slot


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


def decode_ratio(sides: dict[str, Side], done: Sequence[Slot] = (), length: str | None = None):
    """Paired decode ratio and interval, over all pairs or those of one length."""
    kept = [i for i, slot in enumerate(done) if slot.length == length] if length else None
    rates = [
        [r.decode_tok_s for i, r in enumerate(sides[k].runs) if kept is None or i in kept]
        for k in "AB"
    ]
    return stats.ratio_interval(*rates)


def prefill_ratio(sides: dict[str, Side]):
    """Paired prefill ratio and interval over the pairs that timed a prefill."""
    pairs = [
        (a.prefill_tok_s, b.prefill_tok_s)
        for a, b in zip(sides["A"].runs, sides["B"].runs, strict=True)
        if a.prefill_s and b.prefill_s
    ]
    return stats.ratio_interval(*zip(*pairs, strict=True))
