"""Several greedy tokens on their way: the same text as through mlx-lm, whatever ends it."""

from __future__ import annotations

import mlx.core as mx
import moefuse
import pytest
from mlx_lm import load, stream_generate
from moefuse import ahead, cli
from test_step import CHECKPOINTS, ROOT, TEXTS
from typer.testing import CliRunner


@pytest.fixture(params=CHECKPOINTS)
def stepping(request):
    model, tokenizer = load(ROOT / "models" / request.param)
    moefuse.patch(model, [], step=True, accumulate="fp32_no_fma")
    yield model, tokenizer
    moefuse.unpatch(model)


def greedy_text(model, tokenizer, text: str, count: int):
    parts = list(stream_generate(model, tokenizer, text, max_tokens=count))
    return "".join(p.text for p in parts), parts[-1].generation_tokens, parts[-1].finish_reason


def ahead_text(model, tokenizer, text: str, count: int):
    parts = list(ahead.stream(model, tokenizer, text, count))
    return "".join(p.text for p in parts), parts[-1].generation_tokens, parts[-1].finish_reason


@pytest.mark.parametrize("count", [1, 2, ahead.LOT, ahead.LOT + 1, 300])  # a cache grows at 256
def test_the_text_is_mlx_lms(stepping, count):
    for text in TEXTS:
        want = greedy_text(*stepping, text, count)
        assert ahead_text(*stepping, text, count) == want


def test_a_long_prompt_is_filled_in_parts(stepping, monkeypatch):
    model, tokenizer = stepping
    ids = mx.array(tokenizer.encode(" ".join(TEXTS * 4)))
    whole = list(ahead.tokens(model, ids, 9))
    monkeypatch.setattr(ahead, "PREFILL", 16)
    assert ids.size > 40 and list(ahead.tokens(model, ids, 9)) == whole
    assert list(ahead.tokens(model, ids[:1], 3))  # nothing to fill


def test_an_end_token_ends_it(stepping):
    model, tokenizer = stepping
    first = list(ahead.tokens(model, mx.array(tokenizer.encode(TEXTS[0])), 12))
    tokenizer.add_eos_token(str(first[5]))
    want = greedy_text(model, tokenizer, TEXTS[0], 40)
    assert want[2] == "stop" and want[1] <= 6
    assert ahead_text(model, tokenizer, TEXTS[0], 40) == want


def test_the_models_last_position_is_said_after_its_token(stepping, monkeypatch):
    model, tokenizer = stepping
    ids = mx.array(tokenizer.encode(TEXTS[0]))
    want = list(ahead.tokens(model, ids, 20))
    take, left = model._moefuse_step.take, 11

    def refuses(token, cache, greedy=False):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("[step] rows[0].position: expected 0 to 10, got 11")
        return take(token, cache, greedy)

    monkeypatch.setattr(model._moefuse_step, "take", refuses)
    said = []
    with pytest.raises(ValueError, match="position"):
        for token in ahead.tokens(model, ids, 20):
            said.append(token)
    assert said == want[:11]


def test_a_model_that_does_not_fit_is_refused(stepping):
    model, tokenizer = stepping
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        list(ahead.tokens(model, mx.array(tokenizer.encode(TEXTS[0])), 4))
    model.eval()


def test_calls_are_counted(stepping):
    model, tokenizer = stepping
    before = model._moefuse_step.calls["step"]
    list(ahead.tokens(model, mx.array(tokenizer.encode(TEXTS[0])), 21))
    assert model._moefuse_step.calls["step"] == before + 21


def test_generate_takes_it_where_it_serves(monkeypatch):
    arguments = ["generate", str(ROOT / "models" / CHECKPOINTS[0]), "--prompt", TEXTS[0],
                 "--variants", "step:fp32_no_fma", "--max-tokens", "30"]  # fmt: skip
    plain = CliRunner().invoke(cli.app, arguments)
    used = []
    monkeypatch.setattr(ahead, "serves", lambda model: used.append(model) or True)
    other = CliRunner().invoke(cli.app, arguments)
    assert plain.exit_code == other.exit_code == 0
    assert used and other.stdout == plain.stdout
    CliRunner().invoke(cli.app, [*arguments, "--temp", "0.5"])
    assert len(used) == 1  # not greedy: mlx-lm's own


def test_it_serves_on_cuda_alone(stepping):
    assert ahead.serves(stepping[0]) == mx.cuda.is_available()
