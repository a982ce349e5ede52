"""patch() and unpatch(): fused ops in the MoE blocks of one loaded mlx-lm model.

A patched block keeps its parameters, its children and its name; only its class becomes a subclass
made for it, and unpatch() sets the former class again. What a kernel does not take goes through
mlx-lm's own modules, call by call, and is counted.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Iterable
from operator import is_

import mlx.core as mx
from mlx.nn.layers.distributed import sum_gradients

from . import _core, flags
from . import prefill as prefill_layers
from .families import FAMILIES, MAX_TOP_K, Family, family_of

log = logging.getLogger("moefuse")

SORTED_INDICES = 64  # from here on SwitchGLU sorts the tokens by expert: a prompt, not decoding
TRAINING = "training mode"
SORTED = f"{SORTED_INDICES} indices or more (mlx-lm sorts them)"
_EXPECTED = (TRAINING, SORTED)  # part of normal use: told on the info level
_FLOATS = (mx.float32, mx.bfloat16, mx.float16)
# Each quantisation mode that the kernels take -> its bits and group sizes.
_FORMATS = {
    "affine": ((4, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
}

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Each variant -> the stem under which its runs are counted.
STEMS = {
    "router": "moe_router",
    "experts": "moe_experts",
    "swiglu": "gather_qmm_swiglu",
    "combine": "moe_combine",
    "concat_gate_up": "concat_gate_up",
    "step": "step",
    "prefill": "moe_prefill",
}
_OPS = {
    "moe_router_argpartition_logits_topk": "moe_router",
    "moe_gather_qmm_swiglu_downproj_combine": "moe_experts",
    "moe_prefill": "moe_prefill",
    "prefill_linear": "prefill_linear",
    "moe_combine_weighted_sum_fp32_no_fma": "moe_combine",
    "gather_qmm_swiglu": "gather_qmm_swiglu",
}


class PatchReport:
    """What a patch does, live until unpatch() and frozen from then on.

    variants: names in force; accumulate: "exact", "fp32_no_fma", "fp32", or None with no variant;
    router_mode: "exact" or "logits"; patterns: stems that at least one module uses;
    modules_patched: MoE blocks (or whole steps) changed.
    """

    def __init__(self, request: flags.Request):
        self.variants = request.variants
        self.accumulate = request.accumulate if request.variants else None
        self.router_mode = request.router_mode
        self.patterns: list[str] = []
        self.modules_patched = 0
        self._step = None
        self._counted: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._told: set[str] = set()
        self._before = dict(_core.op_counters())
        self._frozen: tuple[dict, dict] | None = None

    @property
    def active(self) -> bool:
        """False once the model was unpatched."""
        return self._frozen is None

    @property
    def calls(self) -> dict[str, int]:
        """Stem -> how often that fused op was evaluated since the patch.

        The ops count for the whole process, so two models patched at once see each other's.
        `concat_gate_up` is no op of its own: it counts when the graph is built.
        """
        return dict(self._frozen[0] if self._frozen else self._live()[0])

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason -> count: once per block at patch time, then once per call that took stock."""
        return dict(self._frozen[1] if self._frozen else self._live()[1])

    def to_dict(self) -> dict:
        """Everything above as plain JSON types."""
        return {
            "variants": list(self.variants),
            "accumulate": self.accumulate,
            "router_mode": self.router_mode,
            "patterns": list(self.patterns),
            "modules_patched": self.modules_patched,
            "active": self.active,
            "calls": self.calls,
            "fallbacks": self.fallbacks,
        }

    def __repr__(self) -> str:
        return f"PatchReport({self.to_dict()})"

    def _live(self) -> tuple[Counter, Counter]:
        calls, fallbacks = Counter(self._counted), Counter(self._fallbacks)
        for key, total in _core.op_counters().items():
            op, _, how = key.partition("/")
            if (new := total - self._before.get(key, 0)) and op in _OPS:
                stem = _OPS[op]
                if how.startswith("stock: "):
                    fallbacks[f"{stem}: {how.removeprefix('stock: ')}"] += new
                else:
                    calls[stem] += new
        if self._step is not None:
            calls.update(self._step.calls)
            fallbacks.update(self._step.fallbacks)
        return calls, fallbacks

    def _fell(self, part: str, reason: str) -> None:
        text = f"{part}: {reason}"
        self._fallbacks[text] += 1
        if text not in self._told:
            self._told.add(text)
            level = logging.INFO if reason in _EXPECTED else logging.WARNING
            log.log(level, "stock path instead of the fused one: %s", text)

    def _freeze(self) -> None:
        if self._frozen is None:
            self._frozen = self._live()
            self._step = None


