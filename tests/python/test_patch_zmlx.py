"""mx.gather_qmm_swiglu, as ZMLX looks for it and calls it."""

from __future__ import annotations

import itertools

import mlx.core as mx
import moefuse
import pytest
from moefuse import flags
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


ON_OFF = ("0", "1", "true", "no", "off", "2", None)
ZMLX_VALUES = {
    "ZMLX_QWEN_COMBINE_MODE": ("off", "fp32", "fp32_no_fma", "exact", " FP32 ", "", None),
    "ZMLX_QWEN_FUSED_SWIGLU": ON_OFF,
    "ZMLX_QWEN_FUSED_DOWNPROJ_COMBINE": ON_OFF,
    "ZMLX_QWEN_FUSED_ROUTER_TOPK": ON_OFF,
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS": ON_OFF,
    "ZMLX_GLM_COMBINE_MODE": (
        "off", "fp32", "fp32_no_fma", "exact", "default", "fp32_no_fma_row_tile", "", None,
    ),
    "ZMLX_GLM_FUSED_SWIGLU": ("0", "1", "2", None),  # "false" is on in ZMLX: told in the docs
}  # fmt: skip


def zmlx_says(moe_mlp, family: str) -> tuple[set[str], str | None]:
    """(parts that ZMLX's own functions turn on, the arithmetic of its combine)."""
    if family == "GLM":
        mode, parts = moe_mlp._glm_combine_mode(), {"swiglu": moe_mlp._glm_allow_fused_swiglu()}
    else:
        newer = family == "QWEN_NEXT"
        experts = moe_mlp._qwen_allow_fused_downproj_combine()
        mode = "off" if experts else moe_mlp._qwen_combine_mode()
        parts = {
            "experts": experts,
            "swiglu": not experts and moe_mlp._qwen_allow_fused_swiglu(default_on=newer),
            "router": moe_mlp._qwen_allow_fused_router_topk()
            or moe_mlp._qwen_allow_logit_argpartition_router(default_on=newer),
        }
    on = {name for name, wanted in parts.items() if wanted}
    mode = mode.replace("_row_tile", "")
    return (on, None) if mode == "off" else ({*on, "combine"}, mode)


@pytest.mark.parametrize("family", ["GLM", "QWEN", "QWEN_NEXT"])
def test_flags_mean_what_they_mean_to_zmlx(family, monkeypatch):
    """Every value of every flag beside every value of another, read by ZMLX 0.10 and by us."""
    from zmlx.patch.patterns import moe_mlp

    names = [name for name in flags.ZMLX_FLAGS[family] if name in ZMLX_VALUES]
    read = set()
    for one, other in itertools.combinations(names, 2):
        for pair in itertools.product(ZMLX_VALUES[one], ZMLX_VALUES[other]):
            env = {n: v for n, v in zip((one, other), pair, strict=True) if v is not None}
            if not env:  # with no flag at all the default is ours
                continue
            with monkeypatch.context() as patched:
                for name in names:
                    patched.delenv(name, raising=False)
                for name, value in env.items():
                    patched.setenv(name, value)
                parts, mode = zmlx_says(moe_mlp, family)
                found = flags.resolve(family)
            assert set(found.variants) == parts, env
            if mode:
                assert found.accumulate == mode, env
            read.add(found)
    assert len(read) > 6
