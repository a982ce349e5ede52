"""The prompt's rate on a GPU: stock mlx-lm and what could take its place, at true geometry.

Random weights in the model's own layout. `experts` times candidates for one layer's experts block,
`ops` the parts they and the rest of a layer are made of, `whole` the model's prefill with each
candidate in A B B A against stock. What fails is told in its place and the rest goes on.
  python benchmarks/cuda/prefill.py qwen|glm --lengths 1024,4096 --json prefill.json
  python benchmarks/cuda/prefill.py qwen --toy          # a rehearsal on any machine
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import mla, switch_layers
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm_decode import NAMES, build, numbers
from moefuse.lab import environment
from moefuse.lab.synth import LIKE

TOY = {
    "hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "num_hidden_layers": 3,
    "vocab_size": 256,
}  # fmt: skip
MANY = 128  # rows from which on a candidate stands in
STOCK_SWITCH = switch_layers.SwitchGLU.__call__
STOCK_LINEAR = nn.QuantizedLinear.__call__
STOCK_MULTI = mla.QuantizedMultiLinear.__call__


def dequantised(proj) -> mx.array:
    return mx.dequantize(
        proj["weight"], proj["scales"], proj.get("biases"), proj.group_size, proj.bits, proj.mode
    )


def qmm(proj, x: mx.array, experts: mx.array, ordered: bool = True) -> mx.array:
    return mx.gather_qmm(
        x, proj["weight"], proj["scales"], proj.get("biases"), rhs_indices=experts,
        transpose=True, group_size=proj.group_size, bits=proj.bits, mode=proj.mode,
        sorted_indices=ordered,
    )  # fmt: skip


def mm(proj, x: mx.array, experts: mx.array, ordered: bool = True) -> mx.array:
    stack = dequantised(proj).swapaxes(-1, -2)
    return mx.gather_mm(x, stack, rhs_indices=experts, sorted_indices=ordered)


def swiglu_down(switch, x: mx.array, experts: mx.array, product: Callable) -> mx.array:
    gate, up = product(switch.gate_proj, x, experts), product(switch.up_proj, x, experts)
    return product(switch.down_proj, switch.activation(up, gate), experts)


# Candidates: switch, x [..., H], indices [..., k] -> [..., k, D].
def sorted_rows(switch, x: mx.array, indices: mx.array, product: Callable) -> mx.array:
    """One row a matrix, rows sorted by expert: with gather_qmm what stock does."""
    rows, order, inverse = switch_layers._gather_sort(mx.expand_dims(x, (-2, -3)), indices)
    y = swiglu_down(switch, rows, order, product)
    return switch_layers._scatter_unsort(y, inverse, indices.shape).squeeze(-2)


def layout(indices: mx.array, experts: int, block: int):
    """Rows sorted by expert, each expert's padded to whole blocks.

    (row of x in each slot, expert of each block, slot of each index), with no value read back.
    """
    flat = indices.flatten().astype(mx.int32)
    rows = flat.size
    blocks = min((rows + experts * (block - 1)) // block, rows)
    counts = (flat[:, None] == mx.arange(experts)).sum(0).astype(mx.int32)
    ends = mx.cumsum((counts + block - 1) // block)
    before = ends * block - (counts + block - 1) // block * block - (mx.cumsum(counts) - counts)
    order = mx.argsort(flat)
    slot = mx.arange(rows, dtype=mx.int32) + before[flat[order]]
    source = mx.zeros(blocks * block, mx.int32)
    source[slot] = (order // indices.shape[-1]).astype(mx.int32)
    slot_of = mx.zeros(rows, mx.int32)
    slot_of[order] = slot
    expert = (mx.arange(blocks)[:, None] >= ends).sum(-1)
    return source, mx.minimum(expert, experts - 1).astype(mx.uint32), slot_of


def blocks(switch, x: mx.array, indices: mx.array, product: Callable, block: int) -> mx.array:
    """`block` rows a matrix, all of one expert."""
    source, expert, slot = layout(indices, switch.gate_proj.num_experts, block)
    rows = x.flatten(0, -2)[source].reshape(expert.size, block, x.shape[-1])
    y = swiglu_down(switch, rows, expert, product)
    return mx.unflatten(y.flatten(0, 1)[slot], 0, indices.shape)


def each_expert(switch, x: mx.array, indices: mx.array, dense: bool) -> mx.array:
    """A matrix product an expert; the counts are read back first."""
    names = ("gate_proj", "up_proj", "down_proj")
    rows, order, inverse = switch_layers._gather_sort(mx.expand_dims(x, (-2, -3)), indices)
    rows, experts = rows.squeeze(1), switch.gate_proj.num_experts
    counts = (order[:, None] == mx.arange(experts)).sum(0).tolist()
    stacks = [dequantised(switch[n]) for n in names] if dense else []
    found, at = [], 0
    for e, count in enumerate(counts):
        if not count:
            continue
        part, at = rows[at : at + count], at + count
        if dense:
            gate, up, down = ((lambda v, w=w[e]: v @ w.T) for w in stacks)
        else:
            gate, up, down = (partial(one_expert, switch[n], e) for n in names)
        found.append(down(switch.activation(up(part), gate(part))))
    y = mx.concatenate(found)[inverse]
    return mx.unflatten(y, 0, indices.shape)


def one_expert(proj, e: int, x: mx.array) -> mx.array:
    return mx.quantized_matmul(
        x, proj["weight"][e], proj["scales"][e], proj["biases"][e], True, proj.group_size,
        proj.bits, proj.mode,
    )  # fmt: skip


def equal_share(switch, x: mx.array, indices: mx.array) -> mx.array:
    """One batched matmul, every expert padded to the largest count, which is read back."""
    experts = switch.gate_proj.num_experts
    counts = (indices.flatten()[:, None] == mx.arange(experts)).sum(0)
    share = -(-int(counts.max()) // 16) * 16
    flat = indices.flatten().astype(mx.int32)
    order = mx.argsort(flat)
    before = mx.arange(experts) * share - (mx.cumsum(counts) - counts)
    slot = mx.arange(flat.size) + before[flat[order]]
    source, slot_of = mx.zeros(experts * share, mx.int32), mx.zeros(flat.size, mx.int32)
    source[slot] = (order // indices.shape[-1]).astype(mx.int32)
    slot_of[order] = slot.astype(mx.int32)
    rows = x.flatten(0, -2)[source].reshape(experts, share, x.shape[-1])
    y = swiglu_down(switch, rows, slot, lambda p, v, _: v @ dequantised(p).swapaxes(-1, -2))
    return mx.unflatten(y.flatten(0, 1)[slot_of], 0, indices.shape)


EXPERTS: dict[str, Callable] = {
    "stock": STOCK_SWITCH,
    **{f"blocks{b}_qmm": partial(blocks, product=qmm, block=b) for b in (16, 32, 64, 128)},
    "sorted_mm": partial(sorted_rows, product=mm),
    **{f"blocks{b}_mm": partial(blocks, product=mm, block=b) for b in (32, 64, 128)},
    "equal_share": equal_share,
    "each_expert_mm": partial(each_expert, dense=True),
    "each_expert_qmm": partial(each_expert, dense=False),
}


def dense_linear(layer, x: mx.array) -> mx.array:
    """A quantised linear layer as dequantise and matmul where there are many rows."""
    if x.size // x.shape[-1] < MANY:
        return STOCK_LINEAR(layer, x)
    y = x @ dequantised(layer).T
    return y + layer["bias"] if "bias" in layer else y


def dense_multi(layer, x: mx.array, transpose: bool = True) -> mx.array:
    """The same for the matrices of MLA, one a head."""
    if x.shape[-2] < MANY:
        return STOCK_MULTI(layer, x, transpose)
    weight = dequantised(layer)
    return x @ (weight.swapaxes(-1, -2) if transpose else weight)


@contextlib.contextmanager
def replaced(candidate: str):
    """SwitchGLU (and with "+dense" the dense layers) as the candidate has it."""
    name, _, dense = candidate.partition("+")
    many = EXPERTS[name]

    def call(switch, x, indices):
        rows = indices.size // indices.shape[-1]
        return (many if rows >= MANY else STOCK_SWITCH)(switch, x, indices)

    switch_layers.SwitchGLU.__call__ = STOCK_SWITCH if name == "stock" else call
    if dense:
        nn.QuantizedLinear.__call__ = dense_linear
        mla.QuantizedMultiLinear.__call__ = dense_multi
    try:
        yield
    finally:
        switch_layers.SwitchGLU.__call__ = STOCK_SWITCH
        nn.QuantizedLinear.__call__ = STOCK_LINEAR
        mla.QuantizedMultiLinear.__call__ = STOCK_MULTI


def micros(job: Callable[[], mx.array], repeats: int = 10) -> dict:
    """us a call, queued one behind the other, after two calls that compile; peak memory in GB."""
    try:
        for _ in range(2):
            mx.eval(job())
        mx.reset_peak_memory()
        held, begin = mx.get_active_memory(), time.perf_counter()
        for _ in range(repeats):
            mx.async_eval(job())
        mx.synchronize()
        took = (time.perf_counter() - begin) / repeats
        return {"us": round(took * 1e6, 1), "extra_gb": (mx.get_peak_memory() - held) / 1e9}
    except Exception as error:  # what the machine cannot run is told in its place
        return {"void": f"{type(error).__name__}: {error}"[:300]}


def told(name: str, found: dict) -> dict:
    print(f"  {name}: {json.dumps(found)}", flush=True)
    return found


def choices(length: int, experts: int, k: int, skew: float) -> mx.array:
    """[length, k] experts; skew 0: all alike, 1: the popular ones get several times their share."""
    logits = mx.random.normal((length, experts)) + skew * mx.random.normal((experts,))
    return mx.argpartition(-logits, kth=k - 1, axis=-1)[..., :k].astype(mx.uint32)


def experts_block(model, config: dict, length: int, skew: float) -> dict:
    """Each candidate for one layer: us, and its largest difference to stock over stock's size."""
    switch = switch_of(model)
    x = mx.random.normal((1, length, config["hidden_size"])).astype(mx.bfloat16)
    k, experts = config["num_experts_per_tok"], switch.gate_proj.num_experts
    indices = choices(length, experts, k, skew)[None]
    mx.eval(x, indices)
    found, wanted = {}, None
    for name, candidate in EXPERTS.items():
        cell = micros(lambda c=candidate: c(switch, x, indices))
        if "us" in cell:
            y = candidate(switch, x, indices).astype(mx.float32)
            wanted = y if wanted is None else wanted
            cell["difference"] = ((y - wanted).abs().max() / wanted.abs().max()).item()
        found[name] = told(name, cell)
        mx.clear_cache()
    return {"length": length, "skew": skew, "cells": found}


