"""The experts of a prompt: moe_prefill against fp64 and stock, and the patch that takes it."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import moefuse
import numpy as np
import pytest
from mlx_lm.models.switch_layers import _gather_sort, _scatter_unsort
from mlx_lm_support import MODELS, folder
from moefuse import prefill
from moefuse.lab.checkpoint import inspect
from moefuse.lab.oracle import load_oracle
from moefuse.lab.variants import did_not_run, parse
from patch_support import DTYPES, FAMILIES, bits, decode, prompt, same_bits, same_decode, tiny

pytestmark = pytest.mark.usefixtures("on_cpu")
UNIT = 2.0**-24  # float32


def stack(rng, count, rows, cols, dtype, **options):
    w = mx.array(rng.normal(size=(count, rows, cols)).astype(np.float32) * 0.05)
    return mx.quantize(w.astype(dtype), **options)


def case(rng, indices, dtype, hidden=64, width=128, out=96, experts=7, **options):
    """x, the three stacks, indices and weights, as moe_prefill takes them."""
    shapes = ((width, hidden), (width, hidden), (out, width))
    stacks = [stack(rng, experts, *shape, dtype, **options) for shape in shapes]
    x = mx.array(rng.normal(size=(len(indices), hidden)).astype(np.float32)).astype(dtype)
    weights = mx.array(rng.random(indices.shape).astype(np.float32)).astype(dtype)
    return x, *stacks, mx.array(indices.astype(np.uint32)), weights


def stock(x, gate, up, down, indices, weights, **options):
    """mlx-lm's SwitchGLU, which sorts, and the block's weighted sum."""
    rows, order, inverse = _gather_sort(mx.expand_dims(x, (-2, -3)), indices)

    def product(rows, w):
        return mx.gather_qmm(rows, *w, rhs_indices=order, sorted_indices=True, **options)

    y = product(nn.silu(product(rows, gate)) * product(rows, up), down)
    y = _scatter_unsort(y, inverse, indices.shape).squeeze(-2)
    return (y * weights[..., None]).sum(axis=-2).astype(y.dtype)


def experts_of(count, rows, k, seed=0):
    """[rows, k] of distinct experts a row."""
    return np.argsort(np.random.default_rng(seed).random((rows, count)), -1)[:, :k]


def routings():
    """Counts that are ragged in every way: (experts, [rows, k])."""
    yield 7, experts_of(7, 37, 3)
    yield 7, np.full((33, 1), 6)  # all on the last one: three blocks, the last of one row
    yield 7, np.full((32, 1), 0)  # whole blocks and no others
    yield 9, np.where(experts_of(9, 21, 2) == 4, 5, experts_of(9, 21, 2))  # nobody takes 4
    yield 16, experts_of(16, 5, 16)  # every row on every expert
    yield 3, np.repeat([[0], [1], [2]], [16, 17, 15], axis=0)  # at, over and under a boundary
    yield 64, experts_of(64, 3, 8)  # fewer rows than experts
    yield 7, np.zeros((1, 1), int)


FORMATS = [(bits_, group) for bits_ in (4, 8) for group in (32, 64, 128)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", ["kernels", "blocks"])
def test_both_forms_are_stock_bit_for_bit(form, dtype):
    rng = np.random.default_rng(1)
    for (experts, indices), (bits_, group) in zip(
        routings(), itertools.cycle(FORMATS), strict=False
    ):
        options = {"bits": bits_, "group_size": group}
        args = case(rng, indices, dtype, hidden=128, experts=experts, **options)
        got = moefuse.moe_prefill(*args, form=form, **options)
        assert same_bits(got, stock(*args, **options)), (indices.shape, options)


def exact_matrices(w, bits, group_size):
    """(the matrices in fp64, |scale * code| + |bias|: what their rounding is relative to)."""
    codes = np.array(w[0]).view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    scales, biases = (
        np.repeat(np.array(a.astype(mx.float32), np.float64), group_size, -1) for a in w[1:]
    )
    return codes * scales + biases, np.abs(codes * scales) + np.abs(biases)


def gamma(steps):
    """Relative error of `steps` roundings in float32, one upon another."""
    return steps * UNIT / (1 - steps * UNIT)


def oracle(x, gate, up, down, indices, weights, **options):
    """(fp64 result, bound on the error of every summation order in float32)."""
    chosen = np.array(indices)
    x, weights = (np.array(a.astype(mx.float32), np.float64) for a in (x, weights))

    def product(rows, slack, w):
        """rows @ w and its bound: K terms and their product's rounding; rows off by slack."""
        matrix, size = (a[chosen] for a in exact_matrices(w, **options))

        def dot(rows, matrix):
            return np.einsum("tkj,tkij->tki", rows, matrix)

        most = np.abs(rows) + slack
        off = dot(slack, np.abs(matrix)) + gamma(2) * dot(most, size)  # a weight rounds twice
        return dot(rows, matrix), off + gamma(rows.shape[-1] + 1) * dot(
            most, np.abs(matrix) + gamma(2) * size
        )

    rows = np.broadcast_to(x[:, None], (*chosen.shape, x.shape[-1]))
    g, g_off = product(rows, 0 * rows, gate)
    u, u_off = product(rows, 0 * rows, up)
    silu = g / (1 + np.exp(-g))
    # |silu'| < 1.1, |silu(g)| <= |g|; exp, sigmoid and the products round 12 times at most.
    g_most, u_most = np.abs(g) + g_off, np.abs(u) + u_off
    h_off = 1.1 * g_off * u_most + np.abs(silu) * u_off + gamma(12) * g_most * u_most
    y, y_off = product(silu * u, h_off, down)
    total = ((np.abs(y) + y_off) * weights[..., None]).sum(-2)
    off = (y_off * weights[..., None]).sum(-2) + gamma(chosen.shape[-1] + 1) * total
    return (y * weights[..., None]).sum(-2), off


