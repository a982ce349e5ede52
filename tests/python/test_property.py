"""Random geometries: in `exact` an op has the stock graph's bits, or refuses with a reason.

Case n is the same on every machine. The test command runs 300; MOEFUSE_PROPERTY_CASES=10000 more,
and MOEFUSE_PROPERTY_FIRST=n starts at the one that a failure named.
"""

from __future__ import annotations

import math
import os

import mlx.core as mx
import mlx.nn as nn
import moefuse
import numpy as np
import pytest
from test_ops import FLOATS, assert_same, stock_sigmoid_router, stock_softmax_router

FIRST = int(os.environ.get("MOEFUSE_PROPERTY_FIRST", "0"))
CASES = int(os.environ.get("MOEFUSE_PROPERTY_CASES", "300"))
LEADS = ((1,), (2,), (3,), (8,), (17,), (2, 1), (1, 5), (2, 3, 1), (1, 1, 1, 4))
INTEGERS = (np.uint32, np.int32, np.int64, np.uint8, np.int16)


def assert_same_sum(got: mx.array, want: mx.array, k: int):
    """Stock does not add where k is 1, and so keeps a product of -0.0; our sums begin with 0.0."""
    if k == 1:
        got, want = got + mx.zeros_like(got), want + mx.zeros_like(want)
    assert_same(got, want)


class Draw:
    """Random arrays of one case."""

    def __init__(self, case: int):
        self.rng = np.random.default_rng([20261124, case])
        self.dtype = self.one_of(FLOATS)

    def one_of(self, choices):
        return choices[self.rng.integers(len(choices))]

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def floats(self, shape, dtype=None, scale=1.0) -> mx.array:
        """Of the case's dtype, and contiguous or a view of one of six kinds."""
        *lead, last = shape
        kind = self.one_of(("whole", "step", "offset", "turned", "reversed", "broadcast"))
        wide = {"step": (*lead, 2 * last), "offset": (*lead, last + 3), "turned": (last, *lead)}
        wide["broadcast"] = (1, *shape[1:])
        values = self.rng.normal(size=wide.get(kind, shape)).astype(np.float32) * scale
        if self.count(0, 9) == 0:  # zeros of both signs, and values that overflow float16
            values.flat[:: self.count(2, 9)] = self.one_of((0.0, -0.0, 3e4, 1e-7))
        a = mx.array(values).astype(dtype or self.dtype)
        return {
            "whole": lambda: a,
            "step": lambda: a[..., ::2],
            "offset": lambda: a[..., 3:],
            "turned": lambda: mx.moveaxis(a, 0, -1),
            "reversed": lambda: a[..., ::-1],
            "broadcast": lambda: mx.broadcast_to(a, shape),
        }[kind]()

    def indices(self, lead, experts: int, k: int) -> mx.array:
        """[..., k] without repeats, or with them, of some integer type."""
        if self.count(0, 3) and k <= experts:
            chosen = np.argsort(self.rng.random((*lead, experts)), axis=-1)[..., :k]
        else:
            chosen = self.rng.integers(0, experts, (*lead, k))
        return mx.array(chosen.astype(self.one_of(INTEGERS)))

    def quantization(self) -> dict:
        """Affine four times of six, else an fp4 mode."""
        mode = self.one_of(("affine",) * 4 + ("mxfp4", "nvfp4"))
        if mode == "affine":
            sizes = {"group_size": self.one_of((32, 64, 128)), "bits": self.one_of((4, 8))}
        else:
            sizes = {"group_size": {"mxfp4": 32, "nvfp4": 16}[mode], "bits": 4}
        return {**sizes, "mode": mode}

    def experts(self, count: int, rows: int, cols: int, group_size=64, bits=4, mode="affine"):
        """A quantised stack, now and then a part of a larger one, or one of wild scales."""
        more = self.one_of((0, 0, 1))
        w = self.rng.normal(size=(count + more, rows, cols)).astype(np.float32) * 0.1
        weight, scales, *biases = mx.quantize(
            mx.array(w).astype(self.dtype), group_size, bits, mode=mode
        )
        if mode != "affine" and self.count(0, 3) == 0:  # infinity, NaN and the smallest among them
            scales = mx.array(self.rng.integers(0, 256, scales.shape).astype(np.uint8))
        return [part[more:] for part in (weight, scales, *biases)]


def experts_case(draw: Draw):
    """moe_gather_qmm_swiglu_downproj_combine and gather_qmm_swiglu on the same operands."""
    options = draw.quantization()
    count, k, lead = draw.count(1, 12), draw.count(1, 16), draw.one_of(LEADS)
    # mx.quantize wants whole groups of 32 at least
    hidden, width = (max(options["group_size"], 32) * draw.count(1, limit) for limit in (4, 3))
    gate, up = (draw.experts(count, width, hidden, **options) for _ in "gu")
    down = draw.experts(count, draw.count(1, 150), width, **options)
    x, indices = draw.floats((*lead, hidden)), draw.indices(lead, count, k)
    weights = draw.floats((*lead, k), draw.one_of((draw.dtype, mx.float32)))

    def qmm(x, w):
        return mx.gather_qmm(x, *w, rhs_indices=indices.astype(mx.uint32), **options)

    spread = mx.expand_dims(x, (-2, -3))
    h = nn.silu(qmm(spread, gate)) * qmm(spread, up)
    y = qmm(h, down).squeeze(-2)
    want = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
    run = moefuse.moe_gather_qmm_swiglu_downproj_combine
    got = run(x, gate, up, down, indices, weights, accumulate="exact", **options)
    assert_same_sum(got, want, k)
    stacks = (*gate, None, *up, None) if len(gate) == 2 else (*gate, *up)
    assert_same(moefuse.gather_qmm_swiglu(spread, *stacks, None, indices, **options), h)