def _dtype_name(dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]


def _projection_reason(name: str, proj, dtype) -> str | None:
    """Why the kernels cannot take this projection beside activations of `dtype`."""
    known = importlib.import_module("mlx_lm.models.switch_layers").QuantizedSwitchLinear
    if type(proj) is not known:
        return f"{name} is a {type(proj).__name__}"
    if proj.mode not in _FORMATS:
        return f"{name} is quantised as {proj.mode}"
    bits, group_sizes = _FORMATS[proj.mode]
    if proj.bits not in bits or proj.group_size not in group_sizes:
        return f"{name} has {proj.bits} bits in groups of {proj.group_size}"
    if "bias" in proj:
        return f"{name} has a bias"
    if proj.get("global_scale") is not None:
        return f"{name} has a global_scale"
    if proj.mode == "affine" and dtype is not None and proj["scales"].dtype != dtype:
        return f"{name} has {_dtype_name(proj['scales'].dtype)} scales, x is {_dtype_name(dtype)}"
    return None


def _experts_reason(block, names: tuple[str, ...], dtype, top_k: int) -> str | None:
    layers = importlib.import_module("mlx_lm.models.switch_layers")
    switch = block.get("switch_mlp")
    if type(switch) is not layers.SwitchGLU:
        return f"switch_mlp is a {type(switch).__name__}"
    if type(switch.activation) is not layers.SwiGLU:
        return f"the activation is {getattr(switch.activation, '__name__', 0) or 'not SwiGLU'}"
    if top_k > MAX_TOP_K:
        return f"top_k {top_k} is more than {MAX_TOP_K}"
    projections = [switch.get(name) for name in names]
    for name, proj in zip(names, projections, strict=True):
        if reason := _projection_reason(name, proj, dtype):
            return reason
    if len({(p.mode, p.bits, p.group_size) for p in projections}) > 1:
        return f"{', '.join(names)} differ in mode, bits or group_size"
    return None


def _prefill_reason(block, dtype, top_k: int) -> str | None:
    if getattr(block, "sharding_group", None) is not None:
        return "a sharded model"
    if mx.metal.is_available() and mx.default_device() == mx.gpu:
        return "Metal has kernels of its own for sorted rows"
    return _experts_reason(block, _PROJECTIONS, dtype, top_k)


def _concat_reason(block) -> str | None:
    layers = importlib.import_module("mlx_lm.models.switch_layers")
    switch = block.get("switch_mlp")
    if type(switch) is not layers.SwitchGLU:
        return f"switch_mlp is a {type(switch).__name__}"
    for name in ("gate_proj", "up_proj"):
        proj = switch.get(name)
        if type(proj) is not layers.QuantizedSwitchLinear:
            return f"{name} is a {type(proj).__name__}"
        if "bias" in proj or proj.get("global_scale") is not None:
            return f"{name} has a bias or a global_scale"
    gate, up = switch["gate_proj"], switch["up_proj"]
    if (gate.bits, gate.group_size, gate.mode) != (up.bits, up.group_size, up.mode):
        return "gate_proj and up_proj are quantised differently"
    return None