def outside(got, value, bound):
    """Where a result is not within the bound; NaN never is."""
    return ~(np.abs(np.array(got, np.float64) - value) <= bound)


@pytest.mark.parametrize("form", ["kernels", "blocks"])
def test_float32_is_within_the_bound_and_every_planted_fault_is_not(form):
    rng = np.random.default_rng(2)
    for (experts, indices), (bits_, group) in zip(
        routings(), itertools.cycle(FORMATS), strict=False
    ):
        options = {"bits": bits_, "group_size": group}
        args = case(rng, indices, mx.float32, hidden=128, experts=experts, **options)
        truth = oracle(*args, **options)
        got = np.array(moefuse.moe_prefill(*args, form=form, **options))
        assert not outside(got, *truth).any(), (indices.shape, options)
        most = np.abs(got[-1]).argmax()
        shift = got[-1, most] / 16
        for at, fault in ((-1, np.nan), (most, -got[-1, most]), (-1, got[-1, -1] + shift)):
            broken = got.copy()
            broken[-1, at] = fault
            assert outside(broken, *truth).sum() == 1, fault
    # An expert's number one off, and the row behind a block's boundary taken for the one before it.
    indices = experts_of(7, 40, 3)
    args = case(rng, indices, mx.float32, hidden=128, **options)
    truth = oracle(*args, **options)
    x, *stacks, chosen, weights = args
    wrong = mx.array(np.array(chosen))
    wrong[16, 1] = (wrong[16, 1] + 1) % 7
    found = outside(moefuse.moe_prefill(x, *stacks, wrong, weights, form=form, **options), *truth)
    assert found[16].any() and not found[np.arange(40) != 16].any()
    x[16] = x[15]
    found = outside(moefuse.moe_prefill(x, *stacks, chosen, weights, form=form, **options), *truth)
    assert found[16].any() and not found[np.arange(40) != 16].any()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_fp32_sums_are_the_decode_ops_and_nearer_to_the_truth_than_stock(dtype):
    rng = np.random.default_rng(3)
    options = {"bits": 4, "group_size": 64}
    args = case(rng, experts_of(7, 37, 3), dtype, hidden=128, **options)
    value, _ = oracle(*args, **options)
    got = moefuse.moe_prefill(*args, accumulate="fp32_no_fma", **options)
    assert same_bits(got, moefuse.moe_gather_qmm_swiglu_downproj_combine(*args, **options))
    errors = [
        np.abs(np.array(y.astype(mx.float32), np.float64) - value)
        for y in (got, stock(*args, **options))
    ]
    assert errors[0].max() < errors[1].max() and errors[0].mean() < errors[1].mean() / 2


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_fp4_is_stock_bit_for_bit(mode, group):
    options = {"mode": mode, "bits": 4, "group_size": group}
    args = case(np.random.default_rng(4), experts_of(7, 37, 3), mx.bfloat16, **options)
    for form in ("kernels", "blocks"):
        assert same_bits(moefuse.moe_prefill(*args, form=form, **options), stock(*args, **options))


