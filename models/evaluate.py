"""What models/README.md reports, measured on the quantised checkpoints through plain mlx-lm.

    python models/evaluate.py models/qwen3-moe-tiny [--bytes 60000]

Prints held-out bits per byte beside `xz -9e` on the whole held-out text, and writes the share of
tokens that each expert of each layer received to expert_usage.json in the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

HELDOUT = Path(__file__).parent / "heldout.txt"


def xz_bits_per_byte(data: bytes) -> float:
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def bits_per_byte(model, tokenizer, text: str, window: int = 1024) -> float:
    """Bits per byte of text; windows do not overlap, and the first follows an eos token."""
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    nats = 0.0
    for start in range(0, len(ids) - 1, window):
        part = mx.array(ids[start : start + window + 1])[None]
        logits = model(part[:, :-1]).astype(mx.float32)
        nats += nn.losses.cross_entropy(logits, part[:, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def count_experts(model) -> dict[int, np.ndarray]:
    """Makes every MoE layer count the experts it calls; layer -> counts, filled as it runs."""
    counts = {}

    class Counting(nn.Module):
        def __init__(self, inner, layer):
            super().__init__()
            self.inner, self.layer = inner, layer

        def __call__(self, x, indices):
            np.add.at(counts[self.layer], np.array(indices).ravel(), 1)
            return self.inner(x, indices)

    for i, layer in enumerate(model.layers):
        if "switch_mlp" in layer.mlp:
            experts = layer.mlp.switch_mlp.up_proj.weight.shape[0]
            counts[i] = np.zeros(experts, dtype=np.int64)
            layer.mlp.switch_mlp = Counting(layer.mlp.switch_mlp, i)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bytes", type=int, default=0, help="of the held-out text; 0: all of it")
    args = parser.parse_args()
    model, tokenizer = load(str(args.model))
    whole = HELDOUT.read_bytes()
    text = whole[: args.bytes or None].decode("utf-8", "ignore")
    counts = count_experts(model)
    rate = bits_per_byte(model, tokenizer, text)
    print(
        f"{args.model.name}: {rate:.4f} bits per byte over {len(text.encode())} bytes; "
        f"xz -9e on all {len(whole)}: {xz_bits_per_byte(whole):.4f}"
    )
    for layer, count in counts.items():
        share = count / count.sum()
        print(
            f"layer {layer}: min {share.min():.4f} median {np.median(share):.4f} "
            f"max {share.max():.4f} of {1 / len(share):.4f}"
        )
    usage = {
        "heldout_bytes": len(text.encode()),
        "bits_per_byte": round(rate, 4),
        "calls": {str(k): v.tolist() for k, v in counts.items()},
    }
    (args.model / "expert_usage.json").write_text(json.dumps(usage) + "\n")


if __name__ == "__main__":
    main()
