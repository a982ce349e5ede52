"""What a kernel does not take runs as stock, is counted, and is told once."""

from __future__ import annotations

import logging

import mlx.core as mx
import mlx.nn as nn
import moefuse
import pytest
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.lora import LoRASwitchLinear
from patch_support import FAMILIES, blocks, prompt, same_bits, tiny, tiny_with_experts

LAYERS = 2  # MoE blocks of a tiny model


class Gelu(nn.Module):
    """An activation with SwiGLU's signature and other values."""

    def __call__(self, x, gate):
        return nn.gelu(gate) * x


class OtherSwitch(SwitchGLU):
    """A stranger's expert module."""


def gelu(model):
    for block in blocks(model):
        block.switch_mlp.activation = Gelu()


def biased(model):
    for block in blocks(model):
        down = block.switch_mlp.down_proj
        down.bias = mx.ones((down.num_experts, down.output_dims), down.scales.dtype)


def float32_scales(model):
    for block in blocks(model):
        up = block.switch_mlp.up_proj
        up.scales = up.scales.astype(mx.float32)
        up.biases = up.biases.astype(mx.float32)


def other_switch(model):
    for block in blocks(model):
        block.switch_mlp.__class__ = OtherSwitch


def with_lora(model):
    for block in blocks(model):
        wrapped = LoRASwitchLinear.from_base(block.switch_mlp.gate_proj, r=4)
        wrapped.lora_b = mx.random.normal(wrapped.lora_b.shape) * 0.1
        block.switch_mlp.gate_proj = wrapped
    model.eval()


def mixed_bits(model):
    for block in blocks(model):
        down = block.switch_mlp.down_proj
        weight = mx.dequantize(
            down.weight, down.scales, down.biases, group_size=down.group_size, bits=down.bits
        )
        down.weight, down.scales, down.biases = mx.quantize(weight, group_size=32, bits=8)
        down.bits = 8


def mixed_modes(model):
    for block in blocks(model):
        down = block.switch_mlp.down_proj
        weight = mx.dequantize(
            down.weight, down.scales, down.biases, group_size=down.group_size, bits=down.bits
        )
        down.weight, down.scales = mx.quantize(weight, group_size=32, bits=4, mode="mxfp4")
        down.biases, down.mode = None, "mxfp4"


