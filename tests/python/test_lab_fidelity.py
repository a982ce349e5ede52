"""The gate: right verdicts on made-up logits, and real damage caught on a real model."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from lab_support import FakeEngine, tiny  # noqa: F401
from mlx.utils import tree_flatten
from moefuse.lab import (
    LabError,
    behaviour,
    bench,
    checkpoint,
    faults,
    fidelity,
    measure,
    prompts,
    variants,
)
from moefuse.lab.campaign import Plan, Side
from scipy.special import rel_entr, softmax

RNG = np.random.default_rng(7)
TRUTH = RNG.normal(0, 2, (32, 50))
STOCK = TRUTH + RNG.normal(0, 0.1, TRUTH.shape)
CLOSE = TRUTH + RNG.normal(0, 0.01, TRUTH.shape)
FAR = TRUTH + RNG.normal(0, 0.3, TRUTH.shape)


def _judge(variant, at=16, margin=0.0):
    """Tokens that part at `at`, where stock's best two logits lie `margin` apart."""
    stock = STOCK.copy()
    order = np.argsort(stock[at])
    stock[at, order[-1]] = stock[at, order[-2]] + margin
    tokens = tuple(range(32))
    other = (*tokens[:at], 99, *tokens[at + 1 :])
    return fidelity.judge(
        {"p": tokens},
        {"p": other},
        {"p": fidelity.Window("p", 0, 32)},
        {"p": stock},
        {"p": variant},
        {"p": TRUTH},
    )


def test_closer_needs_a_smaller_error_and_a_small_margin():
    assert _judge(CLOSE).verdict == "closer"
    assert _judge(CLOSE, margin=5.0).verdict == "fail"
    assert _judge(FAR).verdict == "fail"
    assert _judge(CLOSE).matched == 16


def test_divergence_from_the_oracle_is_told():
    found = _judge(CLOSE).oracle_error
    expected = rel_entr(softmax(TRUTH, axis=-1), softmax(CLOSE, axis=-1)).sum(axis=-1).mean()
    assert found["kl_variant"] == pytest.approx(expected, rel=1e-9)
    assert found["argmax_variant"] == (TRUTH.argmax(-1) == CLOSE.argmax(-1)).mean()
    assert found["kl_variant"] < found["kl_stock"] < _judge(FAR).oracle_error["kl_variant"]


def test_a_kernel_as_noisy_as_stock_is_rarely_shown_closer():
    """Comparing two rms alone would pass half of these; the interval passes about 1 in 40."""
    draws = RNG.chisquare(50, (200, 2, 64))
    found = [fidelity.shown(stock, variant) for stock, variant in draws]
    assert found.count("closer") <= 16  # P < 1e-4 at the 3 % a bootstrap of 64 positions gives
    assert found.count("further") <= 16
    assert all(fidelity.shown(stock, 0.5 * variant) == "closer" for stock, variant in draws)
    assert all(fidelity.shown(stock, 2.0 * variant) == "further" for stock, variant in draws)
    few = draws[0, :, :31]
    assert fidelity.shown(few[0], 0.5 * few[1]) == "neither"  # too few to show it
    assert fidelity.shown(draws[0, 0], 2.0 * draws[0, 1], floor=1e6) == "closer"  # no difference


@pytest.mark.parametrize(("logits", "verdict"), [(STOCK, "identical"), (FAR, "fail")])
def test_equal_tokens_fail_where_the_logits_are_shown_further(logits, verdict):
    tokens = {"p": tuple(range(32))}
    at = {"p": fidelity.Window("p", 0, 32)}
    found = fidelity.judge(tokens, tokens, at, {"p": STOCK}, {"p": logits}, {"p": TRUTH})
    assert (found.verdict, found.matched) == (verdict, 32)


def test_what_float32_sums_in_another_order_differ_by_is_no_difference():
    """A float32 model is its own oracle: its error is zero, and nothing else's can be."""
    tokens = {"p": tuple(range(32))}
    at = {"p": fidelity.Window("p", 0, 32)}
    for size, verdict in ((1e-5, "identical"), (1e-2, "fail")):
        logits = TRUTH + RNG.normal(0, size, TRUTH.shape)
        found = fidelity.judge(tokens, tokens, at, {"p": TRUTH}, {"p": logits}, {"p": TRUTH})
        assert found.verdict == verdict


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail(bad):
    broken = CLOSE.copy()
    broken[3, 4] = bad
    found = _judge(broken)
    assert found.verdict == "fail"
    assert found.record()["oracle_error"]["variant"] is None


def test_identical_tokens_are_identical():
    tokens = {"p": tuple(range(8))}
    found = fidelity.judge(tokens, tokens, {}, {}, {}, {})
    assert (found.verdict, found.matched, found.total) == ("identical", 8, 8)
    assert found.oracle_error is None


def test_one_bad_prompt_decides():
    tokens = {"a": (1, 2), "b": (1, 2)}
    other = {"a": (1, 2), "b": (1, 3)}
    at = {"b": fidelity.Window("b", 0, 2)}
    found = fidelity.judge(tokens, other, at, {"b": STOCK[:2]}, {"b": FAR[:2]}, {"b": TRUTH[:2]})
    assert found.verdict == "fail"
    assert [p.verdict for p in found.per_prompt] == ["identical", "fail"]


@pytest.mark.parametrize(
    ("matched", "start"), [(200, 0), (0, 0), (10, 0), (100, 68), (199, 136), (150, 118)]
)
def test_window_holds_the_divergence(matched, start):
    at = fidelity.window("p", matched, 200)
    assert (at.start, at.count) == (start, 64)
    assert matched == 200 or at.start <= matched < at.start + at.count