def switch_of(model):
    return next(layer.mlp.switch_mlp for layer in model.layers if "switch_mlp" in layer.mlp)


def layer_ops(model, config: dict, length: int) -> dict:
    """The parts of a layer on their own."""
    switch, layer = switch_of(model), model.layers[-1]
    hidden, k = config["hidden_size"], config["num_experts_per_tok"]
    x = mx.random.normal((1, length, hidden)).astype(mx.bfloat16)
    experts = switch.gate_proj.num_experts
    indices = choices(length, experts, k, 0.0)[None]
    probabilities = mx.random.uniform(shape=(length, experts)).astype(mx.bfloat16)
    y = mx.random.normal((1, length, k, hidden)).astype(mx.bfloat16)
    weights = mx.random.uniform(shape=(1, length, k)).astype(mx.bfloat16)
    mask = create_causal_mask(length) if "kv_lora_rank" in config else "causal"
    mx.eval(x, indices, probabilities, y, weights)
    jobs = {
        "dequantize gate_proj": lambda: dequantised(switch.gate_proj),
        "dequantize down_proj": lambda: dequantised(switch.down_proj),
        "argpartition": lambda: mx.argpartition(probabilities, kth=-k, axis=-1),
        "argsort": lambda: mx.argsort(indices.flatten()),
        "layout 64": lambda: layout(indices, experts, 64)[0],
        "combine": lambda: (y * weights[..., None]).sum(-2),
        "rms_norm": lambda: layer.input_layernorm(x),
        "attention, whole": lambda: layer.self_attn(x, mask=mask),
        "mlp, whole": lambda: layer.mlp(x),
        "router gate": lambda: layer.mlp.gate(x),
        **linears(layer, length),
        **multi_linears(layer, length),
        **attentions(config, length),
    }
    return {"length": length, "cells": {n: told(n, micros(job)) for n, job in jobs.items()}}


