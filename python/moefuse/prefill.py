"""The dense part of a prompt: quantised layers of many rows, outside the experts.

On the CPU a linear layer goes through our own kernels: stock multiplies row by row there. MLA's two
multi-linears become dequantise and matmul: on the CPU unless stock's bits are asked for, and on
CUDA, where stock has no product for a latent that is not contiguous. What is not taken stays mlx's
own layer, counted in the patch's report.
"""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn

from . import _core

LINEAR, MULTI_LINEAR = "prefill_linear", "prefill_multi_linear"  # as they are counted
DENSE_ON_CUDA = False  # linear layers as dequantise and matmul there too
ROWS = 16  # from here on a prompt, not a batch that decodes


class _Layers:
    """What the patched layers of one class share."""

    def __init__(self, report, accumulate: str, stock: type, call):
        self.report, self.accumulate, self.stock = report, accumulate, stock
        self.patched = type(stock.__name__, (stock,), {"__call__": call, "__doc__": stock.__doc__})

    def __deepcopy__(self, memo) -> _Layers:
        return self

    def restore(self, layer) -> None:
        layer.__class__ = self.stock
        del layer.__dict__["_moefuse"]


def _stays(layer, x: mx.array) -> bool:
    """Whether a linear layer's x is stock's: training, or too few rows."""
    return layer._training or x.size < ROWS * x.shape[-1]


def _biased(layer, y: mx.array) -> mx.array:
    return y + layer["bias"] if "bias" in layer else y


def _linear(layer, x: mx.array) -> mx.array:
    """__call__ of a patched linear layer."""
    state: _Layers = layer._moefuse
    if _stays(layer, x):
        return state.stock.__call__(layer, x)
    scales = layer["scales"]
    if layer.mode == "affine" and scales.dtype != x.dtype:
        state.report._fell(LINEAR, f"{scales.dtype} scales, x is {x.dtype}")
        return state.stock.__call__(layer, x)
    y = _core.prefill_linear(
        x,
        layer["weight"],
        scales,
        layer.get("biases"),
        accumulate=state.accumulate,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
    return _biased(layer, y)


def _multi_linear(layer, x: mx.array, transpose: bool = True) -> mx.array:
    """__call__ of MLA's patched layer, [..., L, K] by a matrix a head."""
    state: _Layers = layer._moefuse
    if layer._training or x.shape[-2] < ROWS:
        return state.stock.__call__(layer, x, transpose)
    state.report._counted[MULTI_LINEAR] += 1
    weight = _dequantised(layer, x.dtype)
    return x @ (weight.swapaxes(-1, -2) if transpose else weight)


def _dense_linear(layer, x: mx.array) -> mx.array:
    """__call__ of a linear layer that is dequantised for its many rows."""
    state: _Layers = layer._moefuse
    if _stays(layer, x):
        return state.stock.__call__(layer, x)
    state.report._counted[LINEAR] += 1
    return _biased(layer, x @ _dequantised(layer, x.dtype).T)


def _dequantised(layer, dtype) -> mx.array:
    parts = layer["weight"], layer["scales"], layer.get("biases")
    return mx.dequantize(*parts, layer.group_size, layer.bits, layer.mode, dtype=dtype)


def _device() -> str:
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "cuda" if mx.cuda.is_available() else "metal"


def _wanted(accumulate: str) -> dict:
    """Class of a layer -> (the stem it is counted under, its __call__), for this device."""
    multi = importlib.import_module("mlx_lm.models.mla").QuantizedMultiLinear
    device, found = _device(), {}
    if device == "cpu":
        found[nn.QuantizedLinear] = LINEAR, _linear
    if device == "cuda" and DENSE_ON_CUDA:
        found[nn.QuantizedLinear] = LINEAR, _dense_linear
    if device == "cuda" or (device == "cpu" and accumulate != "exact"):
        found[multi] = MULTI_LINEAR, _multi_linear
    return found


def attach(model, report, accumulate: str, formats: dict) -> None:
    """Patch the quantised dense layers of `model` whose format is among `formats`.

    formats: mode -> (bits, group sizes).
    """
    wanted = _wanted(accumulate)
    shared = {kind: _Layers(report, accumulate, kind, call) for kind, (_, call) in wanted.items()}
    for _, layer in model.named_modules():
        kind = type(layer)
        if kind not in wanted:
            continue
        stem = wanted[kind][0]
        bits, group_sizes = formats.get(layer.mode, ((), ()))
        if layer.bits not in bits or layer.group_size not in group_sizes:
            told = f"{layer.mode} of {layer.bits} bits in groups of {layer.group_size}"
            report._fell(stem, told)
            continue
        layer._moefuse = shared[kind]
        layer.__class__ = shared[kind].patched
        if stem not in report.patterns:
            report.patterns.append(stem)
