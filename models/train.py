"""Trains one of the two small checkpoints on one GPU (or, for a smoke test, on a CPU).

    python models/train.py qwen3-moe-tiny DATA_DIR OUT_DIR --minutes 6

DATA_DIR is what corpus.py wrote. OUT_DIR gets a Hugging Face checkpoint (bfloat16 safetensors,
config.json, tokenizer files) for convert.py, and training.json, the curve. The schedule follows
the wall clock, so a run uses the time it is given; the same seed on another machine takes another
number of steps.

In the last part of the training, weights are rounded as MLX's affine quantisation rounds them, with
the gradient passed straight through, so that the 4-bit checkpoint loses little.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from network import CONFIGS, Network
from safetensors.torch import save_file

BIAS_RATE = 2e-3  # GLM's correction bias, per step


def affine_round(w: torch.Tensor, bits: int) -> torch.Tensor:
    """What MLX's affine quantisation makes of rows of 64 bfloat16 weights ([groups, 64])."""
    levels = 2**bits - 1
    g = w.bfloat16().float()
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    low_is_edge = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp_min(1e-7)
    scale = torch.where(low_is_edge, scale, -scale)
    edge = torch.where(low_is_edge, low, high)
    zero = torch.round(edge / scale)
    scale = torch.where(zero == 0, scale, edge / torch.where(zero == 0, 1.0, zero))
    bias = torch.where(zero == 0, torch.zeros_like(edge), edge)
    scale, bias = scale.bfloat16().float(), bias.bfloat16().float()
    return torch.round((g - bias) / scale).clamp(0, levels) * scale + bias


class Rounded:
    """Within `with`, the network computes with rounded weights; after it, with the true ones."""

    def __init__(self, network: Network, on: bool):
        self.groups = network.matrices() if on else {}

    def __enter__(self) -> None:
        self.saved = []
        for bits, parameters in self.groups.items():
            if not parameters:
                continue
            rows = [p.detach().reshape(-1, 64) for p in parameters]
            rounded = affine_round(torch.cat(rows), bits).split([len(r) for r in rows])
            for p, r in zip(parameters, rounded, strict=False):
                self.saved.append((p, p.detach().clone()))
                p.data.copy_(r.view_as(p))

    def __exit__(self, *_) -> None:
        for p, value in self.saved:
            p.data.copy_(value)


class Batches:
    """Random windows of the training tokens."""

    def __init__(self, tokens: torch.Tensor, batch: int, length: int, seed: int):
        self.tokens, self.batch, self.length = tokens, batch, length
        self.random = np.random.default_rng(seed)

    def next(self) -> torch.Tensor:
        """[batch, length + 1] token ids."""
        starts = self.random.integers(0, len(self.tokens) - self.length - 1, self.batch)
        offsets = torch.from_numpy(starts)[:, None] + torch.arange(self.length + 1)
        return self.tokens[offsets.to(self.tokens.device)]


@torch.no_grad()
def bits_per_byte(network, tokens: torch.Tensor, byte_count: int, length: int, cast) -> float:
    """Held-out bits per byte over consecutive windows, each started without context."""
    network.eval()
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        ids = tokens[start : start + length + 1][None]
        with cast():
            logits = network(ids[:, :-1])[0]
        total += F.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    network.train()
    return total / count / math.log(2) * len(tokens) / byte_count


def optimizer_for(network: Network, rate: float, device: str) -> torch.optim.Optimizer:
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device == "cuda")


def balance(network: Network, shares: torch.Tensor, rate: float) -> None:
    """Moves GLM's correction biases towards an even use of the experts."""
    sparse = [layer.mlp for layer in network.layers if layer.sparse and layer.mlp.glm]
    for mlp, share in zip(sparse, shares, strict=False):
        mlp.correction_bias += rate * torch.sign(share.mean() - share)


def save(network: Network, args, curve: list[dict], data: Path) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(network.checkpoint(), args.out / "model.safetensors", {"format": "pt"})
    config = {**network.config, "torch_dtype": "bfloat16"}
    eos = json.loads((data / "tokenizer/tokenizer.json").read_text())["added_tokens"][0]["id"]
    config.update(eos_token_id=eos, pad_token_id=eos)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in (data / "tokenizer").iterdir():
        shutil.copy(path, args.out / path.name)
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    parameters = sum(p.numel() for p in network.parameters())
    settings |= {"torch": torch.__version__, "parameters": parameters}
    rows = ",\n  ".join(json.dumps(row) for row in curve)
    text = f'{{"settings": {json.dumps(settings)},\n "curve": [\n  {rows}\n ]}}\n'
    (args.out / "training.json").write_text(text)


def train(args) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    network = Network(CONFIGS[args.name], args.dropout).to(device)
    run = torch.compile(network) if args.compile else network
    optimizer = optimizer_for(network, args.lr, device)
    tokens = [
        torch.from_numpy(np.load(args.data / f"{n}.npy").astype(np.int64)).to(device)
        for n in ("train", "heldout")
    ]
    heldout_bytes = json.loads((args.data / "corpus.json").read_text())["heldout"]["bytes"]
    batches = Batches(tokens[0], args.batch, args.length, args.seed)

    def cast():
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    curve: list[dict] = []
    step, progress, next_report = 0, 0.0, 0.0
    while progress < 1:
        progress = (
            step / args.steps if args.steps else (time.monotonic() - begin) / (60 * args.minutes)
        )
        late = progress >= args.late
        rate = args.lr * min(1, (step + 1) / args.warmup)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = batches.next()
        with Rounded(network, late):
            with cast():
                logits, aux, shares = run(ids[:, :-1])
            nll = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            aux_weight = 0.0 if network.config["model_type"] == "glm4_moe_lite" else args.aux
            (nll + aux_weight * aux).backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(network, shares, BIAS_RATE * (1 - min(progress, 1)))
        step += 1
        if progress >= next_report or progress >= 1:
            next_report = progress + 1 / 16
            row = {
                "step": step,
                "seconds": round(time.monotonic() - begin, 1),
                "loss": round(nll.item(), 4),
                "grad_norm": round(norm.item(), 3),
                "lr": round(rate, 7),
                "share_min": round(shares.min().item(), 5),
                "share_max": round(shares.max().item(), 5),
            }
            for key, rounded in (("heldout_bpb", False), ("heldout_bpb_4bit", True)):
                with Rounded(network, rounded):
                    row[key] = round(
                        bits_per_byte(network, tokens[1], heldout_bytes, args.length, cast), 4
                    )
            curve.append(row)
            print(args.name, json.dumps(row), flush=True)
            if args.checkpoint and late:
                save(network, args, curve, args.data)
    save(network, args, curve, args.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--steps", type=int, default=0, help="a fixed number instead of minutes")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--aux", type=float, default=0.02)
    parser.add_argument("--late", type=float, default=0.7, help="progress at which rounding starts")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="save at every late report")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
