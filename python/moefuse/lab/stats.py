"""Paired statistics and the promotion rule. Ratios are patched / baseline, 1.0 is no change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 9999
MEMORY_SLACK_GB = 0.5
MEMORY_SLACK_SHARE = 0.05
PREFILL_SLACK = 0.02


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean; a lone or constant sample is a point."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("[stats] values: expected at least one, got none")
    if data.size == 1 or np.ptp(data) == 0.0:
        return float(data.mean()), float(data.mean())
    found = bootstrap(
        (data,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio_interval(
    baseline: Sequence[float], patched: Sequence[float]
) -> tuple[float, tuple[float, float]]:
    """Geometric mean of the paired ratios and its bootstrap interval."""
    logs = np.log(np.asarray(patched, float) / np.asarray(baseline, float))
    low, high = mean_interval(logs)
    return float(np.exp(logs.mean())), (float(np.exp(low)), float(np.exp(high)))


def noise_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The A/A interval made symmetric about 1: which stock run was called A is arbitrary."""
    reach = max(abs(np.log(bound)) for bound in interval)
    return float(np.exp(-reach)), float(np.exp(reach))


def decide(
    *,
    void: str | None,
    verdict: str,
    gains: dict[str, dict],
    prefill_change: float,
    prefill_noise: float,
    memory: tuple[float, float],
    quick: bool,
) -> tuple[str, str]:
    """The promotion rule -> (decision, reason).

    gains: length -> {"interval": [low, high], "aa_interval": [low, high]}; memory: baseline and
    patched peak in GB; prefill_noise: the largest change stock showed against itself.
    """
    if void:
        return "void: did not run", f"did-not-run: {void}"
    if verdict == "fail":
        return "reject", "fidelity: tokens diverged and the logits are not shown closer"
    base, peak = memory
    if peak - base > MEMORY_SLACK_GB or peak > base * (1 + MEMORY_SLACK_SHARE):
        return "reject", f"memory: peak {peak:.3f} GB against stock's {base:.3f} GB"
    slower = "hold" if quick else "reject"  # one or two pairs of a length settle nothing
    # A drop that stock also shows against itself is the machine's, not the variant's.
    if prefill_change < -max(PREFILL_SLACK, prefill_noise):
        return slower, f"performance: prefill {prefill_change:+.1%}"
    slow = [k for k, g in gains.items() if g["interval"][1] < g["aa_interval"][0]]
    if slow:
        return slower, f"performance: slower than stock ({', '.join(slow)})"
    flat = [k for k, g in gains.items() if g["interval"][0] <= g["aa_interval"][1]]
    if flat:
        return "hold", f"performance: no gain beyond the A/A interval ({', '.join(flat)})"
    if verdict == "closer":
        return "hold", "fidelity: closer to the oracle but not identical; opt-in"
    if prefill_change < -PREFILL_SLACK:
        return "hold", f"performance: prefill {prefill_change:+.1%}, within stock's own noise"
    if quick:
        return "hold", "performance: gain seen, but a quick run cannot promote"
    return "promote", "identical tokens and a gain beyond the A/A interval at every length"