def linears(layer, length: int) -> dict[str, Callable]:
    """Every quantised linear of a layer beside its form as dequantise and matmul."""
    jobs = {}
    for name, linear in layer.named_modules():
        if type(linear) is not nn.QuantizedLinear:
            continue
        columns = linear["scales"].shape[-1] * linear.group_size
        x = mx.random.normal((1, length, columns)).astype(mx.bfloat16)
        mx.eval(x)
        jobs[f"{name} quantized_matmul"] = partial(STOCK_LINEAR, linear, x)
        jobs[f"{name} dequantize, matmul"] = partial(dense_linear, linear, x)
    return jobs


def multi_linears(layer, length: int) -> dict[str, Callable]:
    """MLA's own two, as a prompt has them: keys and values from the latent."""
    if "embed_q" not in layer.self_attn:
        return {}
    latent = mx.random.normal((1, 1, length, layer.self_attn.kv_lora_rank)).astype(mx.bfloat16)
    mx.eval(latent)
    embed, unembed = layer.self_attn.embed_q, layer.self_attn.unembed_out
    return {
        "embed_q quantized_matmul": lambda: STOCK_MULTI(embed, latent, False),
        "embed_q dequantize, matmul": lambda: dense_multi(embed, latent, False),
        "unembed_out quantized_matmul": lambda: STOCK_MULTI(unembed, latent),
        "unembed_out dequantize, matmul": lambda: dense_multi(unembed, latent),
    }


