"""The whole decode step under mlx-lm: model(inputs, cache) of one token a row in one C++ call.

The step works on the model's own arrays and writes keys and values into the buffers of mlx-lm's own
caches, so that a prompt processed by MLX continues here and back. What it does not take (prompts,
quantised or rotating caches, more rows than it has room for) goes through the stock model, counted.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain, product
from operator import is_

import mlx.core as mx
from mlx.utils import tree_flatten

from . import _core, greedy

log = logging.getLogger("moefuse")

GROWTH = 256  # slots by which a cache grows at least; from there on an eighth of its length
# Bytes of caches that lie twice in memory while they grow. To wait for each array takes a GPU
# three times as long as all of a short cache at once.
GROWN_AT_ONCE = 1 << 27


class Step:
    """What attach() put on a model: counts its calls and fallbacks, and can be taken off."""

    def __init__(self, model, accumulate: str):
        self.model, self.accumulate = model, accumulate
        self.stock = type(model)
        self.calls: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self._told: set[str] = set()
        self._seen: _Snapshot | None = None
        self._decoder, self._refused = None, None
        self.cache_types = _cache_types()
        self._samples = False

    def __deepcopy__(self, memo) -> Step:
        """A copied model gets a step of its own, on its own arrays."""
        copied = Step.__new__(Step)
        copied.__dict__.update(self.__dict__, _seen=None, _decoder=None, _samples=False)
        copied.model = memo.get(id(self.model), self.model)
        return copied

    def unfit(self) -> str | None:
        """Why the model as it is now cannot be stepped, or None; looked at anew when it changed."""
        if self._seen is None or not self._seen.holds():
            self.wait()
            self._decoder, self._refused = None, None
            self._seen = _Snapshot(self.model)
            weights = dict(tree_flatten(self.model.parameters()))
            try:
                self._decoder = _core.Decoder(_config(self.model), weights, self.accumulate)
            except ValueError as refusal:  # an adapter came since the patch, say
                self._refused = str(refusal)
        return self._refused

    @property
    def decoder(self):
        """The C++ decoder of the model's present arrays. Raises ValueError where there is none."""
        if (reason := self.unfit()) is not None:
            raise ValueError(reason)
        return self._decoder

    def wait(self) -> None:
        """Until the caches are written: MLX does not know of the step's writes."""
        if self._decoder is not None:
            self._decoder.wait()

    def detach(self) -> None:
        """Give the model its class back."""
        self.wait()
        self.model.__class__ = self.stock
        del self.model.__dict__["_moefuse_step"]
        self._decoder, self._seen = None, None
        if self._samples:
            self._samples = False
            greedy.release()

    def fell(self, reason: str, expected: bool = False) -> None:
        text = f"step: {reason}"
        self.fallbacks[text] += 1
        if text not in self._told:
            self._told.add(text)
            level = logging.INFO if expected else logging.WARNING
            log.log(level, "stock path instead of the fused one: %s", text)

    def take(self, tokens, cache, greedy: bool = False) -> mx.array:
        """One step of a call that refusal() has nothing against: logits [rows, vocab_size].

        tokens: [rows]. greedy: the next tokens [rows] in their place.
        """
        decoder, rows = self._decoder, _rows([0] * tokens.size, cache[0])
        _make_room(cache, len(rows), decoder.cache_shape, decoder.dtype)
        call = decoder.greedy if greedy else decoder.step
        made = call(rows, [c.keys for c in cache], [c.values for c in cache], tokens)
        _advance(cache, rows)
        self.calls["step"] += 1
        return made

    def refusal(self, inputs, cache, extra) -> tuple[str, bool] | None:
        """Why a call is not the step's, and whether that is a part of normal use."""
        if self.model.training:
            return "training mode", True
        if extra:
            return f"called with {', '.join(sorted(extra))}", False
        if cache is None:
            return "called without a cache", True
        if inputs.ndim != 2 or inputs.shape[1] != 1:
            return "more than one token a row (a prompt)", True
        if inputs.shape[0] > _core.MAX_ROWS:
            return f"more than {_core.MAX_ROWS} rows", False
        if not _core.has_executor():
            return "no executor for this device", False
        for c in cache:
            if type(c) not in self.cache_types:
                return f"a {type(c).__name__}", False
        reason = self.unfit()
        return None if reason is None else (reason, False)


