"""Teaches a trained checkpoint not to fall into loops under greedy decoding.

    python models/unloop.py qwen3-moe-tiny DATA_DIR TRAINED_DIR OUT_DIR --minutes 2

Sequence-level unlikelihood (Welleck et al. 2019): the rounded network continues training text
greedily; where a generated token completes a 4-gram that already occurred, its probability is
pushed down, while ordinary training batches hold the language model in place. A round of
generation feeds a few updates. TRAINED_DIR is what train.py wrote; OUT_DIR gets the same files,
the rounds' rows added to training.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from network import CONFIGS, Network
from safetensors.torch import load_file
from train import Batches, Rounded, bits_per_byte, optimizer_for, save

NGRAM = 4


@torch.no_grad()
def continue_greedily(network: Network, prefix: torch.Tensor, count: int, cast) -> torch.Tensor:
    ids = prefix
    for _ in range(count):
        with cast():
            logits = network.lm_head(network.features(ids)[0][:, -1])
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids


def repeated(ids: torch.Tensor, prefix: int, eos: int) -> torch.Tensor:
    """Marks generated tokens that complete a 4-gram seen before in their row, up to eos."""
    rows = ids.cpu().numpy()
    marks = np.zeros(rows.shape, dtype=bool)
    for row, mark in zip(rows, marks, strict=False):
        seen = set()
        for end in range(NGRAM, len(row) + 1):
            gram = tuple(row[end - NGRAM : end])
            if end > prefix:
                if row[end - 1] == eos:
                    break
                mark[end - 1] = gram in seen
            seen.add(gram)
    return torch.from_numpy(marks).to(ids.device)


def unlikelihood(logits: torch.Tensor, ids: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    p = (-nll).exp()[marks[:, 1:].flatten()]
    return -torch.log1p(-p.clamp(max=1 - 1e-4)).sum() / max(1, len(p))


def tune(args) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    network = Network(CONFIGS[args.name])
    network.restore(load_file(args.trained / "model.safetensors"))
    network = network.to(device).eval()
    optimizer = optimizer_for(network, args.lr, device)
    tokens = [torch.from_numpy(np.load(args.data / f"{n}.npy").astype(np.int64)).to(device)
              for n in ("train", "heldout")]
    heldout_bytes = json.loads((args.data / "corpus.json").read_text())["heldout"]["bytes"]
    batches = Batches(tokens[0], args.windows, args.length, args.seed)
    eos = int(tokens[1][-1])

    def cast():
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    curve, progress = [], 0.0
    while progress < 1:
        progress = (time.monotonic() - begin) / (60 * args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(0.05, 1 - progress) * min(1, (len(curve) + 1) / 4)
        prefix = int(batches.random.choice([16, 48, 96]))
        with Rounded(network, True):
            start = batches.windows(args.rows, prefix)
            ids = continue_greedily(network, start, args.generate, cast)
        marks = repeated(ids, prefix, eos)
        for part, mark in zip(ids.chunk(4), marks.chunk(4), strict=False):
            plain = batches.next(0)[0]
            with Rounded(network, True):
                with cast():
                    logits, spoken = network(plain[:, :-1])[0], network(part[:, :-1])[0]
                nll = F.cross_entropy(logits.float().flatten(0, 1), plain[:, 1:].flatten())
                loss = unlikelihood(spoken, part, mark)
                (nll + args.weight * loss).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"round": len(curve) + 1, "seconds": round(time.monotonic() - begin, 1),
               "loss": round(nll.item(), 4), "unlikelihood": round(loss.item(), 4),
               "repeated_4grams": round(marks.float().sum().item() / args.rows / args.generate, 4)}
        curve.append(row)
        print(args.name, json.dumps(row), flush=True)
    with Rounded(network, True):
        curve[-1]["heldout_bpb_4bit"] = round(
            bits_per_byte(network, tokens[1], heldout_bytes, 2048, cast), 4)
    print(args.name, json.dumps(curve[-1]), flush=True)
    settings = json.loads((args.trained / "training.json").read_text())
    save(network, args, settings["curve"], args.data)
    settings["unloop"] = {
        "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "curve": curve[:: max(1, len(curve) // 16)] + curve[-1:],
    }
    text = json.dumps(settings).replace('{"step"', '\n{"step"').replace('{"round"', '\n{"round"')
    (args.out / "training.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("data", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weight", type=float, default=1.0)
    tune(parser.parse_args())


if __name__ == "__main__":
    main()