class _Joined:
    """gate and up in one buffer, of which the two modules' own arrays become views.

    The arrays stay the very objects they were; only their storage changes, so that the
    concatenation costs no memory. split() gives each its own storage back.
    """

    def __init__(self, gate, up):
        self.pairs = []
        for name in ("weight", "scales", "biases"):
            a, b = gate.get(name), up.get(name)
            if a is None:
                self.pairs.append((None, None, None))
                continue
            both = mx.concatenate([a, b], axis=1)
            mx.eval(both)
            rows = a.shape[1]
            a[...] = both[:, :rows]
            b[...] = both[:, rows:]
            mx.eval(a, b)
            self.pairs.append((both, a, b))
        self.arrays = [both for both, _, _ in self.pairs]

    def belongs_to(self, gate, up) -> bool:
        return all(
            gate.get(name) is a and up.get(name) is b
            for name, (_, a, b) in zip(("weight", "scales", "biases"), self.pairs, strict=True)
        )

    def split(self) -> None:
        for _, *views in self.pairs:
            for view in views:
                if view is not None:
                    view[...] = mx.contiguous(view)
                    mx.eval(view)


class _Patch:
    """What the blocks of one patched model share."""

    def __init__(self, family: Family, request: flags.Request, report: PatchReport):
        self.family, self.report = family, report
        self.accumulate, self.mode = request.accumulate, request.router_mode
        self.cast_weights = request.cast_weights
        (
            self.router, self.experts, self.swiglu, self.combine, self.concat, self.step,
            self.prefill,
        ) = (name in request.variants for name in flags.VARIANTS)  # fmt: skip

    def reasons(self, block, dtype) -> dict[str, str | None]:
        """Each part asked of a block -> why it cannot be had for x of `dtype`, or None.

        dtype None: not known yet, taken for one that fits.
        """
        top_k = self.family.top_k(block)
        wide = f"top_k {top_k} is more than {MAX_TOP_K}" if top_k > MAX_TOP_K else None
        fits = dtype is None or dtype in _FLOATS
        odd = None if fits else f"x is {_dtype_name(dtype)}"
        found = {}
        if self.router:
            found["router"] = odd or wide or self.family.router_reason(block)
        for part in ("experts", "swiglu"):
            if getattr(self, part):
                names = _PROJECTIONS[: 3 if self.experts else 2]
                found[part] = odd or _experts_reason(block, names, dtype, top_k)
        if self.prefill:
            found["prefill"] = odd or _prefill_reason(block, dtype, top_k)
        if self.combine:
            found["combine"] = odd
        if self.concat:
            found["concat_gate_up"] = _concat_reason(block)
        return found


class _Block:
    """State of one patched block: its former class and the verdict on what it holds now."""

    def __init__(self, patch: _Patch, stock: type):
        self.patch, self.stock = patch, stock
        self.seen: tuple = ()
        self.dtype = None
        self.reasons: dict[str, str | None] = {}
        self.joined: _Joined | None = None

    def look(self, block, dtype) -> dict[str, str | None]:
        """The verdict of _Patch.reasons, taken anew when a module or an array was replaced."""
        switch = block["switch_mlp"]
        gate, up, down = (switch.get(n, {}) for n in _PROJECTIONS)
        now = (
            block["gate"], switch, switch.get("activation"), gate, up, down, gate.get("scales"),
            up.get("scales"), down.get("scales"), getattr(block, "sharding_group", None),
        )  # fmt: skip
        if not self.seen or dtype != self.dtype or not all(map(is_, now, self.seen)):
            self.seen, self.dtype = now, dtype
            self.reasons = self.patch.reasons(block, dtype)
        return self.reasons

    def may(self, part: str, reasons: dict[str, str | None]) -> bool:
        if (reason := reasons[part]) is not None:
            self.patch.report._fell(part, reason)
        return reason is None

    def __deepcopy__(self, memo) -> _Block:
        """A copied model looks at its own modules."""
        return _Block(self.patch, self.stock)

    def restore(self, block) -> None:
        block.__class__ = self.stock
        del block.__dict__["_moefuse"]
        if self.joined:
            self.joined.split()


def _stack(proj) -> tuple[mx.array, mx.array, mx.array | None]:
    return proj["weight"], proj["scales"], proj.get("biases")


