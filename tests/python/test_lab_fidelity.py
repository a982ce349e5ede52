"""The gate: right verdicts on made-up logits, and real damage caught on a real model."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
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
from moefuse.lab.oracle import Oracle, forced_logits
from moefuse.lab.schedule import Plan
from moefuse.lab.sides import Side
from scipy.special import rel_entr, softmax

RNG = np.random.default_rng(7)
TRUTH = RNG.normal(0, 2, (32, 50))
STOCK = TRUTH + RNG.normal(0, 0.1, TRUTH.shape)
CLOSE = TRUTH + RNG.normal(0, 0.01, TRUTH.shape)
FAR = TRUTH + RNG.normal(0, 0.3, TRUTH.shape)


AGAIN = TRUTH + RNG.normal(0, 0.1, TRUTH.shape)  # another draw of a stock that does not repeat
PARTS = fidelity.Itself(
    900, 1000, fidelity.compare({"p": STOCK}, {"p": AGAIN}, {"p": TRUTH})
)  # as STOCK and AGAIN


def _judge(variant, at=16, margin=0.0, itself=fidelity.REPEATS):
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
        itself,
    )


@pytest.mark.parametrize(
    ("logits", "margin", "verdict"),
    [(CLOSE, 0.0, "closer"), (CLOSE, 5.0, "closer"), (AGAIN, 0.0, "fail"), (FAR, 0.0, "fail")],
    ids=["closer", "closer-beyond-a-tie", "equal", "worse"],
)
def test_where_stock_parts_from_itself_the_forced_positions_decide(logits, margin, verdict):
    found = _judge(logits, margin=margin, itself=PARTS)
    assert found.verdict == verdict
    assert "900/1000 tokens agree" in found.per_prompt[0].reason
    if margin:  # a stock that repeats itself is asked for its margin too
        assert _judge(logits, margin=margin).verdict == "fail"


def test_a_variant_has_to_be_closer_by_more_than_stock_s_own_draws_differ():
    """A little closer, shown so, is not enough where stock's second pass seems as much closer."""
    half = STOCK.copy()
    half[:, :25] = TRUTH[:, :25] + 0.97 * (STOCK - TRUTH)[:, :25]
    sides = ({"p": STOCK}, {"p": half}, {"p": TRUTH})
    low, high = fidelity.compare(*sides)["difference"]
    assert -PARTS.margin < low <= high < -0.02
    assert fidelity.compare(*sides, 0.0)["shown"] == "closer"
    assert fidelity.compare(*sides, PARTS.margin)["shown"] == "neither"
    assert fidelity.compare(*sides, 0.02)["shown"] == "closer"
    assert fidelity.Itself(1000, 1000, PARTS.logits).margin == 0.0  # its tokens all agree


def test_one_blunder_among_good_positions_is_not_closer():
    wrong = CLOSE.copy()
    wrong[7, 3] += 20.0
    assert _judge(wrong, itself=PARTS).verdict == "fail"


def test_damage_is_ruled_out_only_by_a_variant_closer_than_it():
    def side(size):
        return {"p": TRUTH + np.random.default_rng(int(1e4 * size)).normal(0, size, TRUTH.shape)}

    truth, damage = {"p": TRUTH}, RNG.normal(0, 0.05, TRUTH.shape)
    for size, out in ((0.01, True), (0.05, False), (0.1, False)):
        whole = side(size)
        assert fidelity.rules_out(whole, {"p": whole["p"] + damage}, truth) is out


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
    logits = forced_logits(campaign.model, prompt.ids, tokens, fidelity.Window("dict", 5, 19))
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


def test_a_small_error_is_really_planted(campaign):
    """1 + 2^-8 is 1 in bfloat16: a factor rounded to it would damage nothing."""
    projection = campaign.model.layers[1].mlp.switch_mlp.down_proj
    before = np.array(projection["scales"].astype(mx.float32))
    with faults.planted(campaign.model, "every-expert-error:0.00390625", ()):
        after = np.array(projection["scales"].astype(mx.float32))
    grown = np.abs(after / before - 1)
    assert grown.max() < 2**-6 and 2**-9 < grown.mean() < 2**-7


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


class Wavering(nn.Module):
    """A last norm whose output differs from run to run, as on a GPU that does not repeat itself:
    only while no patch is on, so that a variant is free of it, as is the oracle."""

    def __init__(self, norm, engine):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self._engine = engine

    def __call__(self, x):
        y = mx.fast.rms_norm(x, self.weight, self.eps)
        if self._engine.undo:
            return y
        return (y * (1 + mx.random.normal(y.shape, scale=0.05))).astype(y.dtype)


@pytest.fixture
def wavering(campaign, monkeypatch):
    """The campaign with a stock whose every pass is another draw."""
    engine = Float32Engine()
    inner = campaign.model.model
    for name, value in (
        ("engine", engine),
        ("oracle", Oracle(campaign.model, campaign.checkpoint, 32)),
        ("reference", {}),
        ("_itself", None),
        ("self_matched", 0),
        ("self_total", 0),
    ):
        monkeypatch.setattr(campaign, name, value)
    norm, inner.norm = inner.norm, Wavering(inner.norm, engine)
    mx.random.seed(11)
    yield campaign
    inner.norm = norm


def test_a_stock_that_parts_from_itself_is_found_and_told(wavering):
    itself = wavering.itself()
    assert not itself.repeats and itself.margin > 0
    experts = variants.parse("experts:fp32")
    found, _ = wavering.check_tokens(experts, 40)
    assert found.matched < found.total and found.verdict == "closer"
    assert f"{itself.matched}/{itself.total} tokens agree" in found.per_prompt[0].reason
    assert wavering.check_fault(faults.NONE).verdict == "fail"  # no closer than itself
    assert wavering.check_fault(faults.NONE, experts).verdict == "closer"


@pytest.mark.parametrize("name", [*faults.IN_WEIGHTS, "every-expert-error:0.03125"])
def test_damage_is_caught_also_where_the_noise_of_stock_would_hide_it(wavering, name):
    found = wavering.check_fault(name, variants.parse("experts:fp32"))
    hidden = name not in faults.IN_WEIGHTS
    assert found.oracle_error["than_whole"] == "further" and found.oracle_error["ruled_out"]
    assert (found.oracle_error["shown"] == "closer") is hidden
    assert found.verdict == "fail"


def test_prompts_without_a_file(tmp_path):
    with pytest.raises(LabError, match="prompts.json: expected"):
        prompts.find_file(tmp_path / "m", tmp_path)


def test_campaign_needs_its_control_first(campaign):
    with pytest.raises(LabError, match="A/A control first"):
        campaign.measure_variant(variants.parse("router"))
