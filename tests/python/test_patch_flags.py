"""Environment flags: ours, ZMLX's, and which one wins."""

from __future__ import annotations

import pytest
from moefuse import flags
from moefuse.flags import Request, resolve

DEFAULT = Request(("router", "experts"), "exact")
LOGITS = Request(("router",), "exact", "logits")
GLM = "ZMLX_GLM_"
QWEN = "ZMLX_QWEN_"


@pytest.mark.parametrize(
    ("prefix", "env", "want"),
    [
        ("QWEN", {}, DEFAULT),
        ("GLM", {}, DEFAULT),
        # the other family's flags say nothing
        ("QWEN", {GLM + "COMBINE_MODE": "fp32"}, DEFAULT),
        ("GLM", {QWEN + "COMBINE_MODE": "fp32"}, DEFAULT),
        # ZMLX on Qwen: everything off until a flag turns it on
        ("QWEN", {QWEN + "COMBINE_MODE": "off"}, Request((), "exact")),
        ("QWEN", {QWEN + "COMBINE_MODE": " FP32 "}, Request(("combine",), "fp32")),
        ("QWEN", {QWEN + "COMBINE_MODE": "exact"}, Request(("combine",), "exact")),
        ("QWEN", {QWEN + "COMBINE_MODE": "fp32_no_fma"}, Request(("combine",), "fp32_no_fma")),
        ("QWEN", {QWEN + "FUSED_SWIGLU": "1"}, Request(("swiglu",), "exact")),
        ("QWEN", {QWEN + "FUSED_SWIGLU": "0"}, Request((), "exact")),
        ("QWEN", {QWEN + "FUSED_DOWNPROJ_COMBINE": "yes"}, Request(("experts",), "exact")),
        (
            "QWEN",
            {QWEN + "FUSED_DOWNPROJ_COMBINE": "1", QWEN + "COMBINE_MODE": "fp32"},
            Request(("experts",), "exact"),
        ),
        ("QWEN", {QWEN + "FUSED_ROUTER_TOPK": "on"}, LOGITS),
        ("QWEN", {QWEN + "ROUTER_ARGPARTITION_LOGITS": "true"}, LOGITS),
        (
            "QWEN",
            {
                QWEN + "ROUTER_ARGPARTITION_LOGITS": "1",
                QWEN + "ROUTER_ARGPARTITION_LOGITS_TOPK": "1",
                QWEN + "COMBINE_MODE": "fp32_no_fma",
            },
            Request(("router", "combine"), "fp32_no_fma", "logits"),
        ),
        # ZMLX on GLM: SwiGLU and the fp32_no_fma combine are on unless told otherwise
        ("GLM", {GLM + "FUSED_SWIGLU": "1"}, Request(("swiglu", "combine"), "fp32_no_fma")),
        ("GLM", {GLM + "FUSED_SWIGLU": "0"}, Request(("combine",), "fp32_no_fma")),
        ("GLM", {GLM + "COMBINE_MODE": "off"}, Request(("swiglu",), "exact")),
        ("GLM", {GLM + "COMBINE_MODE": ""}, Request(("swiglu", "combine"), "fp32_no_fma")),
        ("GLM", {GLM + "COMBINE_MODE": "fp32"}, Request(("swiglu", "combine"), "fp32")),
        (
            "GLM",
            {GLM + "COMBINE_MODE": "exact"},
            Request(("swiglu", "combine"), "exact", cast_weights=True),
        ),
        ("GLM", {GLM + "FUSED_DOWNPROJ_COMBINE": "1"}, Request(("experts",), "fp32_no_fma")),
        (
            "GLM",
            {GLM + "FUSED_DOWNPROJ_COMBINE": "1", GLM + "FUSED_SWIGLU": "off"},
            Request(("combine",), "fp32_no_fma"),
        ),
        # ours win over ZMLX's
        ("GLM", {"MOEFUSE_DISABLE": "1", GLM + "FUSED_SWIGLU": "1"}, Request((), None)),
        ("GLM", {"MOEFUSE_VARIANTS": "router+combine"}, Request(("router", "combine"), "exact")),
        ("GLM", {"MOEFUSE_VARIANTS": "combine, router"}, Request(("router", "combine"), "exact")),
        ("GLM", {"MOEFUSE_VARIANTS": "stock"}, Request((), "exact")),
        (
            "GLM",
            {"MOEFUSE_VARIANTS": "experts", GLM + "COMBINE_MODE": "exact"},
            Request(("experts",), "exact"),
        ),
        ("QWEN", {"MOEFUSE_ACCUMULATE": "fp32"}, Request(("router", "experts"), "fp32")),
        (
            "GLM",
            {"MOEFUSE_ACCUMULATE": "exact", GLM + "COMBINE_MODE": "fp32"},
            Request(("swiglu", "combine"), "exact"),
        ),
    ],
)
def test_environment(prefix, env, want):
    assert resolve(prefix, env=env) == want