def test_the_shape_of_a_batch_and_of_nothing():
    options = {"bits": 4, "group_size": 64}
    args = case(np.random.default_rng(5), experts_of(7, 24, 3), mx.bfloat16, **options)
    x, *stacks, indices, weights = args
    for form in ("kernels", "blocks"):
        want = moefuse.moe_prefill(*args, form=form, **options)
        got = moefuse.moe_prefill(
            x.reshape(2, 12, -1), *stacks, indices.reshape(2, 12, -1), weights.reshape(2, 12, -1),
            form=form, **options,
        )  # fmt: skip
        assert same_bits(got.reshape(24, -1), want)
        nothing = moefuse.moe_prefill(
            x[:0], *stacks, indices[:0], weights[:0], form=form, **options
        )
        assert nothing.shape == (0, 96) and nothing.dtype == x.dtype


@pytest.mark.parametrize("form", ["kernels", "blocks"])
def test_bad_input_is_named(form):
    options = {"bits": 4, "group_size": 64}
    args = case(np.random.default_rng(6), experts_of(7, 24, 3), mx.bfloat16, **options)
    x, gate, up, down, indices, weights = args

    def refused(match, *args, **changes):
        with pytest.raises(ValueError, match=match):
            moefuse.moe_prefill(*args, **{"form": form, **options, **changes})

    refused(r"\[moe_prefill\] x: .*K 64", x[:, :32], gate, up, down, indices, weights)
    refused(r"\[moe_prefill\] up: .*geometry", x, gate, down, down, indices, weights)
    refused(r"\[moe_prefill\] down: ", x, gate, up, up, indices, weights)
    refused(r"\[moe_prefill\] indices: .*integers", x, gate, up, down, weights, weights)
    refused(r"\[moe_prefill\] weights: .*shape", x, gate, up, down, indices, weights[:1])
    refused(r"\[moe_prefill\] indices: .*1 to 16", x, gate, up, down, indices[:, :0], weights)
    refused(r"\[moe_prefill\] bits: ", *args, bits=3)
    refused(r"\[moe_prefill\] mode: ", *args, mode="int4")
    refused(r"form: .*'tiles'", *args, form="tiles")
    beyond = mx.array(np.where(np.arange(72).reshape(24, 3) == 2, 7, np.array(indices)))
    refused(r"indices\[2\]: .*less than 7.*7", x, gate, up, down, beyond, weights)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_linear_of_many_rows_is_stock_bit_for_bit_and_nearer_to_the_truth_in_fp32(dtype):
    rng = np.random.default_rng(7)
    for (bits_, group), (rows, out) in zip(
        FORMATS, ((3, 17), (37, 100), (64, 64), (16, 65), (129, 63), (5, 192)), strict=True
    ):
        options = {"bits": bits_, "group_size": group}
        (w,) = [[a[0] for a in stack(rng, 1, out, 256, dtype, **options)]]
        x = mx.array(rng.normal(size=(rows, 256)).astype(np.float32)).astype(dtype)
        want = mx.quantized_matmul(x, *w, transpose=True, **options)
        assert same_bits(moefuse.prefill_linear(x, *w, **options), want)
        assert same_bits(moefuse.prefill_linear(x[None], *w, **options)[0], want)
        matrix, size = exact_matrices(w, **options)
        rows64 = np.array(x.astype(mx.float32), np.float64)
        near = moefuse.prefill_linear(x, *w, accumulate="fp32_no_fma", **options)
        errors = [
            np.abs(np.array(y.astype(mx.float32), np.float64) - rows64 @ matrix.T)
            for y in (near, want)
        ]
        if dtype != mx.float32:
            assert errors[0].mean() < errors[1].mean()
        else:
            bound = gamma(256 + 3) * (np.abs(rows64) @ size.T)
            assert all((e <= bound).all() for e in errors)