@pytest.mark.parametrize(
    ("quantize", "change", "reason"),
    [
        ({}, None, "gate_proj is a SwitchLinear"),
        ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, None, "quantised as mxfp8"),
        ({"group_size": 32, "bits": 3}, None, "has 3 bits in groups of 32"),
        (None, gelu, "the activation is not SwiGLU"),
        (None, biased, "down_proj has a bias"),
        (None, with_lora, "gate_proj is a LoRASwitchLinear"),
        (None, other_switch, "switch_mlp is a OtherSwitch"),
        (None, mixed_bits, "differ in mode, bits or group_size"),
        (None, mixed_modes, "differ in mode, bits or group_size"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_structure(family, quantize, change, reason, caplog):
    model = _quantised(family, quantize)
    if change:
        change(model)
    want = model(prompt(3))
    mx.eval(want)
    with caplog.at_level(logging.WARNING, "moefuse"):
        report = moefuse.patch(model, ["router", "experts"])
        assert report.modules_patched == LAYERS
        assert report.patterns == ["moe_router"]
        got = model(prompt(3))
    assert same_bits(got, want)
    assert report.calls == {"moe_router": LAYERS}
    (told, count), *rest = report.fallbacks.items()
    assert told.startswith("experts: ") and reason in told and not rest
    assert count == 2 * LAYERS  # once per block when patched, once per call
    assert len(caplog.records) == 1 and reason in caplog.text


def _quantised(family: str, quantize: dict | None):
    """Only the experts take an odd quantisation: the rest of the model is not the subject."""
    if quantize is None:
        return tiny(family)
    if quantize == {}:  # MLX multiplies unquantised experts on CPU in float32 only
        return tiny(family, mx.float32, quantize={})
    return tiny_with_experts(family, **quantize)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_another_dtype(family):
    model = tiny(family)
    float32_scales(model)
    want = model(prompt(3))
    mx.eval(want)
    report = moefuse.patch(model, ["experts", "combine"])
    assert same_bits(model(prompt(3)), want)
    assert report.fallbacks["experts: up_proj has float32 scales, x is bfloat16"] >= LAYERS
    assert report.calls == {"moe_combine": LAYERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_another_dtype(family):
    model = tiny(family)
    x = mx.random.normal((1, 3, 64))
    block = blocks(model)[0]
    want = block(x)
    mx.eval(want)
    report = moefuse.patch(model, ["router", "experts"])
    assert same_bits(block(x), want)
    assert report.fallbacks == {"experts: gate_proj has bfloat16 scales, x is float32": 1}


def test_global_scale():
    model = tiny("qwen")
    for block in blocks(model):
        block.switch_mlp.gate_proj.global_scale = mx.ones((16,))
    report = moefuse.patch(model, ["experts"])
    assert report.fallbacks == {"experts: gate_proj has a global_scale": LAYERS}
    assert report.modules_patched == 0 and report.patterns == []


def test_a_block_with_nothing_to_fuse_keeps_its_class():
    model = tiny("qwen", quantize={})
    classes = [type(block) for block in blocks(model)]
    report = moefuse.patch(model, ["experts"])
    assert [type(block) for block in blocks(model)] == classes
    assert report.modules_patched == 0
    assert report.fallbacks == {"experts: gate_proj is a SwitchLinear": LAYERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_sorted_batches(family, caplog):
    model = tiny(family)
    want = model(prompt(40))
    mx.eval(want)
    report = moefuse.patch(model, ["experts"])
    with caplog.at_level(logging.WARNING, "moefuse"):
        assert same_bits(model(prompt(40)), want)
    assert report.fallbacks == {"experts: 64 indices or more (mlx-lm sorts them)": LAYERS}
    assert report.calls == {} and not caplog.records  # normal use: no warning


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_gradients(family):
    model = tiny(family)
    model.train()
    want = model(prompt(3))
    mx.eval(want)

    def loss(x):
        return blocks(model)[0](x).sum()

    x = mx.random.normal((1, 3, 64)).astype(mx.bfloat16)
    slope = mx.grad(loss)(x)
    mx.eval(slope)
    report = moefuse.patch(model)
    assert same_bits(model(prompt(3)), want)
    assert same_bits(mx.grad(loss)(x), slope)
    assert report.fallbacks == {"block: training mode": LAYERS + 1}
    assert report.calls == {}
    model.eval()
    assert same_bits(model(prompt(3)), want)
    assert report.calls == {"moe_router": LAYERS, "moe_experts": LAYERS}


def test_lora_put_on_and_taken_off_after_the_patch():
    """Layers are looked at anew whenever one was replaced."""
    model = tiny("glm")
    want = model(prompt(3))
    report = moefuse.patch(model, ["experts"])
    kept = [block.switch_mlp.gate_proj for block in blocks(model)]
    with_lora(model)
    tuned = model(prompt(3))
    mx.eval(want, tuned)
    assert report.fallbacks == {"experts: gate_proj is a LoRASwitchLinear": LAYERS}
    assert not same_bits(tuned, want)
    moefuse.unpatch(model)
    assert same_bits(model(prompt(3)), tuned)
    report = moefuse.patch(model, ["router", "experts"])
    for block, gate in zip(blocks(model), kept, strict=True):
        block.switch_mlp.gate_proj = gate
    assert same_bits(model(prompt(3)), want)
    assert report.calls["moe_experts"] == LAYERS


def test_too_many_experts_a_token():
    model = tiny("qwen", num_experts=32, num_experts_per_tok=17)
    want = model(prompt(3))
    mx.eval(want)
    report = moefuse.patch(model)
    assert report.modules_patched == 0
    assert same_bits(model(prompt(3)), want)
    assert set(report.fallbacks) == {
        "router: top_k 17 is more than 16",
        "experts: top_k 17 is more than 16",
    }


def test_a_gate_of_another_class():
    model = tiny("glm")
    for block in blocks(model):
        block.gate.__class__ = type("MyGate", (type(block.gate),), {})
    want = model(prompt(3))
    mx.eval(want)
    report = moefuse.patch(model)
    assert same_bits(model(prompt(3)), want)
    assert report.fallbacks == {"router: gate is a MyGate": 2 * LAYERS}
    assert report.calls == {"moe_experts": LAYERS}


def test_a_block_that_others_have_changed():
    model = tiny("qwen")
    block = blocks(model)[0]
    block.__class__ = type("Other", (type(block),), {})
    report = moefuse.patch(model)
    assert report.modules_patched == LAYERS - 1
    assert sum(report.fallbacks.values()) == 1
    assert "changed by others" in next(iter(report.fallbacks))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_sum_goes_through_all_sum(family, monkeypatch):
    """A sharded block adds the shards up last, after the shared experts."""
    model = tiny(family)
    group = mx.distributed.init()
    seen = []
    all_sum = mx.distributed.all_sum

    def spy(y, group=None, **kwargs):
        seen.append(y)
        return all_sum(y, group=group, **kwargs)

    monkeypatch.setattr(mx.distributed, "all_sum", spy)
    for block in blocks(model):
        block.sharding_group = group
    want = model(prompt(3))
    stock, seen[:] = list(seen), []
    moefuse.patch(model)
    assert same_bits(model(prompt(3)), want)
    assert len(seen) == len(stock) == LAYERS
    assert all(same_bits(a, b) for a, b in zip(seen, stock, strict=True))


def test_zmlx_exact_on_glm_rounds_the_weights_first(monkeypatch):
    model = tiny("glm")
    block = blocks(model)[0]
    x = mx.random.normal((1, 2, 64)).astype(mx.bfloat16)
    indices, weights = block.gate(x)
    y = block.switch_mlp(x, indices)
    want = mx.zeros((1, 2, 64), mx.bfloat16)
    rounded = weights.astype(mx.bfloat16)
    report = None
    monkeypatch.setenv("ZMLX_GLM_COMBINE_MODE", "exact")
    monkeypatch.setenv("ZMLX_GLM_FUSED_SWIGLU", "0")
    want = (y * rounded[..., None]).sum(-2).astype(y.dtype) + block.shared_experts(x)
    plain = block(x)
    mx.eval(want, plain)
    report = moefuse.patch(model)
    assert (report.variants, report.accumulate) == (("combine",), "exact")
    got = block(x)
    assert same_bits(got, want)
    assert not same_bits(got, plain)