def swiglu_case(draw: Draw):
    """gather_qmm_swiglu with gather_qmm's own batching, and any number of outputs."""
    options = draw.quantization()
    count, batch, rows = draw.count(1, 9), draw.count(1, 5), draw.count(1, 6)
    width, hidden = draw.count(1, 200), max(options["group_size"], 32) * draw.count(1, 4)
    gate, up = (draw.experts(count, width, hidden, **options) for _ in "gu")
    x = draw.floats((batch, rows, hidden))
    left = draw.indices((draw.count(1, 4),), batch, draw.count(1, 3)).astype(mx.uint32)
    right = draw.indices((left.shape[0],), count, left.shape[1]).astype(mx.uint32)
    h = [mx.gather_qmm(x, *w, lhs_indices=left, rhs_indices=right, **options) for w in (gate, up)]
    stacks = (*gate, None, *up, None) if len(gate) == 2 else (*gate, *up)
    got = moefuse.gather_qmm_swiglu(x, *stacks, left, right, **options)
    assert_same(got, nn.silu(h[0]) * h[1])


def router_case(draw: Draw):
    """Both scorings, with ties, and for sigmoid with groups."""
    groups = draw.one_of((1, 1, 2, 4))
    experts, topk_group = groups * draw.count(2, 40), draw.count(1, groups)
    k = draw.count(1, min(16, experts // groups * topk_group))
    logits = draw.floats((*draw.one_of(LEADS), experts), scale=3.0)
    logits = mx.round(logits) if draw.count(0, 2) == 0 else logits
    norm = bool(draw.count(0, 1))
    run = moefuse.moe_router_argpartition_logits_topk
    if groups == 1 and draw.count(0, 1):
        got = run(logits, k, norm_topk_prob=norm)
        want = stock_softmax_router(logits, k, norm)
    else:
        bias = draw.floats((experts,), mx.float32, 0.1)
        scale = draw.one_of((1.0, 1.8, 2.5))
        got = run(
            logits, k, scoring="sigmoid", correction_bias=bias, norm_topk_prob=norm,
            scaling_factor=scale, n_group=groups, topk_group=topk_group,
        )  # fmt: skip
        want = stock_sigmoid_router(logits, bias, k, groups, topk_group, scale, norm)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


def combine_case(draw: Draw):
    lead, k, dim = draw.one_of(LEADS), draw.count(1, 16), draw.count(1, 300)
    y = draw.floats((*lead, k, dim))
    weights = draw.floats((*lead, k), draw.one_of(FLOATS))
    want = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
    run = moefuse.moe_combine_weighted_sum_fp32_no_fma
    assert_same_sum(run(y, weights, accumulate="exact"), want, k)


def refusal_case(draw: Draw):
    """Operands with one thing wrong: an error that says what was expected.

    Values of indices are seen in the evaluation, whose errors MLX hands on as RuntimeError.
    """
    count, k, hidden, width, lead = 6, draw.count(1, 6), 128, 64, draw.one_of(LEADS)
    gate, up = (draw.experts(count, width, hidden, 64, 4) for _ in "gu")
    down = draw.experts(count, hidden, width, 64, 4)
    given = {
        "x": draw.floats((*lead, hidden)), "gate": gate, "up": up, "down": down,
        "indices": draw.indices(lead, count, k).astype(mx.int32),
        "weights": draw.floats((*lead, k)), "group_size": 64, "bits": 4,
    }  # fmt: skip
    other = mx.float16 if draw.dtype != mx.float16 else mx.bfloat16
    wrong = draw.one_of((
        {"bits": draw.one_of((2, 3, 5, 6, 0, -4))},
        {"mode": draw.one_of(("mxfp4", "nvfp4", "mxfp8", ""))},
        {"up": up[:2]},
        {"group_size": draw.one_of((16, 48, 0, -64))},
        {"x": given["x"][..., : draw.count(1, hidden - 1)]},
        {"x": given["x"].astype(mx.int32)},
        {"x": given["x"].astype(other)},
        {"indices": given["indices"].astype(mx.float32)},
        {"indices": given["indices"] + draw.one_of((count, -count, 2**20))},
        {"weights": given["weights"][..., :0]},
        {"weights": given["weights"].astype(mx.int32)},
        {"down": draw.experts(count, hidden, 2 * width, 64, 4)},
        {"up": draw.experts(count, width + 1, hidden, 64, 4)},
        {"gate": [gate[0], gate[1][:, :, :1], gate[2]]},
        {"gate": [gate[0].astype(mx.int32), *gate[1:]]},
    ))  # fmt: skip
    late = "indices" in wrong and wrong["indices"].dtype == mx.int32
    kind = RuntimeError if late else ValueError
    with pytest.raises(kind, match=r"^\[.*: expected .*, got "):
        mx.eval(moefuse.moe_gather_qmm_swiglu_downproj_combine(**{**given, **wrong}))


KINDS = (experts_case, experts_case, swiglu_case, router_case, combine_case, refusal_case)


@pytest.mark.parametrize("part", range(10))
def test_random_cases(part):
    first, last = (FIRST + math.ceil(CASES * p / 10) for p in (part, part + 1))
    with mx.stream(mx.cpu):
        for case in range(first, last):
            try:
                KINDS[case % len(KINDS)](Draw(case))
            except BaseException as error:
                error.add_note(f"MOEFUSE_PROPERTY_FIRST={case} MOEFUSE_PROPERTY_CASES=1")
                raise