def test_arguments_win_over_everything():
    env = {
        "MOEFUSE_DISABLE": "1",
        "MOEFUSE_VARIANTS": "combine",
        "MOEFUSE_ACCUMULATE": "fp32",
        GLM + "COMBINE_MODE": "exact",
    }
    assert resolve("GLM", ["router"], env=env) == Request(("router",), "exact")
    assert resolve("GLM", ["experts"], "fp32_no_fma", env) == Request(("experts",), "fp32_no_fma")
    del env["MOEFUSE_DISABLE"], env["MOEFUSE_VARIANTS"]
    want = Request(("swiglu", "combine"), "fp32_no_fma")
    assert resolve("GLM", None, "fp32_no_fma", env) == want


def test_the_router_flag_decides_wherever_the_router_is_patched():
    env = {QWEN + "ROUTER_ARGPARTITION_LOGITS": "1"}
    assert resolve("QWEN", ["router"], env=env).router_mode == "logits"
    assert resolve("QWEN", ["router"], env={}).router_mode == "exact"


@pytest.mark.parametrize(
    ("prefix", "env", "message"),
    [
        ("QWEN", {QWEN + "COMBINE_MODE": "weird"}, r"ZMLX_QWEN_COMBINE_MODE: .*'weird'"),
        ("GLM", {GLM + "COMBINE_MODE": "weird"}, r"ZMLX_GLM_COMBINE_MODE: expected.*'weird'"),
        ("QWEN", {QWEN + "FUSED_SWIGLU": "maybe"}, r"ZMLX_QWEN_FUSED_SWIGLU: expected.*'maybe'"),
        ("GLM", {GLM + "FUSED_DOWNPROJ_COMBINE": "-"}, r"ZMLX_GLM_FUSED_DOWNPROJ_COMBINE: "),
        ("QWEN", {QWEN + "ROUTER_ARGPARTITION_LOGITS_TOPK": "1"}, r"LOGITS=1 beside it, got None"),
        ("QWEN", {"MOEFUSE_VARIANTS": "route"}, r"\[MOEFUSE_VARIANTS\] variants: .*got 'route'"),
        ("QWEN", {"MOEFUSE_VARIANTS": "swiglu,concat_gate_up"}, "concat_gate_up without swiglu"),
        ("QWEN", {"MOEFUSE_ACCUMULATE": "fp8"}, r"\[MOEFUSE_ACCUMULATE\] accumulate: .*got 'fp8'"),
        ("QWEN", {"MOEFUSE_DISABLE": "perhaps"}, r"MOEFUSE_DISABLE: expected.*'perhaps'"),
    ],
)
def test_a_value_that_cannot_be_read_is_named(prefix, env, message):
    with pytest.raises(ValueError, match=message):
        resolve(prefix, env=env)


def test_flags_in_force():
    env = {"MOEFUSE_DISABLE": "1", GLM + "FUSED_SWIGLU": "0", "ZMLX_OTHER": "1"}
    assert flags.in_force(env) == {"MOEFUSE_DISABLE": "1", GLM + "FUSED_SWIGLU": "0"}
