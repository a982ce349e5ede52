"""Turns a trained checkpoint into what models/ holds: mlx_lm.convert, 4 bits, groups of 64.

python models/convert.py TRAINED_DIR models/qwen3-moe-tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mlx_lm import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert(
        str(args.trained), str(args.out), quantize=True, q_group_size=64, q_bits=4, dtype="bfloat16"
    )
    shutil.copy(args.trained / "training.json", args.out / "training.json")
    # transformers 5 writes its own class name; this one also loads in transformers 4.
    path = args.out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
