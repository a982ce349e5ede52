"""patch() in `exact` gives stock's bits, and unpatch() gives back the very objects."""

from __future__ import annotations

import copy
import functools

import mlx.core as mx
import moefuse
import pytest
from mlx.utils import tree_flatten
from patch_support import (
    DTYPES,
    FAMILIES,
    NEXT_FAMILIES,
    bits,
    blocks,
    decode,
    prompt,
    same_bits,
    same_decode,
    tiny,
    tiny_with_experts,
)

VARIANTS = [
    ("router",),
    ("experts",),
    ("swiglu",),
    ("combine",),
    ("concat_gate_up",),
    ("router", "experts"),
    ("router", "combine", "concat_gate_up"),
]
LENGTHS = (1, 3, 9, 40)  # under and over the 64 indices from which mlx-lm sorts


@functools.cache
def stock(family: str, dtype: str):
    """(model, its 64 greedy steps, its logits for each prompt length), unpatched."""
    model = tiny(family, DTYPES[dtype])
    return model, decode(model), {n: bits(model(prompt(n))) for n in LENGTHS}


def objects(model) -> list:
    """Classes of all modules and identities of all parameters."""
    found = [(name, type(module), id(module)) for name, module in model.named_modules()]
    return found + [(name, id(array)) for name, array in tree_flatten(model.parameters())]


