"""What to patch: arguments first, then `MOEFUSE_*`, then ZMLX's flags, then the family's default.

ZMLX's flags keep their names, defaults and meaning. A value that cannot be read is a ValueError
here, where ZMLX would take its default in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

VARIANTS = ("router", "experts", "swiglu", "combine", "concat_gate_up", "step", "prefill")
ACCUMULATE = ("exact", "fp32_no_fma", "fp32")
DEFAULT_VARIANTS = ("router", "experts")

_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off", "")
_COMBINE = {
    **dict.fromkeys(_OFF, "off"),
    "fp32": "fp32",
    "fp32_no_fma": "fp32_no_fma",
    "exact": "exact",
}
# ZMLX's GLM combine knows more names for the same arithmetic.
_GLM_COMBINE = {
    **_COMBINE,
    **dict.fromkeys(
        ("", "default", "auto", "fp32_no_fma_row_tile", "fp32_no_fma_weighted_sum"), "fp32_no_fma"
    ),
}
_GLM_FLAGS = (
    "ZMLX_GLM_COMBINE_MODE",
    "ZMLX_GLM_FUSED_SWIGLU",
    "ZMLX_GLM_FUSED_DOWNPROJ_COMBINE",
)
_QWEN_FLAGS = (
    "ZMLX_QWEN_COMBINE_MODE",
    "ZMLX_QWEN_FUSED_SWIGLU",
    "ZMLX_QWEN_FUSED_DOWNPROJ_COMBINE",
    "ZMLX_QWEN_FUSED_ROUTER_TOPK",
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS",
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS_TOPK",
)
# Qwen3-Next and Qwen3.5 read Qwen's flags, but ZMLX turns SwiGLU and the logits router on there.
ZMLX_FLAGS = {"GLM": _GLM_FLAGS, "QWEN": _QWEN_FLAGS, "QWEN_NEXT": _QWEN_FLAGS}
OWN_FLAGS = (
    "MOEFUSE_VARIANTS",
    "MOEFUSE_ACCUMULATE",
    "MOEFUSE_PREFILL",
    "MOEFUSE_DISABLE",
    "MOEFUSE_LOG",
)
_LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Request:
    """A checked wish. `cast_weights`: ZMLX's "exact" on GLM, which rounds the router's float32
    weights to the activations' dtype before it multiplies."""

    variants: tuple[str, ...]
    accumulate: str | None
    router_mode: str = "exact"
    cast_weights: bool = False


