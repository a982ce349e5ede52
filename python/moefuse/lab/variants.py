"""Variant specs: `name[+name...][:accumulate]`, and a patch that always comes off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ..flags import ACCUMULATE
from ..flags import VARIANTS as PARTS
from . import LabError

# Each kernel alone first, then combinations: the order in which a campaign measures them.
FULL = (
    "router",
    "combine",
    "experts",
    "swiglu",
    "concat_gate_up",
    "router+combine+concat_gate_up",
    "router+experts",
    "step",
    "experts:fp32_no_fma",
    "step:fp32_no_fma",
)
QUICK = ("router", "combine", "experts", "router+experts", "step")


@dataclass(frozen=True)
class Variant:
    """A set of fusions and the arithmetic they use; no parts is stock."""

    parts: tuple[str, ...] = ()
    accumulate: str | None = None

    @property
    def name(self) -> str:
        base = "+".join(self.parts) or "stock"
        return f"{base}:{self.accumulate}" if self.accumulate else base

    @property
    def slug(self) -> str:
        return self.name.replace("+", "-").replace(":", "-")


STOCK = Variant()


def parse(spec: str) -> Variant:
    """Read one spec. Raises LabError on an unknown part or arithmetic."""
    base, _, accumulate = spec.strip().partition(":")
    if base == "stock" and not accumulate:
        return STOCK
    parts = tuple(base.split("+"))
    for part in parts:
        if part not in PARTS:
            raise LabError(f"[variants] {spec!r}: expected parts from {PARTS}, got {part!r}")
    if len(set(parts)) != len(parts):
        raise LabError(f"[variants] {spec!r}: expected each part once, got {base!r}")
    if ":" in spec and accumulate not in ACCUMULATE:
        raise LabError(f"[variants] {spec!r}: expected one of {ACCUMULATE}, got {accumulate!r}")
    ordered = tuple(part for part in PARTS if part in parts)
    return Variant(ordered, accumulate or None)


def parse_list(text: str) -> list[Variant]:
    """Comma-separated specs, repeats dropped."""
    found = list(dict.fromkeys(parse(spec) for spec in text.split(",") if spec.strip()))
    if not found:
        raise LabError(f"[variants] {text!r}: expected at least one variant, got none")
    return found


@contextmanager
def applied(model, variant: Variant, engine) -> Iterator:
    """Patch `model` for the block; yields the report (None for stock) and always unpatches."""
    if not variant.parts:
        yield None
        return
    report = engine.patch(model, list(variant.parts), accumulate=variant.accumulate)
    try:
        yield report
    finally:
        engine.unpatch(model)


def ops_of(variant: Variant) -> dict[str, tuple[str, ...]]:
    """Each part of the variant -> names of the counters that prove it ran."""
    proof = {
        "router": ("moe_router",),
        "experts": ("moe_experts",),
        "swiglu": ("gather_qmm_swiglu",),
        "combine": ("moe_combine",),
        "concat_gate_up": ("concat_gate_up",),
        "step": ("step",),
        "prefill": ("moe_prefill",),
    }
    if "experts" in variant.parts:  # the experts op ends in the combine: it leaves none to do
        proof["combine"] = ("moe_combine", "moe_experts")
    return {part: proof[part] for part in variant.parts}


def did_not_run(
    variant: Variant, calls: Mapping[str, int], decoded: int, moe_layers: int, prompts: bool = True
) -> str | None:
    """Why the variant's numbers are void, or None when every part really ran.

    `calls` counts fused ops over `decoded` single-token steps; a part ran if it was called once
    per step and MoE layer (the whole-step part: once per step; the prompt's: once per MoE layer but
    the last, which fills no cache, where the steps came behind `prompts` of their own).
    """
    for part, names in ops_of(variant).items():
        if part == "prefill":
            if not prompts:
                continue
            need, where = max(1, moe_layers - 1), "a prompt"
        else:
            need = decoded * (1 if part == "step" else moe_layers)
            where = f"{decoded} decoded tokens"
        got = max((calls.get(name, 0) for name in names), default=0)
        if got < need or need == 0:
            return f"{part}: expected at least {need} calls in {where}, got {got}"
    return None