def attentions(config: dict, length: int) -> dict[str, Callable]:
    """The attention product: causal where the family has it, else with a mask of numbers."""
    heads = config["num_attention_heads"]
    if "kv_lora_rank" not in config:
        width, groups = config["head_dim"], config["num_key_value_heads"]
        q = mx.random.normal((1, heads, length, width)).astype(mx.bfloat16)
        kv = mx.random.normal((1, groups, length, width)).astype(mx.bfloat16)
        return {
            "sdpa causal": lambda: scaled_dot_product_attention(
                q, kv, kv, cache=None, scale=width**-0.5, mask="causal"
            )
        }
    nope, rope, wide = (config[f"{n}_dim"] for n in ("qk_nope_head", "qk_rope_head", "v_head"))
    shape = (1, heads, length)
    q, v = (mx.random.normal((*shape, d)).astype(mx.bfloat16) for d in (nope, wide))
    q_all = mx.random.normal((*shape, nope + rope)).astype(mx.bfloat16)
    mask = mx.random.normal((1, heads, length, length)).astype(mx.bfloat16)
    sdpa = mx.fast.scaled_dot_product_attention
    return {
        "sdpa with mask": lambda: sdpa(q, q, v, scale=0.06, mask=mask),
        "sdpa rope inside": lambda: sdpa(q_all, q_all, v, scale=0.06, mask="causal"),
    }


def once(model, ids: mx.array, chunk: int) -> float:
    cache = make_prompt_cache(model)
    begin = time.perf_counter()
    for at in range(0, ids.size, chunk):
        model(ids[at : at + chunk][None], cache=cache)
        mx.eval([c.state for c in cache])
    return time.perf_counter() - begin


def whole(model, length: int, candidate: str, chunk: int) -> dict:
    """tok/s of the model's prefill in A B B A, a warm run of each side in front."""
    ids = 1 + mx.arange(length) % min(1000, model.args.vocab_size - 1)
    found = {"length": length, "candidate": candidate}
    rates, peaks = {"stock": [], candidate: []}, {}
    try:
        for turn, side in enumerate(("stock", candidate, "stock", candidate, candidate, "stock")):
            with replaced(side):
                mx.clear_cache()
                mx.reset_peak_memory()
                rate = length / once(model, ids, chunk)
            if turn > 1:
                rates[side].append(rate)
                peaks[side] = mx.get_peak_memory() / 1e9
    except Exception as error:
        return told(candidate, found | {"void": f"{type(error).__name__}: {error}"[:300]})
    medians = {side: statistics.median(values) for side, values in rates.items()}
    found |= {"tok_s": rates, "peak_gb": peaks, "ratio": medians[candidate] / medians["stock"]}
    return told(candidate, found)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=NAMES)
    parser.add_argument("--lengths", type=numbers, default=[1024])
    parser.add_argument("--chunk", type=int, default=2048, help="rows a call, as mlx-lm's")
    parser.add_argument("--parts", default="experts,ops,whole")
    parser.add_argument(
        "--whole",
        default="blocks64_qmm,blocks64_qmm+dense,blocks64_mm+dense,sorted_mm+dense,"
        "equal_share+dense,stock+dense",
        help="candidates of the whole prefill; +dense: the dense layers dequantised too",
    )
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--toy", action="store_true", help="a small geometry, for a rehearsal")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    chosen = arguments(words)
    config = dict(LIKE[NAMES[chosen.family]])
    config["num_hidden_layers"] = chosen.layers or config["num_hidden_layers"]
    if chosen.toy:
        config |= {name: value for name, value in TOY.items() if name in config}
    model = build(config)
    found = {
        "model": NAMES[chosen.family],
        "toy": chosen.toy,
        "layers": config["num_hidden_layers"],
        "weights_gb": mx.get_active_memory() / 1e9,
        "device": environment.device_name(),
        "gpu": environment.gpu(),
        "versions": {n: environment.version_of(n) for n in ("mlx", "mlx-lm")},
        "git_commit": environment.commit(environment.repository_root()),
        "date": environment.now(),
        "experts": [],
        "ops": [],
        "whole": [],
    }
    print(f"{found['model']}: {found['weights_gb']:.2f} GB on {found['device']}", flush=True)
    jobs = []
    for n in chosen.lengths:
        jobs += [("experts", experts_block, (model, config, n, skew)) for skew in (0.0, 1.0)]
        jobs += [("ops", layer_ops, (model, config, n))]
        jobs += [("whole", whole, (model, n, c, chosen.chunk)) for c in chosen.whole.split(",")]
    for part, job, values in jobs:
        if part not in chosen.parts.split(","):
            continue
        print(f"{part} {values[2:] if part != 'whole' else values[1:]}", flush=True)
        try:
            found[part].append(job(*values))
        except Exception as error:
            found[part].append({"void": f"{type(error).__name__}: {error}"[:300]})
            print(f"  {found[part][-1]}", flush=True)
        if chosen.json:  # whole after every part
            chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