def _fused_swiglu(switch, x, indices, accumulate):
    gate, up = switch["gate_proj"], switch["up_proj"]
    hidden = _core.gather_qmm_swiglu(
        mx.expand_dims(x, (-2, -3)),
        *_stack(gate),
        *_stack(up),
        rhs_indices=indices,
        group_size=gate.group_size,
        bits=gate.bits,
        mode=gate.mode,
        accumulate=accumulate,
    )
    return switch["down_proj"](hidden, indices).squeeze(-2)


def _concat_experts(state: _Block, switch, x, indices):
    """SwitchGLU's computation with one gather_qmm for gate and up, sorted where it sorts."""
    layers = importlib.import_module("mlx_lm.models.switch_layers")
    gate, up = switch["gate_proj"], switch["up_proj"]
    if state.joined is None or not state.joined.belongs_to(gate, up):
        state.joined = _Joined(gate, up)
    state.patch.report._counted["concat_gate_up"] += 1
    x, order, inverse = mx.expand_dims(x, (-2, -3)), indices, None
    is_sorted = indices.size >= SORTED_INDICES
    if is_sorted:
        x, order, inverse = layers._gather_sort(x, indices)
    both = mx.gather_qmm(
        x,
        *state.joined.arrays,
        rhs_indices=order,
        transpose=True,
        group_size=gate.group_size,
        bits=gate.bits,
        mode=gate.mode,
        sorted_indices=is_sorted,
    )
    left, right = mx.split(both, 2, axis=-1)
    y = switch["down_proj"](switch.activation(right, left), order, sorted_indices=is_sorted)
    if is_sorted:
        y = layers._scatter_unsort(y, inverse, indices.shape)
    return y.squeeze(-2)


def _fused_experts(op, switch, x, indices, weights, accumulate):
    """One op for all of the routed experts: a decode step's or a prompt's."""
    gate = switch["gate_proj"]
    return op(
        x,
        *(_stack(switch[name]) for name in _PROJECTIONS),
        indices,
        weights,
        accumulate=accumulate,
        group_size=gate.group_size,
        bits=gate.bits,
        mode=gate.mode,
    )


def _routed(state: _Block, block, x, indices, weights, reasons):
    """The weighted sum of the chosen experts: [..., H] -> [..., H]."""
    patch, switch = state.patch, block["switch_mlp"]
    part = "experts" if patch.experts else "swiglu" if patch.swiglu else None
    if patch.prefill and indices.size >= SORTED_INDICES and state.may("prefill", reasons):
        weights = weights.astype(x.dtype) if patch.cast_weights else weights
        return _fused_experts(_core.moe_prefill, switch, x, indices, weights, patch.accumulate)
    if part and indices.size >= SORTED_INDICES:
        patch.report._fell(part, SORTED)
        part = None
    elif part and not state.may(part, reasons):
        part = None
    if part == "experts":
        op = _core.moe_gather_qmm_swiglu_downproj_combine
        return _fused_experts(op, switch, x, indices, weights, patch.accumulate)
    if part == "swiglu":
        y = _fused_swiglu(switch, x, indices, patch.accumulate)
    elif patch.concat and state.may("concat_gate_up", reasons):
        y = _concat_experts(state, switch, x, indices)
    else:
        y = switch(x, indices)
    if patch.combine and state.may("combine", reasons):
        weights = weights.astype(y.dtype) if patch.cast_weights else weights
        return _core.moe_combine_weighted_sum_fp32_no_fma(y, weights, accumulate=patch.accumulate)
    return (y * weights[..., None]).sum(axis=-2).astype(y.dtype)


def _call(block, x: mx.array) -> mx.array:
    """__call__ of a patched block: mlx-lm's order of steps, with some of them fused."""
    state = block._moefuse
    patch = state.patch
    if block._training:  # the fused ops have no gradient
        patch.report._fell("block", TRAINING)
        return state.stock.__call__(block, x)
    reasons = state.look(block, x.dtype)
    group = getattr(block, "sharding_group", None)
    if group is not None:
        x = sum_gradients(group)(x)
    if patch.router and state.may("router", reasons):
        indices, weights = patch.family.route_fused(block, x, patch.mode)
    else:
        indices, weights = patch.family.route_stock(block, x)
    y = _routed(state, block, x, indices, weights, reasons)
    y = patch.family.add_shared(block, x, y)
    if group is not None:
        y = mx.distributed.all_sum(y, group=group)
    return y


