"""Intervals against cases known by hand, and every branch of the promotion rule."""

import numpy as np
import pytest
from moefuse.lab import stats

GAIN = {"interval": [1.2, 1.3], "aa_interval": [0.95, 1.05]}
FLAT = {"interval": [1.0, 1.3], "aa_interval": [0.95, 1.05]}
SLOW = {"interval": [0.7, 0.8], "aa_interval": [0.95, 1.05]}
GOOD = {
    "void": None,
    "verdict": "identical",
    "gains": {"short": GAIN, "long": GAIN},
    "prefill_change": 0.0,
    "prefill_noise": 0.01,
    "memory": (1.0, 1.0),
    "quick": False,
}


def test_interval_of_a_constant_ratio_is_a_point():
    ratio, interval = stats.ratio_interval([10.0, 20.0, 40.0], [20.0, 40.0, 80.0])
    assert ratio == pytest.approx(2.0)
    assert interval == pytest.approx((2.0, 2.0))


def test_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        low, high = stats.mean_interval(rng.normal(1.0, 0.1, size=40))
        hits += low <= 1.0 <= high
    assert 50 <= hits <= 60  # P(outside) < 0.1 % for a true 93-95 % interval


def test_interval_is_repeatable_and_refuses_nothing():
    values = [0.1, 0.4, 0.2, 0.9]
    assert stats.mean_interval(values) == stats.mean_interval(values)
    with pytest.raises(ValueError, match="at least one"):
        stats.mean_interval([])


def test_noise_interval_is_symmetric_and_holds_the_original():
    low, high = stats.noise_interval((1.01, 1.2))
    assert low == pytest.approx(1 / 1.2)
    assert high == pytest.approx(1.2)
    low, high = stats.noise_interval((0.8, 1.1))
    assert (low, high) == pytest.approx((0.8, 1.25))


@pytest.mark.parametrize(
    ("change", "decision", "reason"),
    [
        ({}, "promote", "identical"),
        ({"void": "router: got 0"}, "void: did not run", "did-not-run"),
        ({"verdict": "fail"}, "reject", "fidelity"),
        ({"verdict": "closer"}, "hold", "fidelity"),
        ({"gains": {"short": GAIN, "long": FLAT}}, "hold", "performance"),
        ({"gains": {"short": SLOW, "long": GAIN}}, "reject", "performance"),
        ({"prefill_change": -0.03}, "reject", "performance: prefill"),
        ({"prefill_change": -0.03, "prefill_noise": 0.05}, "hold", "performance: prefill"),
        ({"memory": (1.0, 1.06)}, "reject", "memory"),
        ({"memory": (20.0, 20.6)}, "reject", "memory"),
        ({"memory": (20.0, 20.4)}, "promote", "identical"),
        ({"quick": True}, "hold", "performance: gain seen"),
        ({"quick": True, "gains": {"short": SLOW}}, "hold", "performance: slower"),
        ({"quick": True, "verdict": "fail"}, "reject", "fidelity"),
    ],
)
def test_promotion_rule(change, decision, reason):
    got = stats.decide(**{**GOOD, **change})
    assert got[0] == decision
    assert got[1].startswith(reason)
