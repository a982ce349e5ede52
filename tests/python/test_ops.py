"""The ops against the stock MLX graphs they replace: `exact` gives the same bits, always."""

import hashlib
import itertools
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import moefuse
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("on_cpu")
FLOATS = (mx.bfloat16, mx.float16, mx.float32)
BITS = {mx.bfloat16: mx.uint16, mx.float16: mx.uint16, mx.float32: mx.uint32}


def bits(a):
    """The raw bits of an array; every NaN counts as the same one."""
    if a.dtype in BITS:
        a = mx.where(mx.isnan(a), mx.array(float("nan"), a.dtype), a)
        a = mx.view(a, BITS[a.dtype])
    return np.array(a)


def assert_same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert np.array_equal(bits(got), bits(want))


def stock_softmax_router(logits, k, norm):
    scores = mx.softmax(logits, axis=-1, precise=True)
    indices = mx.argpartition(scores, kth=-k, axis=-1)[..., -k:]
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if norm:
        weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    return indices, weights


def stock_sigmoid_router(logits, bias, k, n_group, topk_group, scale, norm):
    from mlx_lm.models.glm4_moe_lite import group_expert_select

    return group_expert_select(logits, bias, k, n_group, topk_group, scale, norm)


def logits_of(kind, rng, experts, dtype):
    x = rng.normal(size=(5, experts)).astype(np.float32) * 3
    if kind == "tied":
        x = np.round(x)
    elif kind == "equal":
        x[:] = 1.5
    elif kind == "infinite":
        x[0, 0], x[1], x[2, 0], x[3] = np.inf, -np.inf, -np.inf, np.inf
    elif kind == "nan":
        x[0, experts // 2], x[1] = np.nan, np.nan
    elif kind == "wide":
        x *= 100
    return mx.array(x).astype(dtype)


KINDS = ("random", "tied", "equal", "infinite", "nan", "wide")
SIZES = ((128, 8), (64, 4), (32, 16), (7, 3), (8, 8), (1, 1), (40, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_softmax_router_is_stock_bit_for_bit(dtype, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for (experts, k), norm in itertools.product(SIZES, (True, False)):
        logits = logits_of(kind, rng, experts, dtype)
        indices, weights = moefuse.moe_router_argpartition_logits_topk(
            logits, k, norm_topk_prob=norm
        )
        want_indices, want_weights = stock_softmax_router(logits, k, norm)
        assert_same(indices, want_indices)
        assert_same(weights, want_weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sigmoid_router_is_stock_bit_for_bit(dtype, kind):
    rng = np.random.default_rng(10 + KINDS.index(kind))
    for (experts, k), norm, groups in itertools.product(
        ((64, 4), (32, 16), (8, 8), (40, 1)), (True, False), ((1, 1), (4, 2), (4, 4))
    ):
        if experts // groups[0] < 2 or k > experts // groups[0] * groups[1]:
            continue
        logits = logits_of(kind, rng, experts, dtype)
        bias = mx.array(rng.normal(size=experts).astype(np.float32) * 0.1)
        got = moefuse.moe_router_argpartition_logits_topk(
            logits, k, scoring="sigmoid", correction_bias=bias, norm_topk_prob=norm,
            scaling_factor=1.8, n_group=groups[0], topk_group=groups[1],
        )  # fmt: skip
        want = stock_sigmoid_router(logits, bias, k, *groups, 1.8, norm)
        assert_same(got[0], want[0])
        assert_same(got[1], want[1])


def test_logits_router_selects_the_same_experts_up_to_ties_and_normalises():
    logits = mx.array(np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32))
    indices, weights = moefuse.moe_router_argpartition_logits_topk(logits, 8, mode="logits")
    want, _ = stock_softmax_router(logits, 8, True)
    assert np.array_equal(np.sort(np.array(indices)), np.sort(np.array(want)))
    chosen = np.take_along_axis(np.array(logits, np.float64), np.array(indices, np.int64), -1)
    oracle = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    # exp within 4 units, k sums, one division: (k + 8) units of fp32 of each weight
    assert np.all(np.abs(np.array(weights) - oracle) <= 16 * 2.0**-24 * oracle)


def experts(rng, count, rows, cols, dtype, group_size, bits_):
    w = mx.array(rng.normal(size=(count, rows, cols)).astype(np.float32) * 0.05).astype(dtype)
    return mx.quantize(w, group_size, bits_)


def stock_experts(x, gate, up, down, indices, weights, group_size, bits_):
    def qmm(x, w):
        return mx.gather_qmm(
            x, *w, rhs_indices=indices, transpose=True, group_size=group_size, bits=bits_
        )

    x = mx.expand_dims(x, (-2, -3))
    h = nn.silu(qmm(x, gate)) * qmm(x, up)
    y = qmm(h, down).squeeze(-2)
    return h, y, (y * weights[..., None]).sum(axis=-2).astype(y.dtype)


def test_non_finite_activations_are_stock_bit_for_bit():
    rng = np.random.default_rng(5)
    for dtype, bad in itertools.product(FLOATS, (np.nan, np.inf, -np.inf, 6e4)):
        gate, up = (experts(rng, 4, 64, 64, dtype, 64, 4) for _ in "gu")
        down = experts(rng, 4, 64, 64, dtype, 64, 4)
        x = rng.normal(size=(2, 64)).astype(np.float32)
        x[0, 17] = bad
        indices, weights = mx.array([[0, 3], [2, 1]]), mx.array([[0.25, 0.75]] * 2).astype(dtype)
        args = (mx.array(x).astype(dtype), gate, up, down, indices, weights)
        got = moefuse.moe_gather_qmm_swiglu_downproj_combine(*args, accumulate="exact")
        assert_same(got, stock_experts(*args, 64, 4)[2])


@pytest.mark.parametrize(("mode", "group_size"), [("mxfp4", 32), ("nvfp4", 16)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp4_experts_are_stock_bit_for_bit(dtype, mode, group_size):
    """Also where each byte is a scale, infinity and NaN among them."""
    rng = np.random.default_rng(11)
    options = {"group_size": group_size, "bits": 4, "mode": mode}

    def stack(rows, cols, wild):
        w = mx.array(rng.normal(size=(6, rows, cols)).astype(np.float32) * 0.05)
        weight, scales = mx.quantize(w.astype(dtype), **options)
        if wild:
            scales = mx.array(rng.permutation(np.arange(scales.size) % 256).astype(np.uint8))
            scales = scales.reshape(6, rows, -1)
        return weight, scales

    for hidden, width, wild in ((96, 64, False), (32, 160, False), (64, 96, True)):
        gate, up, down = (
            stack(*shape, wild) for shape in ((width, hidden), (width, hidden), (hidden, width))
        )
        x = mx.array(rng.normal(size=(3, hidden)).astype(np.float32)).astype(dtype)
        indices = mx.array(np.argsort(rng.random((3, 6)), -1)[:, :4].astype(np.uint32))
        weights = mx.array(rng.random((3, 4)).astype(np.float32)).astype(dtype)

        def qmm(x, w, indices=indices):
            return mx.gather_qmm(x, *w, rhs_indices=indices, **options)

        spread = mx.expand_dims(x, (-2, -3))
        h = nn.silu(qmm(spread, gate)) * qmm(spread, up)
        want = (qmm(h, down).squeeze(-2) * weights[..., None]).sum(axis=-2)
        assert_same(
            moefuse.gather_qmm_swiglu(spread, *gate, None, *up, None, None, indices, **options), h
        )
        got = moefuse.moe_gather_qmm_swiglu_downproj_combine(
            x, gate, up, down, indices, weights, accumulate="exact", **options
        )
        assert_same(got, want.astype(dtype))
        assert wild or not bool(mx.isnan(want).any())


def test_gather_qmm_swiglu_batches_as_gather_qmm_does():
    rng = np.random.default_rng(6)
    gate, up = (experts(rng, 5, 96, 64, mx.bfloat16, 64, 4) for _ in "gu")
    x = mx.array(rng.normal(size=(5, 3, 64)).astype(np.float32)).astype(mx.bfloat16)
    lhs, rhs = mx.array([[0, 4], [2, 2]]).astype(mx.uint32), mx.array([1, 3]).astype(mx.uint32)
    for left, right in ((lhs, rhs), (None, None), (lhs, lhs)):
        want = [mx.gather_qmm(x, *w, lhs_indices=left, rhs_indices=right) for w in (gate, up)]
        got = moefuse.gather_qmm_swiglu(x, *gate, *up, left, right)
        assert_same(got, nn.silu(want[0]) * want[1])


def test_the_comparer_sees_one_bit_a_sign_a_nan_and_a_shape():
    a = mx.array([1.0, -0.0, 2.0], mx.bfloat16)
    assert_same(a, mx.array([1.0, -0.0, 2.0], mx.bfloat16))
    for other in ([1.0, 0.0, 2.0], [1.0, -0.0, float("nan")], [1.0, -0.0, 2.015625], [1.0, -0.0]):
        with pytest.raises(AssertionError):
            assert_same(a, mx.array(other, mx.bfloat16))


DIGEST = """
import hashlib, sys
import mlx.core as mx, numpy as np, moefuse
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(1)
digest = hashlib.sha256()
for dtype in (mx.bfloat16, mx.float16, mx.float32):
    for group_size, bits, kind in (
            (64, 4, "affine"), (32, 8, "affine"), (32, 4, "mxfp4"), (16, 4, "nvfp4")):
        def quantized(n, k):
            w = mx.array(rng.normal(size=(6, n, k)).astype(np.float32)).astype(dtype)
            return mx.quantize(w, group_size, bits, mode=kind)
        gate, up, down = quantized(192, 320), quantized(192, 320), quantized(320, 192)
        x = mx.array(rng.normal(size=(3, 320)).astype(np.float32)).astype(dtype)
        indices = mx.array(np.argsort(rng.random((3, 6)), -1)[:, :4].astype(np.uint32))
        weights = mx.array(rng.random((3, 4)).astype(np.float32)).astype(dtype)
        for mode in ("exact", "fp32_no_fma", "fp32"):
            y = moefuse.moe_gather_qmm_swiglu_downproj_combine(
                x, gate, up, down, indices, weights, accumulate=mode,
                group_size=group_size, bits=bits, mode=kind)
            digest.update(np.array(y.astype(mx.float32)).tobytes())
print(moefuse._core.cpu_isa(), digest.hexdigest())
"""


def digest_with(**environment):
    out = subprocess.run(
        [sys.executable, "-c", DIGEST], env={**os.environ, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return out.stdout.split()


def test_every_thread_count_and_instruction_set_gives_the_same_bits():
    isa, want = digest_with(MOEFUSE_NUM_THREADS="1")
    for threads in ("2", "3", "8"):
        assert digest_with(MOEFUSE_NUM_THREADS=threads) == [isa, want]
    others = {"avx512": ("avx2", "plain"), "avx2": ("plain",), "neon": ("plain",)}
    for other in others.get(isa, ()):
        assert digest_with(MOEFUSE_ISA=other) == [other, want]
    assert len(want) == len(hashlib.sha256().hexdigest())


def test_rows_do_not_depend_on_their_neighbours():
    rng = np.random.default_rng(8)
    gate, up = (experts(rng, 6, 128, 192, mx.bfloat16, 64, 4) for _ in "gu")
    down = experts(rng, 6, 192, 128, mx.bfloat16, 64, 4)
    x = mx.array(rng.normal(size=(8, 192)).astype(np.float32)).astype(mx.bfloat16)
    indices = mx.array(np.argsort(rng.random((8, 6)), -1)[:, :3].astype(np.uint32))
    weights = mx.array(rng.random((8, 3)).astype(np.float32))
    for mode in ("exact", "fp32_no_fma", "fp32"):
        run = moefuse.moe_gather_qmm_swiglu_downproj_combine
        together = run(x, gate, up, down, indices, weights, accumulate=mode)
        for r in range(8):
            one = slice(r, r + 1)
            alone = run(x[one], gate, up, down, indices[one], weights[one], accumulate=mode)
            assert_same(together[one], alone)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda op: op(mx.zeros((2, 4)), 5), "k: expected at most the 4 experts, got 5"),
        (lambda op: op(mx.zeros((2, 4)), 0), "k: expected 1 to 16, got 0"),
        (lambda op: op(mx.zeros((2, 4), mx.int32), 2), "logits: expected float32, float16"),
        (lambda op: op(mx.zeros((2, 4)), 2, mode="fast"), "mode: expected one of 'exact'"),
        (lambda op: op(mx.zeros((2, 4)), 2, scoring="relu"), "scoring: expected one of"),
        (
            lambda op: op(mx.zeros((2, 4)), 2, scoring="sigmoid", correction_bias=mx.zeros(3)),
            r"correction_bias: expected shape \[4\], got \[3\]",
        ),
    ],
)
def test_router_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=text):
        call(moefuse.moe_router_argpartition_logits_topk)
