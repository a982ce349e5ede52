"""The whole decode step: stock's bits in `exact`, closer to the oracle than stock in fp32 modes,
the same bits for every thread count, instruction set and neighbour, and mlx-lm's caches intact."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import moefuse
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tuner.utils import linear_to_lora_layers
from moefuse import _core, step
from patch_support import DTYPES, FAMILIES, bits, decode, prompt, same_bits, same_decode, tiny

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ("qwen3-moe-tiny", "glm4-moe-lite-tiny")
TEXTS = ("The function returns a list of", "To use this module, first install the package.\n\n")


@pytest.fixture
def stepping():
    """patch(step=True) and nothing else, which comes off at the end of the test."""
    models = []

    def apply(model, accumulate="exact"):
        models.append(model)
        return moefuse.patch(model, [], step=True, accumulate=accumulate)

    yield apply
    for model in models:
        moefuse.unpatch(model)


def greedy(model, ids: list[int], count: int) -> list[tuple[int, np.ndarray]]:
    steps = generate_step(mx.array(ids), model, max_tokens=count)
    return [(int(token), bits(logprobs)) for token, logprobs in steps]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_exact_is_stock_bit_for_bit_on_the_checkpoints(name, stepping):
    model, tokenizer = load(str(ROOT / "models" / name))
    prompts = [tokenizer.encode(text) for text in TEXTS]
    stock = [greedy(model, ids, 48) for ids in prompts]
    report = stepping(model)
    for ids, expected in zip(prompts, stock, strict=True):
        assert same_decode(greedy(model, ids, 48), expected)
    assert report.calls["step"] >= 2 * 48


QUANTIZATIONS = [{"group_size": 32, "bits": 4}, {"group_size": 64, "bits": 8}]


@pytest.mark.parametrize("quantize", QUANTIZATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_stock_bit_for_bit(family, dtype, quantize, stepping):
    wide = {} if family == "qwen" else {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 64}
    wide |= {} if family == "qwen" else {"qk_nope_head_dim": 64}
    changes = {"moe_intermediate_size": 64, **wide}
    model = tiny(family, DTYPES[dtype], quantize=quantize, **changes)
    stock = decode(model, length=3, count=300)  # past the cache's first growth
    report = stepping(model)
    assert same_decode(decode(model, length=3, count=300), stock)
    assert report.calls["step"] >= 300


def test_tied_embeddings_and_unnormalised_weights(stepping):
    model = tiny("qwen", tie_word_embeddings=True, norm_topk_prob=False)
    stock = decode(model)
    stepping(model)
    assert same_decode(decode(model), stock)


def test_group_limited_routing(stepping):
    model = tiny("glm", n_group=4, topk_group=2)
    stock = decode(model)
    stepping(model)
    assert same_decode(decode(model), stock)


def forced(model, tokens: list[int]) -> np.ndarray:
    """Logits after each of `tokens` in turn, from an empty cache, float64."""
    cache = make_prompt_cache(model)
    rows = [model(mx.array([[t]]), cache=cache)[0, -1].astype(mx.float32) for t in tokens]
    return np.array(mx.stack(rows)).astype(np.float64)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


@pytest.mark.parametrize("accumulate", ["fp32_no_fma", "fp32"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_modes_are_far_closer_to_the_oracle_than_stock(name, accumulate, stepping):
    model, tokenizer = load(str(ROOT / "models" / name))
    tokens = tokenizer.encode(TEXTS[1])
    stock = forced(model, tokens)
    oracle_model = copy.deepcopy(model)
    oracle_model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    oracle = forced(oracle_model, tokens)
    stepping(model, accumulate)
    # What is left is the cache, which holds bfloat16 as stock's does.
    assert 0 < rms(forced(model, tokens), oracle) < rms(stock, oracle) / 4


@pytest.mark.parametrize("accumulate", ["fp32_no_fma", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_models_meet_the_oracle(family, accumulate, stepping):
    """fp32 against fp32: only the order of the sums differs."""
    model = tiny(family, mx.float32)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    stock = forced(model, tokens)
    stepping(model, accumulate)
    ours = forced(model, tokens)
    # 2^-24 for each of the some 64 roundings in a row of sums, through 3 layers, with the
    # amplification of one norm each: a wrong index or scale is 1e4 times that.
    bound = 2.0**-24 * 64 * 3 * 8 * np.abs(stock).max()
    assert np.abs(ours - stock).max() <= bound
    assert rms(ours[:, ::-1], stock) > bound  # the comparison can fail


@pytest.mark.parametrize("context", [126, 127, 128, 300, 4095, 5000])
@pytest.mark.parametrize("family", FAMILIES)
def test_long_contexts_meet_the_oracle(family, context, stepping):
    """One token after a cache of random keys and values, at the edges of the attention's chunks."""
    model = tiny(family, mx.float32, max_position_embeddings=8192)
    held = make_prompt_cache(model)
    model(prompt(1), cache=held)
    shapes = [(c.keys.shape, c.values.shape) for c in held]

    def logits() -> np.ndarray:
        cache = make_prompt_cache(model)
        for number, (c, both) in enumerate(zip(cache, shapes, strict=True)):
            keys = [mx.random.key(2 * number + i) for i in range(2)]
            made = [
                mx.random.normal((1, heads, context + 8, dim), key=key)
                for (_, heads, _, dim), key in zip(both, keys, strict=True)
            ]
            c.keys, c.values = made
            c.offset = context
        return np.array(model(mx.array([[5]]), cache=cache)[0, -1]).astype(np.float64)

    stock = logits()
    report = stepping(model, "fp32_no_fma")
    ours = logits()
    assert report.calls["step"] == 1
    # As above; the sums over the context are longer, but their weights sum to one.
    bound = 2.0**-24 * 64 * 3 * 8 * np.abs(stock).max()
    assert np.abs(ours - stock).max() <= bound