@pytest.fixture(scope="module")
def campaign(tiny):  # noqa: F811
    return bench.open_campaign(
        checkpoint.inspect(tiny),
        Plan({"short": (40, 1)}, chunk=32),
        FakeEngine(),
        prompt_file=None,
        root=tiny.parents[1],
        out=tiny.parent,
        command="moefuse fidelity",
    )


def test_forced_logits_repeat_what_decoding_saw(campaign):
    prompt = campaign.prompts["dict"]
    tokens = campaign.stock_tokens("dict", 24)
    logits = fidelity.forced_logits(
        campaign.model, prompt.ids, tokens, fidelity.Window("dict", 5, 19)
    )
    assert logits.argmax(-1).tolist() == list(tokens[5:])


def test_decoding_from_a_kept_cache_gives_the_same_tokens_twice(campaign):
    prompt = campaign.prompts["loop"]
    cache, _ = measure.prefill(campaign.model, prompt.ids)
    runs = [
        measure.generate(campaign.model, prompt.ids, 20, cache=kept).tokens
        for kept in (cache, None, cache)
    ]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("name", sorted(faults.FAULTS))
def test_planted_faults_are_caught_and_taken_out(campaign, name):
    before = {k: np.array(v) for k, v in _parameters(campaign.model).items()}
    assert campaign.check_fault(name).verdict == "fail"
    after = _parameters(campaign.model)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[k], np.array(v)) for k, v in after.items())
    again = campaign._generate(campaign.prompts["list"], 40, variants.STOCK, Side())
    assert again.tokens == campaign.stock_tokens("list", 40)


def test_a_fault_that_turns_no_token_is_caught_by_its_logits(campaign, monkeypatch):
    """Damage that turns none of a few tokens, and none at all: the same positions tell which."""
    small = "every-expert-error:0.03125"
    plan = campaign.plan
    monkeypatch.setattr(campaign, "plan", replace(plan, lengths={"short": (3, 1)}))
    kept = {name: campaign.prompts[name] for name in ("list", "dict")}
    monkeypatch.setattr(campaign, "prompts", kept)
    found, none = campaign.check_fault(small), campaign.check_fault(faults.NONE)
    assert found.matched == found.total == 3 * 2
    assert found.verdict == "fail" and found.oracle_error["shown"] != "closer"
    assert none.verdict == "identical" and none.oracle_error["shown"] == "closer"
    assert found.oracle_error["positions"] == none.oracle_error["positions"] == 2 * plan.chunk
    assert campaign.check_fault("k-minus-1").oracle_error["positions"] == 2 * plan.chunk


def _parameters(model):
    flat = dict(tree_flatten(model.parameters()))
    return {k: v.astype(mx.float32) if v.dtype == mx.bfloat16 else v for k, v in flat.items()}


def test_sensitivity_halves_the_error_until_it_is_missed(campaign):
    before = _parameters(campaign.model)
    found = campaign.sensitivity("every-expert-error")
    tried = list(found["verdicts"].items())
    assert tried[0] == (1.0, "fail")
    assert found["smallest_caught"] == min(e for e, verdict in tried if verdict == "fail")
    assert all(b == a / 2 for (a, _), (b, _) in zip(tried, tried[1:], strict=False))
    after = _parameters(campaign.model)
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_behaviour_of_a_model(campaign):
    found = behaviour.examine(campaign.model, list(campaign.prompts.values()), 12)
    quantiles = found["margin_quantiles"]
    assert quantiles == sorted(quantiles) and quantiles[0] >= 0
    assert found["routing"]["busiest_over_even_share"][0] >= 1
    assert len(found["different_tokens"]) == 3
    assert type(campaign.model.layers[0]).__name__ == "Qwen3MoeDecoderLayer"
    assert "experts, least and most" in "\n".join(behaviour.lines(found))


def test_unknown_fault(campaign):
    with pytest.raises(LabError, match="expected one of"), faults.planted(campaign.model, "x", ()):
        pass


def test_damage_under_a_patch_is_caught(campaign):
    """The fault passes through the variant's own code: here a stand-in that shifts its output."""
    campaign.engine = FakeEngine(bias=0.05)
    found, void = campaign.check_tokens(variants.parse("experts"), 40)
    campaign.engine = FakeEngine()
    assert found.verdict == "fail"
    assert void is None


class Float32Engine(FakeEngine):
    """A patch that computes everything in float32: other tokens, but nearer to the oracle."""

    def patch(self, model, variants=None, **more):
        self.kept = tree_flatten(model.parameters())
        model.set_dtype(mx.float32)
        return super().patch(model, variants, **more)

    def unpatch(self, model):
        super().unpatch(model)
        model.load_weights(self.kept)


def test_float32_arithmetic_is_closer(campaign):
    campaign.engine = Float32Engine()
    found, _ = campaign.check_tokens(variants.parse("experts:fp32"), 40)
    campaign.engine = FakeEngine()
    assert found.oracle_error["variant"] < 0.01 * found.oracle_error["stock"]
    assert found.verdict == "closer"


def test_prompts_without_a_file(tmp_path):
    with pytest.raises(LabError, match="prompts.json: expected"):
        prompts.find_file(tmp_path / "m", tmp_path)


def test_campaign_needs_its_control_first(campaign):
    with pytest.raises(LabError, match="A/A control first"):
        campaign.measure_variant(variants.parse("router"))