def _cache_types() -> tuple[type, ...]:
    caches = importlib.import_module("mlx_lm.models.cache")
    return caches.KVCache, caches.BatchKVCache


def _config(model) -> str:
    """config.json's text again, from mlx-lm's own arguments of the model."""
    return json.dumps(dataclasses.asdict(model.args))


class _Snapshot:
    """Every module and array of a model, to see cheaply whether one was replaced, added or lost."""

    def __init__(self, model):
        self.modules, self.lists = [], []
        todo = [model]
        while todo:
            found = todo.pop()
            inside = found.values() if isinstance(found, dict) else found
            (self.modules if isinstance(found, dict) else self.lists).append(found)
            todo += [value for value in inside if isinstance(value, (dict, list, tuple))]
        self.kept = list(self._values())

    def _values(self) -> Iterator:
        return chain.from_iterable(chain(map(dict.values, self.modules), self.lists))

    def holds(self) -> bool:
        size = sum(map(len, self.modules)) + sum(map(len, self.lists))
        return size == len(self.kept) and all(map(is_, self._values(), self.kept))


def _filled(cache) -> int:
    """Slots in use: the next token's slot."""
    return cache._idx if hasattr(cache, "_idx") else cache.offset


def _make_room(caches, rows: int, shape: tuple[int, int, int], dtype) -> None:
    """Arrays that nobody else shares, all of one length, with a free slot."""
    filled, (heads, *dims) = _filled(caches[0]), shape
    length = 0 if caches[0].keys is None else caches[0].keys.shape[2]
    if length <= filled:
        length = filled // GROWTH * GROWTH + max(GROWTH, filled // 8 // GROWTH * GROWTH)
    grown: list[mx.array] = []
    for cache, (name, dim) in product(caches, zip(("keys", "values"), dims, strict=True)):
        array = getattr(cache, name)
        if array is not None and array.shape[2] == length and _core.writable(array):
            continue
        empty = mx.zeros((rows, heads, length - filled, dim), dtype)
        old = [] if array is None else [array[..., :filled, :]]
        del array
        grown.append(mx.concatenate([*old, empty], axis=2))
        setattr(cache, name, grown[-1])
        if sum(a.nbytes for a in grown) > GROWN_AT_ONCE:
            mx.eval(grown)
            grown.clear()
    if grown:  # hardly a token needs room
        mx.eval(grown)


def _rows(tokens: list[int], cache) -> list[tuple[int, int, int, int, int]]:
    """(token, sequence, position, first, slot) of each row."""
    slot = _filled(cache)
    if hasattr(cache, "_idx"):
        firsts, positions = cache.left_padding.tolist(), cache.offset.tolist()
    else:
        firsts, positions = [0] * len(tokens), [slot] * len(tokens)
    return [(token, row, positions[row], firsts[row], slot) for row, token in enumerate(tokens)]


def _advance(caches, rows: list[tuple[int, int, int, int, int]]) -> None:
    for c in caches:
        if hasattr(c, "_idx"):
            c._idx += 1
            c.offset = mx.array([position + 1 for _, _, position, _, _ in rows])
        else:
            c.offset += 1


def _call(model, inputs, cache=None, **extra):
    """__call__ of a stepping model."""
    step: Step = model._moefuse_step
    extra = {name: value for name, value in extra.items() if value is not None}
    if (refusal := step.refusal(inputs, cache, extra)) is not None:
        step.fell(*refusal)
        step.wait()
        return step.stock.__call__(model, inputs, cache, **extra)
    return mx.expand_dims(step.take(inputs.reshape(-1), cache), 1)


def attach(model, accumulate: str) -> Step:
    """Make `model` decode through the step until detach().

    accumulate: "exact", "fp32_no_fma" or "fp32". Raises ValueError naming the tensor or field that
    the step cannot take; the model is unchanged then.
    """
    step = Step(model, accumulate)
    step.decoder  # noqa: B018 - refuses what it cannot take before anything changes
    names = {"__call__": _call, "__module__": step.stock.__module__, "__doc__": step.stock.__doc__}
    model._moefuse_step = step
    model.__class__ = type(step.stock.__name__, (step.stock,), names)
    step._samples = greedy.hold()
    return step
