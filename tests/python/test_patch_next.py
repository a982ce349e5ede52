"""Qwen3-Next and Qwen3.5-MoE: the MoE block is fused, everything else stays mlx-lm's."""

from __future__ import annotations

import mlx.core as mx
import moefuse
import pytest
from patch_support import (
    DTYPES,
    NEXT_FAMILIES,
    blocks,
    decode,
    prompt,
    same_bits,
    same_decode,
    tiny,
)

VARIANTS = [("router",), ("experts",), ("swiglu",), ("combine",), ("router", "experts")]


@pytest.fixture(params=NEXT_FAMILIES)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_stock_bit_for_bit(family, dtype):
    model = tiny(family, DTYPES[dtype])
    stock, long = decode(model, count=24), model(prompt(40))
    mx.eval(long)
    for variants in VARIANTS:
        report = moefuse.patch(model, variants)
        assert same_decode(decode(model, count=24), stock), variants
        assert same_bits(model(prompt(40)), long)  # the prompt's path, sorted by expert
        assert report.modules_patched == 2 and len(report.calls) == len(variants)
        assert all(count >= 24 * 2 for count in report.calls.values()), report.calls
    moefuse.unpatch(model)
    assert same_decode(decode(model, count=24), stock)


def test_the_shared_expert_and_its_gate_count(family):
    """The comparison above must be able to fail."""
    model = tiny(family)
    stock = model(prompt(3))
    moefuse.patch(model)
    gate = blocks(model)[0].shared_expert_gate
    gate.scales = gate.scales * -1
    assert not same_bits(model(prompt(3)), stock)


def test_several_rows_at_once(family):
    model = tiny(family)
    want = model(prompt(1, rows=5))
    mx.eval(want)
    moefuse.patch(model)
    assert same_bits(model(prompt(1, rows=5)), want)


def test_the_step_is_not_there_yet_and_says_so(family):
    model = tiny(family)
    stock = decode(model, count=8)
    report = moefuse.patch(model, ["router", "experts"], step=True)
    assert same_decode(decode(model, count=8), stock)
    assert report.calls["moe_experts"] and "step" not in report.calls
    (reason,) = (text for text in report.fallbacks if text.startswith("step: "))
    assert "model_type: expected" in reason and family in reason


def test_zmlx_turns_more_on_by_default_here(family, monkeypatch):
    monkeypatch.setenv("ZMLX_QWEN_COMBINE_MODE", "fp32_no_fma")
    report = moefuse.patch(tiny(family))
    assert report.variants == ("router", "swiglu", "combine")
    assert (report.router_mode, report.accumulate) == ("logits", "fp32_no_fma")
    monkeypatch.setenv("ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS", "0")
    monkeypatch.setenv("ZMLX_QWEN_FUSED_SWIGLU", "0")
    assert moefuse.patch(tiny(family)).variants == ("combine",)