def in_force(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The flags that are set, by name."""
    env = os.environ if env is None else env
    known = (*OWN_FLAGS, *_GLM_FLAGS, *_QWEN_FLAGS)
    return {name: env[name] for name in known if name in env}


def _fail(where: str, what: str, expected: str, got: object) -> None:
    raise ValueError(f"[{where}] {what}: expected {expected}, got {got!r}")


def _switch(env: Mapping[str, str], name: str, default: bool = False) -> bool:
    raw = env.get(name)
    if raw is None:
        return default
    text = raw.strip().lower()
    if text not in _ON + _OFF and not text.isdigit():
        _fail("flags", name, f"one of {_ON + _OFF}", raw)
    return text in _ON or (text.isdigit() and int(text) != 0)


def _combine(env: Mapping[str, str], name: str, default: str, known: Mapping[str, str]) -> str:
    raw = env.get(name, default)
    if raw.strip().lower() not in known:
        _fail("flags", name, f"one of {tuple(known)}", raw)
    return known[raw.strip().lower()]


def check_variants(variants: Iterable[str], where: str = "patch") -> tuple[str, ...]:
    """The names in VARIANTS' order. Raises ValueError on an unknown one or a contradiction."""
    if isinstance(variants, str):
        _fail(where, "variants", "a sequence of names", variants)
    wanted = list(variants)
    for name in wanted:
        if name not in VARIANTS:
            _fail(where, "variants", f"names from {VARIANTS}", name)
    for rival in ("experts", "swiglu", "prefill"):
        if "concat_gate_up" in wanted and rival in wanted:
            _fail(where, "variants", "concat_gate_up without " + rival, tuple(wanted))
    return tuple(name for name in VARIANTS if name in wanted)


def check_accumulate(accumulate: str | None, where: str = "patch") -> str | None:
    """The name itself, or ValueError."""
    if accumulate is not None and accumulate not in ACCUMULATE:
        _fail(where, "accumulate", f"one of {ACCUMULATE}", accumulate)
    return accumulate


def with_variant(request: Request, name: str, where: str = "patch") -> Request:
    """The request with one more variant. Raises ValueError on a contradiction."""
    if name in request.variants:
        return request
    variants = check_variants((*request.variants, name), where)
    return replace(request, variants=variants, accumulate=request.accumulate or "exact")


def _zmlx_glm(env: Mapping[str, str]) -> Request:
    mode = _combine(env, "ZMLX_GLM_COMBINE_MODE", "fp32_no_fma", _GLM_COMBINE)
    swiglu = _switch(env, "ZMLX_GLM_FUSED_SWIGLU", True)
    if swiglu and _switch(env, "ZMLX_GLM_FUSED_DOWNPROJ_COMBINE"):
        return Request(("experts",), "fp32_no_fma")
    parts = [name for name, on in (("swiglu", swiglu), ("combine", mode != "off")) if on]
    return Request(
        check_variants(parts),
        "exact" if mode == "off" else mode,
        cast_weights=mode == "exact",
    )


def _zmlx_qwen(env: Mapping[str, str], by_default: bool) -> Request:
    mode = _combine(env, "ZMLX_QWEN_COMBINE_MODE", "off", _COMBINE)
    logits = _router_mode(env, by_default) == "logits"
    experts = _switch(env, "ZMLX_QWEN_FUSED_DOWNPROJ_COMBINE")
    swiglu = not experts and _switch(env, "ZMLX_QWEN_FUSED_SWIGLU", by_default)
    combine = not experts and mode != "off"
    named = (("router", logits), ("experts", experts), ("swiglu", swiglu), ("combine", combine))
    return Request(
        check_variants([name for name, on in named if on]),
        mode if combine else "exact",
        "logits" if logits else "exact",
    )


def _router_mode(env: Mapping[str, str], by_default: bool = False) -> str:
    topk = _switch(env, "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS_TOPK")  # only refines the next one
    on = _switch(env, "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS", by_default)
    if topk and not on:
        _fail(
            "flags",
            "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS_TOPK",
            "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS=1 beside it",
            env.get("ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS"),
        )
    return "logits" if on or _switch(env, "ZMLX_QWEN_FUSED_ROUTER_TOPK") else "exact"


def resolve(
    prefix: str,
    variants: Iterable[str] | None = None,
    accumulate: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Request:
    """What to patch in a family whose flags carry `prefix`: "QWEN", "QWEN_NEXT" or "GLM".

    An argument decides what it names; the router's mode has no argument, so its flag decides
    wherever the router is patched. Raises ValueError naming the flag or argument, what was
    expected and what came.
    """
    env = os.environ if env is None else env
    accumulate = check_accumulate(accumulate)
    flagged = any(name in env for name in ZMLX_FLAGS[prefix])
    by_default = flagged and prefix == "QWEN_NEXT"
    mode = "exact" if prefix == "GLM" else _router_mode(env, by_default)
    if variants is not None:
        return Request(check_variants(variants), accumulate or "exact", mode)
    if _switch(env, "MOEFUSE_DISABLE"):
        return Request((), None)
    found = _flagged(prefix, accumulate, env, flagged, by_default, mode)
    on = _switch(env, "MOEFUSE_PREFILL")
    return with_variant(found, "prefill", "MOEFUSE_PREFILL") if on else found


def _flagged(prefix, accumulate, env, flagged: bool, by_default: bool, mode: str) -> Request:
    """What the environment chooses of the variants that have rivals."""
    own = check_accumulate(env.get("MOEFUSE_ACCUMULATE") or None, "MOEFUSE_ACCUMULATE")
    if (text := env.get("MOEFUSE_VARIANTS", "").strip()) != "":
        names = [] if text == "stock" else text.replace("+", ",").split(",")
        found = check_variants([name.strip() for name in names], "MOEFUSE_VARIANTS")
        return Request(found, accumulate or own or "exact", mode)
    if not flagged:
        return Request(DEFAULT_VARIANTS, accumulate or own or "exact")
    asked = _zmlx_glm(env) if prefix == "GLM" else _zmlx_qwen(env, by_default)
    if accumulate or own:
        return Request(asked.variants, accumulate or own, asked.router_mode)
    return asked


def check(env: Mapping[str, str] | None = None) -> str | None:
    """Read every flag, so that a bad one is told before a model is loaded; MOEFUSE_LOG's level.

    Raises ValueError naming the flag, what was expected and what came.
    """
    env = os.environ if env is None else env
    for prefix in ZMLX_FLAGS:
        resolve(prefix, env=env)
    level = env.get("MOEFUSE_LOG", "").strip().lower() or None
    if level is not None and level not in _LOG_LEVELS:
        _fail("flags", "MOEFUSE_LOG", f"one of {_LOG_LEVELS}", env["MOEFUSE_LOG"])
    return level