def test_a_bad_linear_is_named():
    w = [a[0] for a in stack(np.random.default_rng(8), 1, 64, 128, mx.bfloat16, group_size=64)]
    x = mx.zeros((20, 128), mx.bfloat16)
    for match, args in (
        (r"\[prefill_linear\] x: .*K 128", (x[:, :64], *w)),
        (r"\[prefill_linear\] w.scales: ", (x, w[0], w[1][:, :1], w[2])),
        (r"\[prefill_linear\] w.scales: .*float32", (x.astype(mx.float32), *w)),
        (r"\[prefill_linear\] w.weight: .*rank 2", (x, w[0][None], *w[1:])),
        (r"\[prefill_linear\] w.biases: ", (x, *w[:2], None)),
        (r"\[prefill_linear\] x: ", (x.astype(mx.int32), *w)),
    ):
        with pytest.raises(ValueError, match=match):
            moefuse.prefill_linear(*args)


@pytest.mark.parametrize("transpose", [True, False])
def test_a_multi_linear_is_nearer_to_the_truth_than_stock(transpose, patched):
    model = tiny("glm")
    layer = model.layers[1].self_attn[("embed_q", "unembed_out")[transpose]]
    width = layer["scales"].shape[-1] * layer.group_size if transpose else layer["weight"].shape[-2]
    x = mx.random.normal((1, 1, 40, width)).astype(mx.bfloat16)[..., :37, :]
    stock_y = layer(x, transpose)
    mx.eval(stock_y)
    patched(model, ["prefill"], accumulate="fp32_no_fma")
    got = layer(x, transpose)
    parts = [layer[name] for name in ("weight", "scales", "biases")]
    matrix, _ = exact_matrices(parts, layer.bits, layer.group_size)
    rows = np.array(x.astype(mx.float32), np.float64)
    truth = rows @ (matrix.swapaxes(-1, -2) if transpose else matrix)
    errors = [
        np.abs(np.array(y.astype(mx.float32), np.float64) - truth).mean() for y in (got, stock_y)
    ]
    assert got.shape == stock_y.shape and got.dtype == stock_y.dtype
    assert errors[0] < errors[1]
    before = layer(x[..., :1, :], transpose)
    moefuse.unpatch(model)
    assert same_bits(before, layer(x[..., :1, :], transpose))  # one row is a decode step's


# -- the patch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_prompt_is_stock_bit_for_bit(family, dtype, patched):
    model = tiny(family, DTYPES[dtype])
    lengths = (3, 8, 40, 70)
    want = {n: model(prompt(n, rows=2)) for n in lengths}
    steps = decode(model, 40, 8)
    mx.eval(want)
    for variants in (["prefill"], ["router", "experts", "prefill"], ["step", "prefill"]):
        report = patched(model, variants)
        assert "moe_prefill" in report.patterns
        for n in lengths:
            before = report.calls.get("moe_prefill", 0)
            linears = report.calls.get("prefill_linear", 0)
            assert same_bits(model(prompt(n, rows=2)), want[n])
            assert (report.calls.get("prefill_linear", 0) > linears) == (2 * n >= 16)
            k = 8 if family == "qwen" else 4
            ran = report.calls.get("moe_prefill", 0) - before
            assert ran == (2 if 2 * n * k >= 64 else 0), n
        assert same_decode(decode(model, 40, 8), steps)
        assert not [told for told in report.fallbacks if told.startswith(("prefill", "experts"))]
        moefuse.unpatch(model)
    report = patched(model, [])
    assert same_bits(model(prompt(40, rows=2)), want[40]) and not report.calls


def test_training_sharding_and_other_weights_stay_stock(patched):
    model = tiny("qwen")
    report = patched(model, [], prefill=True)
    model.train()
    model(prompt(40))
    assert not report.calls and "block: training mode" in report.fallbacks
    model.eval()
    model.layers[0].mlp.sharding_group = mx.distributed.init()
    mx.eval(model(prompt(40)))
    assert report.calls["moe_prefill"] == 1  # the other block's
    assert report.fallbacks["prefill: a sharded model"] == 1
    other = tiny("qwen", quantize={"group_size": 32, "bits": 5})
    report = patched(other, ["prefill"])
    assert report.modules_patched == 0 and any("5 bits" in told for told in report.fallbacks)