@pytest.mark.parametrize("variants", VARIANTS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_stock_bit_for_bit(family, dtype, variants, patched):
    model, steps, logits = stock(family, dtype)
    report = patched(model, variants)
    assert same_decode(decode(model), steps)
    for length, want in logits.items():
        assert (bits(model(prompt(length))) == want).all(), length
    decoded = len(steps) * report.modules_patched
    assert report.modules_patched == 2
    assert set(report.patterns) == set(report.calls)
    assert all(count >= decoded for count in report.calls.values()), report.calls


@pytest.mark.parametrize(("mode", "group_size"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("family", (*FAMILIES, *NEXT_FAMILIES))
def test_fp4_experts_are_stock_bit_for_bit(family, mode, group_size, patched):
    model = tiny_with_experts(family, group_size=group_size, bits=4, mode=mode)
    steps = decode(model, count=12)
    for variant, stem in (("experts", "moe_experts"), ("swiglu", "gather_qmm_swiglu")):
        report = patched(model, [variant])
        assert same_decode(decode(model, count=12), steps), variant
        assert report.fallbacks == {} and report.calls[stem] >= 12 * 2
    patched(model, ["experts"], accumulate="fp32_no_fma")
    assert not same_decode(decode(model, count=12), steps)  # nearer the truth, not stock's bits


@pytest.mark.parametrize("family", FAMILIES)
def test_several_rows_at_once(family, patched):
    model = stock(family, "bfloat16")[0]
    ids = [prompt(1, rows) for rows in (2, 7)]
    want = [model(x) for x in ids]
    mx.eval(want)
    patched(model, ["router", "experts"])
    assert all(same_bits(model(x), y) for x, y in zip(ids, want, strict=True))


@pytest.mark.parametrize(
    "changes", [{"n_group": 4, "topk_group": 2}, {"norm_topk_prob": False}, {"n_shared_experts": 2}]
)
def test_glm_router_settings(changes, patched):
    model = tiny("glm", **changes)
    want = decode(model, count=12)
    report = patched(model, ["router", "experts"])
    assert same_decode(decode(model, count=12), want)
    assert report.calls["moe_router"] and not report.fallbacks


def test_qwen_without_normalised_weights(patched):
    model = tiny("qwen", norm_topk_prob=False)
    want = decode(model, count=12)
    patched(model, ["router", "experts"])
    assert same_decode(decode(model, count=12), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accumulate", ["fp32_no_fma", "fp32"])
def test_other_arithmetic_stays_near_stock(family, accumulate, patched):
    model = tiny(family, mx.float32)
    want = model(prompt(3))
    mx.eval(want)
    report = patched(model, ["experts"], accumulate=accumulate)
    got = model(prompt(3))
    # Both sum 64 products or fewer in float32: far under 1e-3 of logits of size one.
    assert mx.abs(got - want).max().item() < 1e-3 * mx.abs(want).max().item()
    assert report.accumulate == accumulate
    assert report.calls == {"moe_experts": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_wrong_expert_weight_is_seen(family, patched):
    """The comparison of this file must be able to fail."""
    model = tiny(family)
    want = model(prompt(3))
    mx.eval(want)
    patched(model, ["router", "experts"])
    down = blocks(model)[0].switch_mlp.down_proj
    down.weight = down.weight ^ mx.array(0xF, mx.uint32)
    assert not same_bits(model(prompt(3)), want)


@pytest.mark.parametrize("variants", VARIANTS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_the_very_objects(family, variants):
    model = stock(family, "bfloat16")[0]
    before, names = objects(model), repr(model)
    weights = {name: bits(a) for name, a in tree_flatten(model.parameters()) if a.itemsize > 1}
    report = moefuse.patch(model, variants)
    mx.eval(model(prompt(3)), model(prompt(40)))
    inside = tree_flatten(model.parameters())
    assert repr(model) == names
    assert [(name, id(array)) for name, array in inside] == before[-len(inside) :]
    assert all((bits(array) == weights[name]).all() for name, array in inside)
    calls = report.calls
    moefuse.unpatch(model)
    assert objects(model) == before
    assert not any("_moefuse" in m.__dict__ for _, m in model.named_modules())
    assert all((bits(a) == weights[name]).all() for name, a in tree_flatten(model.parameters()))
    mx.eval(model(prompt(3)))
    assert not report.active and report.calls == calls
    moefuse.unpatch(model)
    assert objects(model) == before


def test_concat_costs_no_memory_and_survives_new_weights(patched):
    model = tiny("qwen")
    want = model(prompt(3))
    mx.eval(want)
    before = mx.get_active_memory()
    patched(model, ["concat_gate_up"])
    assert same_bits(model(prompt(3)), want)
    mx.synchronize()
    gate = blocks(model)[0].switch_mlp.gate_proj
    slack = gate.weight.nbytes  # less than a second copy of any block's gate and up
    assert mx.get_active_memory() - before < slack
    gate.weight = gate.weight ^ mx.array(0xF, mx.uint32)  # other weights, as an update brings
    changed = model(prompt(3))
    assert not same_bits(changed, want)
    moefuse.unpatch(model)
    assert same_bits(model(prompt(3)), changed)


def test_saved_weights_are_those_of_stock(tmp_path, patched):
    model = tiny("glm")
    model.save_weights(str(tmp_path / "a.safetensors"))
    patched(model, ["router", "concat_gate_up"])
    mx.eval(model(prompt(3)))
    model.save_weights(str(tmp_path / "b.safetensors"))
    a, b = (mx.load(str(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_second_patch_replaces_the_first(patched):
    model = tiny("qwen")
    classes = [type(block) for block in blocks(model)]
    first = patched(model, ["router"])
    second = patched(model, ["combine"])
    mx.eval(model(prompt(3)))
    assert not first.active and first.calls == {}
    assert second.active and second.calls == {"moe_combine": 2}
    moefuse.unpatch(model)
    assert [type(block) for block in blocks(model)] == classes


def test_a_copy_of_a_patched_model_uses_its_own_weights(patched):
    model = tiny("qwen")
    patched(model, ["router", "experts"])
    want = model(prompt(3))
    mx.eval(want)
    other = copy.deepcopy(model)
    down = blocks(other)[0].switch_mlp.down_proj
    down.scales = down.scales * 2
    assert not same_bits(other(prompt(3)), want)
    assert same_bits(model(prompt(3)), want)
    moefuse.unpatch(other)
    assert type(blocks(other)[0]) is not type(blocks(model)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_under_mx_compile(family, patched):
    model = tiny(family)
    block = blocks(model)[0]
    x = mx.random.normal((1, 3, 64)).astype(mx.bfloat16)
    want = block(x)
    mx.eval(want)
    report = patched(model, ["router", "experts"])
    compiled = mx.compile(lambda x: block(x) * 1)
    assert all(same_bits(compiled(x), want) for _ in range(2))
    assert report.calls == {"moe_router": 2, "moe_experts": 2}


def test_report_as_plain_types(patched):
    model = tiny("qwen")
    report = patched(model)
    mx.eval(model(prompt(3)))
    assert report.to_dict() == {
        "variants": ["router", "experts"],
        "accumulate": "exact",
        "router_mode": "exact",
        "patterns": ["moe_router", "moe_experts"],
        "modules_patched": 2,
        "active": True,
        "calls": {"moe_router": 2, "moe_experts": 2},
        "fallbacks": {},
    }


def test_nothing_asked_changes_nothing(patched):
    model = tiny("qwen")
    before = objects(model)
    report = patched(model, [])
    assert objects(model) == before
    assert (report.variants, report.accumulate, report.modules_patched) == ((), None, 0)


def test_bad_arguments_change_nothing():
    model = tiny("qwen")
    before = objects(model)
    for arguments, message in [
        ({"variants": ["routers"]}, r"\[patch\] variants: expected names from .*got 'routers'"),
        ({"variants": "router"}, r"\[patch\] variants: expected a sequence"),
        ({"variants": ["experts", "concat_gate_up"]}, "concat_gate_up without experts"),
        ({"accumulate": "fp16"}, r"\[patch\] accumulate: expected one of .*got 'fp16'"),
    ]:
        with pytest.raises(ValueError, match=message):
            moefuse.patch(model, **arguments)
    assert objects(model) == before


def test_unknown_family_is_named():
    model = tiny("qwen")
    model.model_type = "llama"
    with pytest.raises(ValueError, match=r"model_type: expected one of .*qwen3_moe.*got 'llama'"):
        moefuse.patch(model)


def test_capabilities_are_plain_types():
    import json

    found = moefuse.capabilities()
    assert json.loads(json.dumps(found)) == found
    assert found["isa"] and found["threads"] >= 1
    assert found["devices"]["cpu"]["fused"]
    gpu = found["devices"]["gpu"]
    assert gpu["fused"] or gpu["reason"]


def test_huge_pages_change_no_value():
    """A buffer of several huge pages, one smaller than a page, one that was never evaluated."""
    large, small = mx.arange(1 << 21), mx.arange(5)
    mx.eval(large, small)
    for array in (large, small, mx.ones((3,)) + 1):
        moefuse._core.use_huge_pages(array)
    assert (large == mx.arange(1 << 21)).all().item()
    assert small.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("part", ["router", "combine", "experts", "swiglu", "prefill"])
def test_experts_go_to_huge_pages_where_a_kernel_reads_them(part, patched, monkeypatch):
    asked = []
    core = moefuse.patch.__globals__["_core"]
    monkeypatch.setattr(core, "use_huge_pages", lambda array: asked.append(id(array)))
    model = tiny(next(iter(FAMILIES)), mx.bfloat16)
    patched(model, (part,))
    stacks = {id(a) for b in blocks(model) for _, a in tree_flatten(b.switch_mlp.parameters())}
    assert set(asked) == (set() if part in ("router", "combine") else stacks)
