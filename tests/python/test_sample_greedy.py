"""Greedy sampling: mx.argmax's tokens, and mlx-lm's sampler while a model steps on CUDA."""

from __future__ import annotations

import copy
import importlib

import mlx.core as mx
import moefuse
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from moefuse import greedy
from patch_support import tiny

MODULES = [importlib.import_module(f"mlx_lm.{name}") for name in ("sample_utils", "generate")]


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)


def samplers() -> list:
    return [module.greedy_sampler for module in MODULES]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 300), (4, 2049), (2, 3, 50)])
def test_the_tokens_of_argmax(shape, dtype):
    x = mx.array(np.random.default_rng(3).normal(0, 1, shape), dtype)  # with equal ones in 16 bits
    got = moefuse.sample_greedy(x)
    assert got.dtype == mx.uint32 and got.shape == x.shape[:-1]
    assert mx.array_equal(got, mx.argmax(x, axis=-1))
    turned = x.T
    assert mx.array_equal(moefuse.sample_greedy(turned), mx.argmax(turned, axis=-1))


@pytest.mark.parametrize(
    ("logits", "what"),
    [
        (mx.zeros((2, 0)), r"\[sample_greedy\] logits: expected \[..., V\] with at least one"),
        (mx.array(1.0), r"\[sample_greedy\] logits: expected \[..., V\]"),
        (mx.zeros((2, 3), mx.int32), r"\[sample_greedy\] logits: expected .*float.*int32"),
    ],
)
def test_bad_logits_are_named(logits, what):
    with pytest.raises(ValueError, match=what):
        moefuse.sample_greedy(logits)


def test_ours_stands_in_mlx_lm_while_a_model_steps_on_cuda(on_cuda):
    stock, ids = samplers(), mx.array([3, 1, 4])
    one, other = tiny("qwen"), tiny("glm")
    want = [int(token) for token, _ in generate_step(ids, one, max_tokens=12)]
    moefuse.patch(one, [], step=True)
    moefuse.patch(other, [], step=True)
    assert samplers() == [greedy.greedy_sampler] * 2
    copied = copy.deepcopy(one)
    moefuse.unpatch(copied)  # the model that it was copied from still steps
    moefuse.unpatch(other)
    assert samplers() == [greedy.greedy_sampler] * 2
    assert [int(token) for token, _ in generate_step(ids, one, max_tokens=12)] == want
    moefuse.patch(one, [], step=True)  # takes the former patch off
    moefuse.unpatch(one)
    moefuse.unpatch(one)
    assert samplers() == stock


def test_another_sampler_and_other_devices_are_left_alone(on_cuda, monkeypatch):
    own = lambda logprobs: mx.zeros((logprobs.shape[0],), mx.uint32)  # noqa: E731
    monkeypatch.setattr(MODULES[1], "greedy_sampler", own)
    model = tiny("qwen")
    moefuse.patch(model, [], step=True)
    assert samplers() == [greedy.greedy_sampler, own]
    moefuse.unpatch(model)
    assert samplers()[1] is own
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    moefuse.patch(model, [], step=True)
    assert samplers()[1] is own and samplers()[0] is not greedy.greedy_sampler
    moefuse.unpatch(model)
