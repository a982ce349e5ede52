"""Turns a trained checkpoint into what models/ holds: mlx_lm.convert, 4 bits, groups of 64.

    python models/convert.py TRAINED_DIR models/qwen3-moe-tiny

The way back, in float32, for unloop.py:

    python models/convert.py --dequantise models/qwen3-moe-tiny OUT_DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx_lm import convert


def dequantise(quantised: Path, out: Path) -> None:
    """Every tensor in float32 under its own name, for unloop.py."""
    settings = json.loads((quantised / "config.json").read_text())["quantization"]
    tensors = mx.load(str(quantised / "model.safetensors"))
    plain = {}
    for name, tensor in tensors.items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" in tensors:
            bits = settings.get(base, settings)["bits"]
            scales, biases = (
                tensors[f"{base}.{n}"].astype(mx.float32) for n in ("scales", "biases")
            )
            plain[name] = mx.dequantize(tensor, scales, biases, 64, bits)
        elif not name.endswith((".scales", ".biases")):
            plain[name] = tensor.astype(mx.float32)
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), plain)
    shutil.copy(quantised / "training.json", out / "training.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dequantise", action="store_true")
    args = parser.parse_args()
    if args.dequantise:
        return dequantise(args.trained, args.out)
    convert(
        str(args.trained), str(args.out), quantize=True, q_group_size=64, q_bits=4, dtype="bfloat16"
    )
    for record in args.trained.glob("*.json"):
        if record.name in ("training.json", "unloop.json"):
            shutil.copy(record, args.out / record.name)
    # transformers 5 writes its own class name; this one also loads in transformers 4.
    path = args.out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