def test_exact_refuses_float32_with_a_reason(stepping):
    report = stepping(tiny("qwen", mx.float32))
    assert report.modules_patched == 0
    (reason,) = report.fallbacks
    assert "expected fp32_no_fma or fp32" in reason and "got exact" in reason


def test_an_unquantised_model_falls_back_with_a_reason(stepping):
    model = tiny("qwen", quantize={})
    kind, report = type(model), stepping(model)
    assert type(model) is kind and report.modules_patched == 0
    assert any("model.embed_tokens.scales" in reason for reason in report.fallbacks)


def test_lora_falls_back(stepping):
    model = tiny("qwen")
    settings = {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    linear_to_lora_layers(model, 1, settings)
    model.eval()
    stock = decode(model, count=8)
    report = stepping(model)
    assert report.modules_patched == 0 and any("q_proj" in r for r in report.fallbacks)
    assert same_decode(decode(model, count=8), stock)


def test_lora_put_on_and_taken_off_after_the_patch(stepping):
    model = tiny("qwen")
    plain = decode(model, count=6)
    report = stepping(model)
    kept = model.model.layers[2].self_attn.q_proj
    linear_to_lora_layers(
        model, 1, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    )
    tuned = model.model.layers[2].self_attn.q_proj
    tuned.lora_b = mx.random.normal(tuned.lora_b.shape)
    model.eval()
    got = decode(model, count=6)
    assert not report.calls and any("q_proj" in reason for reason in report.fallbacks)
    moefuse.unpatch(model)
    assert same_decode(got, decode(model, count=6)) and not same_decode(got, plain)
    model.model.layers[2].self_attn.q_proj = kept
    report = stepping(model)
    model.model.layers[2].self_attn.q_proj = tuned
    assert same_decode(decode(model, count=6), got)
    model.model.layers[2].self_attn.q_proj = kept
    assert same_decode(decode(model, count=6), plain) and report.calls["step"] >= 5


CHILD = """
import sys
import moefuse
from patch_support import decode, tiny
for family in ("qwen", "glm"):
    model = tiny(family)
    moefuse.patch(model, [], step=True, accumulate=sys.argv[1])
    for token, logprobs in decode(model, count=24):
        print(token, logprobs.tobytes().hex())
"""


def child(accumulate: str, **env) -> str:
    paths = [str(ROOT / "python"), str(ROOT / "tests" / "python")]
    env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", CHILD, accumulate]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("accumulate", ["exact", "fp32_no_fma"])
def test_threads_and_instruction_sets_do_not_change_a_bit(accumulate):
    one = child(accumulate, MOEFUSE_NUM_THREADS="1")
    assert one.count("\n") == 48
    for threads in ("2", "3", "8"):
        assert child(accumulate, MOEFUSE_NUM_THREADS=threads) == one, threads
    assert child(accumulate, MOEFUSE_ISA="plain") == one


def batch_of(caches: list) -> list:
    """The caches of several prompts as mlx-lm's batch_generate holds them."""
    return [BatchKVCache.merge([c[i] for c in caches]) for i in range(len(caches[0]))]


@pytest.mark.parametrize("accumulate", ["exact", "fp32_no_fma"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_row_alone(family, accumulate, stepping):
    model = tiny(family)
    # Of one, three and two chunks of the fp32 modes' attention.
    prompts = [prompt(length, seed=length)[0] for length in (3, 300, 140)]
    caches = []
    for ids in prompts:
        cache = make_prompt_cache(model)
        model(ids[None], cache=cache)
        mx.eval([c.state for c in cache])
        caches.append(cache)
    stepping(model, accumulate)
    batch = batch_of(caches)
    for tokens in ([1, 2, 3], [4, 5, 6], [7, 8, 9]):
        together = model(mx.array(tokens)[:, None], cache=batch)
        for row, token in enumerate(tokens):
            alone = model(mx.array([[token]]), cache=caches[row])
            assert same_bits(together[row], alone[0]), (tokens, row)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_batches_have_stocks_bits(family, stepping):
    model = tiny(family)
    logits = []
    for on in (False, True):
        cache = make_prompt_cache(model)
        model(prompt(6, rows=3), cache=cache)
        mx.eval([c.state for c in cache])
        if on:
            stepping(model)
        logits.append(model(mx.array([[1], [2], [3]]), cache=cache))
    assert same_bits(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_goes_back_and_forth(family, tmp_path, stepping):
    """Prefill, step, stock, trim, save, load: always the cache that stock would have."""
    model = tiny(family)
    ids = prompt(7)

    def run(switch: bool) -> list[mx.array]:
        cache = make_prompt_cache(model)
        found = [model(ids, cache=cache)]
        if switch:
            stepping(model)
        found += [model(mx.array([[t]]), cache=cache) for t in (1, 2, 3)]
        if switch:
            moefuse.unpatch(model)
        found += [model(mx.array([[t]]), cache=cache) for t in (4, 5)]
        trim_prompt_cache(cache, 2)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        if switch:
            stepping(model)
        return [*found, *(model(mx.array([[t]]), cache=cache) for t in (6, 7)), cache[0].state[0]]

    assert all(same_bits(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_copies_of_a_cache_do_not_see_each_others_tokens(stepping):
    model = tiny("qwen")
    cache = make_prompt_cache(model)
    model(prompt(5), cache=cache)
    mx.eval([c.state for c in cache])
    stepping(model)
    other = copy.deepcopy(cache)
    kept = mx.array(cache[0].keys)  # a view of the very buffer
    mx.eval(kept)
    before = bits(kept).copy()
    first = model(mx.array([[1]]), cache=cache)
    model(mx.array([[2]]), cache=other)
    trim_prompt_cache(cache, 1)
    assert same_bits(model(mx.array([[1]]), cache=cache), first)
    assert (bits(kept) == before).all()


def test_one_shared_array_of_a_long_cache_is_replaced_by_one_as_long(stepping):
    model = tiny("qwen")
    cache = make_prompt_cache(model)
    model(prompt(5), cache=cache)
    longer = [(0, 0), (0, 0), (0, 900 - cache[0].keys.shape[2]), (0, 0)]
    for c in cache:
        c.keys, c.values = mx.pad(c.keys, longer), mx.pad(c.values, longer)
        mx.eval(c.keys, c.values)
    same = copy.deepcopy(cache)
    want = model(mx.array([[1]]), cache=same)
    stepping(model)
    kept = mx.array(cache[-1].values)
    mx.eval(kept)
    assert same_bits(model(mx.array([[1]]), cache=cache), want)
    assert {a.shape[2] for c in cache for a in (c.keys, c.values)} == {900}
    assert not (bits(kept) == bits(cache[-1].values)).all()  # the token went elsewhere


def test_caches_that_grow_lie_twice_in_memory_for_a_lot_at_a_time(monkeypatch):
    shape, layers = (1, 4, 2048, 64), 16  # a megabyte an array
    caches = [KVCache() for _ in range(layers)]
    for c in caches:
        c.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
        mx.eval(c.keys, c.values)
    before = [(bits(c.keys), bits(c.values)) for c in caches]
    array = caches[0].keys.nbytes
    monkeypatch.setattr(step, "GROWN_AT_ONCE", 3 * array)
    mx.clear_cache()
    mx.reset_peak_memory()
    step._make_room(caches, 1, (4, 64, 64), mx.float32)
    mx.eval([(c.keys, c.values) for c in caches])  # all of it is done, or all is done here at once
    length = caches[0].keys.shape[2]
    assert length == 2048 + step.GROWTH
    grown = 2 * layers * array * length / 2048
    assert mx.get_peak_memory() - grown < 6 * array  # the lot, and the array that made it full
    for c, (keys, values) in zip(caches, before, strict=True):
        for now, then in ((c.keys, keys), (c.values, values)):
            assert (bits(now)[..., :2048, :] == then).all()
            assert not bits(now)[..., 2048:, :].any()


def test_rotating_and_quantised_caches_and_prompts_fall_back(stepping):
    model = tiny("qwen")
    report = stepping(model)
    rotating = make_prompt_cache(model, max_kv_size=16)
    model(mx.array([[1]]), cache=rotating)
    quantized = [KVCache().to_quantized(group_size=32, bits=8) for _ in model.layers]
    model(mx.array([[1]]), cache=quantized)
    model(prompt(4), cache=make_prompt_cache(model))
    model(prompt(1, rows=9), cache=make_prompt_cache(model))
    model(prompt(1))
    assert report.calls.get("step", 0) == 0
    told = " ".join(report.fallbacks)
    reasons = ("RotatingKVCache", "QuantizedKVCache", "a prompt", "more than 8 rows", "without")
    assert all(reason in told for reason in reasons), told


def test_replaced_weights_are_seen(stepping):
    model = tiny("qwen")
    stepping(model)
    before = decode(model, count=4)
    norm = model.model.norm
    norm.weight = norm.weight * 2
    after = decode(model, count=4)
    moefuse.unpatch(model)
    assert same_decode(decode(model, count=4), after) and not same_decode(before, after)


def test_a_context_past_the_maximum_is_refused_with_both_numbers(stepping):
    model = tiny("qwen", max_position_embeddings=8)
    cache = make_prompt_cache(model)
    model(prompt(8), cache=cache)
    stepping(model)
    with pytest.raises(ValueError, match=r"position: expected 0 to 7, got 8"):
        model(mx.array([[1]]), cache=cache)
    assert cache[0].offset == 8  # nothing was written


def test_a_token_out_of_range_is_refused(stepping):
    model = tiny("qwen")
    cache = make_prompt_cache(model)
    stepping(model)
    with pytest.raises(ValueError, match=r"token: expected 0 to 63, got 64"):
        model(mx.array([[64]]), cache=cache)


def test_unpatch_gives_the_class_back():
    model = tiny("qwen")
    kind = type(model)
    moefuse.patch(model, [], step=True)
    assert type(model) is not kind and isinstance(model, kind)
    moefuse.unpatch(model)
    assert type(model) is kind and "_moefuse_step" not in model.__dict__


def test_the_plan_counts_the_bytes_of_a_token():
    model, _ = load(str(ROOT / "models" / CHECKPOINTS[0]))
    report = moefuse.patch(model, [], step=True)
    stages = report._step.decoder.stages()
    moefuse.unpatch(model)
    layers = [s for s in stages if s["layer"] == 0]
    assert [s["name"] for s in layers] == [
        "qkv", "attention", "output", "router", "experts_gate_up", "experts_down",
    ]  # fmt: skip
    one = 64 * 192 * (0.5 + 4 / 64)  # a 4-bit matrix of an expert, with its scales and biases
    assert layers[4]["weight_bytes"] == 2 * 8 * one and layers[5]["weight_bytes"] == 8 * one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, 'model_type: expected qwen3_moe or glm4_moe_lite, got "llama"'),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok: expected at most the 16 experts"),
        ({"hidden_size": 128}, "embed_tokens bits: expected 4 or 8, got 2"),
        ({"head_dim": -2}, "head_dim: expected an integer from 2 to 4096, got -2"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps: expected a positive number"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(change, message):
    import dataclasses
    import json

    from mlx.utils import tree_flatten

    model = tiny("qwen")
    config = json.dumps({**dataclasses.asdict(model.args), **change})
    with pytest.raises(ValueError, match=message):
        _core.Decoder(config, dict(tree_flatten(model.parameters())), "exact")