def _subclass(stock: type) -> type:
    """A class of the same name whose instances run _call."""
    names = {"__call__": _call, "__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), names)


def _expected_dtype(block):
    """What the activations will be if all is well, or None where the weights do not tell."""
    scales = block["switch_mlp"].get("gate_proj", {}).get("scales")
    return scales.dtype if scales is not None and scales.dtype in _FLOATS else None


def _in_huge_pages(switch) -> None:
    """The experts' matrices in huge pages where the system can: same arrays, read faster."""
    for name in _PROJECTIONS:
        for array in switch[name].values():
            if isinstance(array, mx.array):
                _core.use_huge_pages(array)


def _attach_blocks(model, patch: _Patch) -> None:
    known, report = patch.family.block_class(), patch.report
    used: Counter[str] = Counter()
    fused = None
    for _, module in model.named_modules():
        if not isinstance(module, known):
            continue
        if type(module) is not known:
            report._fell("block", f"changed by others to {type(module).__module__}")
            continue
        reasons = patch.reasons(module, _expected_dtype(module))
        for part, reason in reasons.items():
            if reason:
                report._fell(part, reason)
            else:
                used[STEMS[part]] += 1
        if all(reasons.values()):
            continue
        if mx.default_device() == mx.cpu and any(
            reasons.get(part, "off") is None for part in ("experts", "swiglu", "prefill")
        ):
            _in_huge_pages(module["switch_mlp"])
        fused = fused or _subclass(known)
        module._moefuse = _Block(patch, known)
        module.__class__ = fused
        report.modules_patched += 1
    report.patterns = [stem for stem in STEMS.values() if used[stem]]


def _attach_step(model, report: PatchReport) -> None:
    try:
        report._step = importlib.import_module("moefuse.step").attach(model, report.accumulate)
    except ValueError as refusal:  # a tensor or field that the step cannot take
        report._fell("step", str(refusal))
        return
    report.patterns.append("step")
    report.modules_patched += 1


def patch(
    model, variants: Iterable[str] | None = None, *, accumulate: str | None = None,
    step: bool = False, prefill: bool = False,
) -> PatchReport:  # fmt: skip
    """Fuse parts of a loaded mlx-lm model until unpatch(model).

    Args:
        model: an mlx-lm model of a model_type in families.FAMILIES.
        variants: names from VARIANTS; None takes MOEFUSE_* or ZMLX_* flags, else
            ("router", "experts"). An empty sequence changes nothing.
        accumulate: "exact" (the default: stock's bits), "fp32_no_fma" or "fp32".
        step, prefill: the same as adding "step", "prefill" to the variants.
    Returns:
        A live PatchReport. A second patch() first takes the former one off.
    Raises:
        ValueError: names the argument, flag or model_type, what was expected and what came.
    """
    family = family_of(model)
    request = flags.resolve(family.flags, variants, accumulate)
    for name, on in (("step", step), ("prefill", prefill)):
        request = flags.with_variant(request, name) if on else request
    unpatch(model)
    report = PatchReport(request)
    if set(request.variants) - {"step"}:
        _attach_blocks(model, _Patch(family, request, report))
    if "prefill" in request.variants:
        prefill_layers.attach(model, report, request.accumulate, _FORMATS)
    model._moefuse_report = report
    if "step" in request.variants:
        _attach_step(model, report)
    return report


def unpatch(model) -> None:
    """Take a patch off: every block gets its very class back. A no-op on an unpatched model."""
    report = model.__dict__.pop("_moefuse_report", None)
    if report is not None:
        if report._step is not None:
            step = report._step
            report._freeze()
            step.detach()
        report._freeze()
    for _, module in model.named_modules():
        state = module.__dict__.get("_moefuse")
        if state is not None:
            state.restore(module)


__all__ = ["FAMILIES", "PatchReport", "patch", "unpatch"]
