"""Greedy text with several tokens on their way: what `moefuse generate` does on CUDA.

A step takes its token from the one before it where that lies in the GPU's memory, and the host
reads tokens in lots, while the next lot is being made. mlx-lm asks MLX for each token apart.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

LOT = 8  # tokens that the host reads together
PREFILL = 2048  # tokens of a prompt at a time, as mlx-lm's


@dataclass
class Said:
    """A piece of text, in the fields that mlx-lm's own stream has."""

    text: str
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None


def serves(model) -> bool:
    """Whether tokens() gains something on this model: it steps on a CUDA device."""
    return mx.cuda.is_available() and hasattr(model, "_moefuse_step")


def tokens(model, prompt: mx.array, count: int) -> Iterator[int]:
    """`count` greedy tokens after `prompt` [length] of a model that decodes through the step.

    Where the largest of the step's logits stands, the first of equal ones: mlx-lm's greedy tokens,
    but that it subtracts the logarithm of the sum first, which can make two logits equal. Raises
    ValueError, after the tokens that there were, where the step cannot go on.
    """
    step, cache = model._moefuse_step, _filled_cache(model, prompt)
    if (refusal := step.refusal(prompt[None, -1:], cache, {})) is not None:
        raise ValueError(f"[ahead] the step does not take this model: {refusal[0]}")
    token, made, waiting, error = prompt[-1:].astype(mx.uint32), 0, [], None
    try:
        while waiting or (made < count and error is None):
            lot = []
            try:
                while made < count and len(lot) < LOT and error is None:
                    token = step.take(token, cache, greedy=True)
                    lot.append(token)
                    made += 1
            except ValueError as refused:  # the end of the model's positions, say
                error = refused
            mx.async_eval(lot)
            for earlier in waiting:
                yield earlier.item()
            waiting = lot
        if error is not None:
            raise error
    finally:
        step.wait()  # the cache lives until the last step has written to it


def stream(model, tokenizer, prompt: str, max_tokens: int) -> Iterator[Said]:
    """mlx_lm.stream_generate's greedy text of a model for which serves() holds."""
    utils = importlib.import_module("mlx_lm.tokenizer_utils")
    if not isinstance(tokenizer, utils.TokenizerWrapper):
        tokenizer = utils.TokenizerWrapper(tokenizer)
    special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
    ids = mx.array(tokenizer.encode(prompt, add_special_tokens=special))
    said, begin, reason, text = 0, 0.0, "length", tokenizer.detokenizer
    for token in tokens(model, ids, max_tokens):
        begin = begin or time.perf_counter()
        said += 1
        if token in tokenizer.eos_token_ids:
            reason = "stop"
            break
        text.add_token(token)
        if said < max_tokens:
            yield Said(text.last_segment, said, said / (time.perf_counter() - begin), None)
    text.finalize()
    yield Said(text.last_segment, said, said / (time.perf_counter() - begin), reason)


def _filled_cache(model, prompt: mx.array):
    """A cache of all tokens but the last, filled in the parts that mlx-lm makes of a prompt."""
    cache = importlib.import_module("mlx_lm.models.cache").make_prompt_cache(model)
    for begin in range(0, prompt.size - 1, PREFILL):
        model(prompt[None, begin : min(begin + PREFILL, prompt.size - 1)], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    return cache
