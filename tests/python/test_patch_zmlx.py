"""mx.gather_qmm_swiglu, as ZMLX looks for it and calls it."""

from __future__ import annotations

import mlx.core as mx
import moefuse
import pytest
from patch_support import blocks, prompt, same_bits, tiny


@pytest.fixture(autouse=True)
def clean():
    moefuse.uninstall_zmlx_primitive()
    yield
    moefuse.uninstall_zmlx_primitive()


def test_install_and_undo():
    assert not hasattr(mx, "gather_qmm_swiglu")
    assert moefuse.install_zmlx_primitive() is None
    assert mx.gather_qmm_swiglu is moefuse.gather_qmm_swiglu
    assert moefuse.capabilities()["zmlx_primitive"]
    assert moefuse.install_zmlx_primitive() is None
    moefuse.uninstall_zmlx_primitive()
    moefuse.uninstall_zmlx_primitive()
    assert not hasattr(mx, "gather_qmm_swiglu")


def test_what_was_there_comes_back(monkeypatch):
    def theirs():
        return None

    monkeypatch.setattr(mx, "gather_qmm_swiglu", theirs, raising=False)
    assert moefuse.install_zmlx_primitive() is theirs
    assert moefuse.install_zmlx_primitive() is theirs
    moefuse.uninstall_zmlx_primitive()
    assert mx.gather_qmm_swiglu is theirs


@pytest.mark.parametrize("family", ["qwen", "glm"])
def test_called_as_zmlx_calls_it(family):
    """Argument order, keywords and shapes of ZMLX's wrapper around a SwitchGLU."""
    moefuse.install_zmlx_primitive()
    switch = blocks(tiny(family))[0].switch_mlp
    gate, up = switch.gate_proj, switch.up_proj
    x = mx.random.normal((1, 2, 64)).astype(mx.bfloat16)
    indices = mx.array([[[3, 1], [0, 15]]], mx.uint32)
    wide = mx.expand_dims(x, (-2, -3))
    hidden = mx.gather_qmm_swiglu(
        wide,
        gate.weight, gate.scales, gate.get("biases"),
        up.weight, up.scales, up.get("biases"),
        rhs_indices=indices,
        transpose=True,
        group_size=gate.group_size,
        bits=gate.bits,
    )  # fmt: skip
    assert same_bits(hidden, switch.activation(up(wide, indices), gate(wide, indices)))


def test_zmlx_itself():
    """ZMLX 0.10 as published, where it is installed: it sees the primitive and runs on it."""
    pytest.importorskip("zmlx")
    from zmlx.kernels import fused_moe
    from zmlx.patch.patterns import moe_mlp

    moefuse.install_zmlx_primitive()
    fused_moe._HAS_GATHER_QMM_SWIGLU = None  # it may have looked before
    assert fused_moe.has_gather_qmm_swiglu()
    model = tiny("glm")
    switch = blocks(model)[0].switch_mlp
    assert moe_mlp._can_fuse_switch_mlp(switch)
    x = mx.random.normal((1, 1, 64)).astype(mx.bfloat16)
    indices = mx.array([[[3, 1, 0, 15]]], mx.uint32)
    got = moe_mlp._fused_switch_mlp_call(switch, x, indices, max_tokens=1)
    assert same_bits(got, switch(x, indices))
    fused_moe._HAS_GATHER_QMM_SWIGLU = None
    assert model(prompt(1)).shape[-1] == 64
