"""The logits that verdicts rest on: stock, variant and oracle forced through the same tokens.

The oracle is the same checkpoint with every floating parameter in float32, run through stock
mlx-lm: none of our kernels takes part. Tokens are forced one at a time, by the decode path, because
prefill takes other kernels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from . import LabError
from .checkpoint import Checkpoint, load_weights
from .fidelity import CHUNK, Window, matching, window
from .measure import PREFILL_CHUNK, prefill
from .prompts import Prompt

GPU_CHUNK = 7  # prompt tokens at once: from 8 on MLX compiles other float32 kernels there


def forced_logits(
    model, prompt: Sequence[int], tokens: Sequence[int], at: Window, chunk: int = PREFILL_CHUNK
) -> np.ndarray:
    """Logits [count, vocab], float32, for the given window of `tokens` after `prompt`."""
    prefix = [*prompt, *tokens[: at.start]]
    inputs = [prefix[-1], *tokens[at.start : at.start + at.count - 1]]
    cache, _ = prefill(model, prefix, chunk)
    rows = []
    for token in inputs:
        logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        rows.append(np.array(logits))
    return np.stack(rows)


def load_oracle(checkpoint: Checkpoint, model):
    """The float32 reference of a loaded, unpatched `model`, whose codes it shares.

    On CUDA float32 products would be made of TF32's 10 bits; MLX reads its switch once, so the
    process has to be started with it.
    """
    if mx.cuda.is_available() and os.environ.get("MLX_ENABLE_TF32") != "0":
        raise LabError("[fidelity] MLX_ENABLE_TF32: expected 0, for a float32 oracle, got no 0")
    reference = load_weights(checkpoint, lazy=True)  # its arrays are replaced, so never read
    reference.update(tree_map(_widened, model.parameters()))
    mx.eval(reference.parameters())
    return reference


def _widened(a: mx.array) -> mx.array:
    return a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a


class Oracle:
    """Forced logits of stock and oracle, computed once per window; float32 model on demand."""

    def __init__(self, model, checkpoint: Checkpoint, chunk: int = CHUNK):
        self.model, self.checkpoint, self.chunk = model, checkpoint, chunk
        # By window and tokens: a stock that parts from itself has others after a longer run.
        self._seen: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def windows(
        self,
        stock_tokens: Mapping[str, Sequence[int]],
        variant_tokens: Mapping[str, Sequence[int]],
        always: int = 2,
    ) -> dict[str, Window]:
        """Where to force: each prompt that diverged, and the first `always` in any case."""
        found = {}
        for i, (name, tokens) in enumerate(variant_tokens.items()):
            matched = matching(stock_tokens[name], tokens)
            if matched < len(tokens) or i < always:
                found[name] = window(name, matched, len(tokens), self.chunk)
        return found

    def references(
        self,
        prompts: Mapping[str, Prompt],
        tokens: Mapping[str, Sequence[int]],
        windows: Mapping[str, Window],
    ) -> tuple[dict, dict]:
        """(stock logits, oracle logits) by prompt name; the model must be unpatched."""
        keys = {name: (at, tuple(tokens[name][: at.end])) for name, at in windows.items()}
        missing = {name: key for name, key in keys.items() if key not in self._seen}
        reference = load_oracle(self.checkpoint, self.model) if missing else None
        chunk = GPU_CHUNK if mx.default_device().type == mx.gpu else PREFILL_CHUNK
        for name, key in missing.items():
            case = (prompts[name].ids, tokens[name], windows[name])
            self._seen[key] = (
                forced_logits(self.model, *case),
                forced_logits(reference, *case, chunk),
            )
        del reference
        mx.clear_cache()
        stock = {name: self._seen[key][0] for name, key in keys.items()}
        return stock, {name: self._seen[key][1] for name, key in keys.items()}