def test_what_is_patched_on_cuda(monkeypatch, patched):
    model = tiny("glm", mx.float32)
    attention = model.layers[1].self_attn
    monkeypatch.setattr(prefill, "_device", lambda: "cuda")
    for dense in (False, True):
        monkeypatch.setattr(prefill, "DENSE_ON_CUDA", dense)
        report = patched(model, ["prefill"])
        assert ("prefill_linear" in report.patterns) == dense
        for layer, many in ((attention.o_proj, dense), (attention.unembed_out, True)):
            x = mx.random.normal((1, 2, 40, layer["scales"].shape[-1] * layer.group_size))
            parts = [layer[name] for name in ("weight", "scales", "biases")]
            matrix, size = (
                a.swapaxes(-1, -2) for a in exact_matrices(parts, layer.bits, layer.group_size)
            )
            rows, before = np.array(x, np.float64), sum(report.calls.values())
            y = layer(x)
            found = outside(y, rows @ matrix, gamma(x.shape[-1] + 3) * (np.abs(rows) @ size))
            assert not found.any() and (sum(report.calls.values()) > before) == many


def test_the_lab_sees_whether_a_prompt_was_taken():
    variant = parse("prefill+step")
    assert variant.name == "step+prefill"
    calls = {"step": 10, "moe_prefill": 4}
    assert did_not_run(variant, calls, 10, 5) is None
    assert "prefill: expected at least 4" in did_not_run(variant, calls | {"moe_prefill": 3}, 10, 5)
    assert did_not_run(variant, {"step": 10}, 10, 5, prompts=False) is None
    assert "step: expected at least 11" in did_not_run(variant, calls, 11, 5)


def test_the_argument_and_the_flag(monkeypatch, patched):
    model = tiny("qwen")
    assert patched(model, prefill=True).variants == ("router", "experts", "prefill")
    assert patched(model, ["step"], prefill=True).variants == ("step", "prefill")
    monkeypatch.setenv("MOEFUSE_PREFILL", "1")
    assert patched(model).variants == ("router", "experts", "prefill")
    assert patched(model, ["router"]).variants == ("router",)  # what is named decides
    monkeypatch.setenv("MOEFUSE_VARIANTS", "stock")
    assert patched(model).variants == ("prefill",)
    monkeypatch.setenv("MOEFUSE_VARIANTS", "concat_gate_up")
    with pytest.raises(ValueError, match="MOEFUSE_PREFILL.*concat_gate_up without prefill"):
        patched(model)
    monkeypatch.setenv("MOEFUSE_PREFILL", "perhaps")
    with pytest.raises(ValueError, match="MOEFUSE_PREFILL: expected one of"):
        patched(model)
    monkeypatch.setenv("MOEFUSE_DISABLE", "1")
    assert patched(model).variants == ()


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_checkpoint_prefills_and_generates_as_stock(name, patched):
    from mlx_lm import load

    model, tokenizer = load(str(folder(name)))
    ids = mx.array(tokenizer.encode("Return a new array of the given shape and type. " * 3))[None]
    want = model(ids)
    mx.eval(want)
    report = patched(model, ["step", "prefill"])
    assert same_bits(model(ids), want)
    assert report.calls["moe_prefill"] > 0 and report.calls["prefill_linear"] > 0
    steps = decode(model, 40, 8)
    assert report.calls["step"] > 0

    oracle = load_oracle(inspect(folder(name)), model)(ids)
    patched(model, ["prefill"], accumulate="fp32_no_fma")
    near = model(ids)
    errors = [mx.abs(y.astype(mx.float32) - oracle).mean().item() for y in (near, want)]
    assert errors[0] < errors[1] / 2

    moefuse.unpatch(model)
    assert bits(model(ids)).tobytes() == bits(want).tobytes()
    assert same_decode(decode(model, 40, 8), steps)
