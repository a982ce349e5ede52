"""mlx-lm's greedy sampler on CUDA, while a model decodes through the step: the same tokens.

mlx-lm takes mx.argmax, which reads a row of logits with one block of threads there: 23 us of the
1,070 that a token of Qwen3-30B-A3B takes on an H200. sample_greedy() has many blocks.
"""

from __future__ import annotations

import importlib

import mlx.core as mx

from . import _core

_MODULES = ("mlx_lm.sample_utils", "mlx_lm.generate")  # where the sampler is looked up
_stock: dict[str, object] = {}  # module -> its own sampler, while ours stands there
_holders = 0


def greedy_sampler(logprobs: mx.array) -> mx.array:
    """The token of each row of [..., V]: where the largest stands, the first of equal ones."""
    return _core.sample_greedy(logprobs)


def hold() -> bool:
    """Put our sampler in mlx-lm's place until as many release(); False where MLX has no CUDA."""
    global _holders
    if not mx.cuda.is_available():
        return False
    _holders += 1
    for name in _MODULES if _holders == 1 else ():
        module = importlib.import_module(name)
        found = getattr(module, "greedy_sampler", None)
        if getattr(found, "__module__", None) == _MODULES[0]:  # nobody else's
            _stock[name] = found
            module.greedy_sampler = greedy_sampler
    return True


def release() -> None:
    """Take back one hold()."""
    global _holders
    _holders -= 1
    while _holders == 0 and _stock:
        name, found = _stock.popitem()
        importlib.import_module(name).greedy_sampler = found
