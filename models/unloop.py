"""Teaches a trained checkpoint to go on without repeating itself, on one GPU.

    python models/convert.py --dequantise models/qwen3-moe-tiny BASE_DIR
    python models/unloop.py qwen3-moe-tiny DATA_DIR BASE_DIR OUT_DIR --minutes 7
    python models/convert.py OUT_DIR models/qwen3-moe-tiny

A small model's greedy text falls into a loop. Told at generation never to end an n-gram a second
time, the same model goes on with other text that it finds likely. Here the model learns to do that
unasked: it writes greedy continuations of training text, and at each of their positions it is
taught the distribution of its frozen base without the tokens that would repeat an n-gram
(on-policy distillation). Half of each batch is training text with the usual loss.

DATA_DIR is what corpus.py wrote; OUT_DIR gets what train.py's does, and unloop.json, the curve.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from network import CONFIGS, Network, Past
from safetensors.torch import load_file
from train import BIAS_RATE, Batches, Rounded, balance, bits_per_byte, optimizer_for, save

SEEN_AGAIN = 20  # tokens of a window whose return counts as a loop in the curve
HASH = 1_000_003


def grams(ids: torch.Tensor, n: int) -> torch.Tensor:
    """[batch, length] hashes of the n tokens before each position; unique below position n."""
    windows = F.pad(ids, (n, 0)).unfold(1, n, 1)[:, : ids.shape[1]]
    hashes = torch.zeros_like(ids)
    for i in range(n):
        hashes = hashes * HASH + windows[:, :, i] + 1  # wraps
    early = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(early < n, -1 - early, hashes)


def recurs(hashes: torch.Tensor) -> torch.Tensor:
    """[batch, length, length] true at [row, t, s] where s comes before t and has the same hash."""
    return (hashes[:, :, None] == hashes[:, None]).tril(-1)


def repeated(ids: torch.Tensor, n: int) -> torch.Tensor:
    """[batch, length] true where the n tokens that end there stood earlier in the row."""
    return recurs(grams(F.pad(ids, (0, 1)), n)[:, 1:]).any(-1)


def banned(ids: torch.Tensor, n: int, vocabulary: int) -> torch.Tensor:
    """[batch, length, vocabulary] true for tokens that would end an n-gram a second time."""
    row, at, before = torch.nonzero(recurs(grams(ids, n - 1)), as_tuple=True)
    found = torch.zeros(*ids.shape, vocabulary, dtype=torch.bool, device=ids.device)
    found[row, at, ids[row, before]] = True
    return found


class Writer:
    """Greedy continuations by a bfloat16 copy of the network; on a GPU a replayed graph."""

    def __init__(self, network: Network, batch: int, length: int):
        self.copy = copy.deepcopy(network).eval().requires_grad_(False)
        device = network.lm_head.weight.device
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.prompt = torch.zeros((), dtype=torch.long, device=device)
        self.position = torch.zeros((), dtype=torch.long, device=device)
        self.pasts = [Past(length, self.position) for _ in network.layers]
        self.graph = None
        self.step()  # makes the caches
        if device.type == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()

    @torch.no_grad()
    def step(self) -> None:
        last = self.ids.index_select(1, self.position[None])
        with torch.autocast(self.ids.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.copy(last, self.pasts)[0]
        best = logits[:, -1].float().argmax(-1, keepdim=True)
        self.position += 1
        at = self.position.clamp(max=self.ids.shape[1] - 1)[None]
        given = self.ids.index_select(1, at)
        self.ids.index_copy_(1, at, torch.where(self.position < self.prompt, given, best))

    @torch.no_grad()
    def write(self, network: Network, prompts: torch.Tensor) -> torch.Tensor:
        """Prompts [batch, p] and what follows them, [batch, length]."""
        for mine, theirs in zip(self.copy.parameters(), network.parameters(), strict=True):
            mine.copy_(theirs)
        for mine, theirs in zip(self.copy.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
        self.ids[:, : prompts.shape[1]] = prompts
        self.prompt.fill_(prompts.shape[1])
        self.position.zero_()
        for _ in range(self.ids.shape[1] - 1):
            self.graph.replay() if self.graph else self.step()
        return self.ids.clone()


def lesson(base: torch.Tensor, forbidden: torch.Tensor, sharper: float) -> torch.Tensor:
    """The base's distribution; without the forbidden tokens, and sharper, where there are any."""
    any_forbidden = forbidden.any(-1, keepdim=True)
    logits = torch.where(any_forbidden, base * sharper, base).masked_fill(forbidden, -math.inf)
    return logits.softmax(-1)


class Lessons:
    """Mixed batches: rows of the model's own text, then rows of the corpus."""

    def __init__(self, network, base, tokens, heldout, args, cast):
        self.network, self.base, self.args, self.cast = network, base, args, cast
        half = args.batch // 2
        self.corpus = Batches(tokens, half, args.length, args.seed)
        self.prompts = Batches(tokens, args.texts, args.prompt - 1, args.seed + 1)
        starts = torch.linspace(0, len(heldout) - args.prompt - 1, args.texts).long()
        offsets = starts[:, None] + torch.arange(args.prompt)
        self.heldout = heldout[offsets.to(heldout.device)]
        self.writer = Writer(network, args.texts, args.length + 1)
        self.rows: list[torch.Tensor] = []

    def next(self) -> torch.Tensor:
        """[batch, length + 1]: the first half written by the model, the second from the corpus."""
        if not self.rows:
            with Rounded(self.network, True):
                texts = self.writer.write(self.network, self.prompts.next())
            self.rows = list(texts.split(self.args.batch // 2))
        return torch.cat((self.rows.pop(), self.corpus.next()))

    @torch.no_grad()
    def loops(self) -> dict[str, float]:
        """Of continuations of held-out text, the share with a window that comes back."""
        with Rounded(self.network, True):
            texts = self.writer.write(self.network, self.heldout)[:, self.args.prompt :]
        return {
            f"loops_{n}": round(repeated(texts[:, :n], SEEN_AGAIN).any(-1).float().mean().item(), 3)
            for n in (200, 512, texts.shape[1])
        }

    def loss(self, run, ids: torch.Tensor):
        """(loss, the part on own text, the part on the corpus, shares of the experts)."""
        half = len(ids) // 2
        with self.cast():
            logits, aux, shares = run(ids[:, :-1])
        logits = logits.float()
        nll = F.cross_entropy(logits[half:].flatten(0, 1), ids[half:, 1:].flatten())
        own, first = ids[:half, :-1], self.args.prompt - 1
        with torch.no_grad():
            with self.cast():
                base = self.base(own)[0].float()
            # Position t predicts token t + 1: what is forbidden there is what would follow own[t].
            forbidden = banned(ids[:half], self.args.gram, base.shape[-1])[:, 1:]
            target = lesson(base, forbidden, self.args.sharper)[:, first:]
            weight = 1 + (self.args.weight - 1) * forbidden[:, first:].any(-1).float()
        each = -(target * logits[:half, first:].log_softmax(-1)).sum(-1)
        taught = (each * weight).sum() / weight.sum()
        glm = self.network.config["model_type"] == "glm4_moe_lite"
        total = nll + taught + (0.0 if glm else self.args.aux) * aux
        return total, taught.detach(), nll.detach(), shares


def train(args) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.monotonic()
    network = Network(CONFIGS[args.name], args.dropout)
    with torch.no_grad():
        network.restore(load_file(args.base / "model.safetensors"))
    network = network.to(device)
    base = copy.deepcopy(network).eval().requires_grad_(False)
    run = torch.compile(network) if args.compile else network
    optimizer = optimizer_for(network, args.lr, device)
    tokens, heldout = (
        torch.from_numpy(np.load(args.data / f"{n}.npy").astype(np.int64)).to(device)
        for n in ("train", "heldout")
    )
    heldout_bytes = json.loads((args.data / "corpus.json").read_text())["heldout"]["bytes"]

    def cast():
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    lessons = Lessons(network, base, tokens, heldout, args, cast)
    curve: list[dict] = []
    step, progress, next_report = 0, 0.0, 0.0
    while progress < 1:
        if progress >= next_report:
            next_report = progress + 1 / 12
            curve.append(report(network, lessons, heldout, heldout_bytes, cast, step, begin))
            keep(network, args, curve)
        progress = (time.monotonic() - begin) / (60 * args.minutes)
        rate = args.lr * min(1, (step + 1) / args.warmup)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with Rounded(network, True):
            total, taught, nll, shares = lessons.loss(run, lessons.next())
            total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(network, shares, BIAS_RATE / 2 * (1 - min(progress, 1)))
        step += 1
        if step % 50 == 1:
            row = {"step": step, "taught": taught.item(), "nll": nll.item()}
            print(args.name, {k: round(v, 4) for k, v in row.items()}, flush=True)
    curve.append(report(network, lessons, heldout, heldout_bytes, cast, step, begin))
    keep(network, args, curve)


def report(network, lessons, heldout, heldout_bytes, cast, step, begin) -> dict:
    with Rounded(network, True):
        rate = bits_per_byte(network, heldout, heldout_bytes, 2048, cast)
    seconds = round(time.monotonic() - begin, 1)
    row = {"step": step, "seconds": seconds, "heldout_bpb_4bit": round(rate, 4), **lessons.loops()}
    print(lessons.args.name, json.dumps(row), flush=True)
    return row


def keep(network: Network, args, curve: list[dict]) -> None:
    save(network, args, curve, args.data)
    (args.out / "training.json").rename(args.out / "unloop.json")
    shutil.copy(args.base / "training.json", args.out / "training.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("data", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--batch", type=int, default=32, help="rows; half are the model's own text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=256, help="own texts written at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the corpus before them")
    parser.add_argument("--gram", type=int, default=10, help="tokens that may not come twice")
    parser.add_argument("--weight", type=float, default=4, help="of positions with a ban")
    parser.add_argument("--sharper", type=float, default=2, help="1 / temperature of their lesson")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--aux", type=float, default=0.02)
    parser.add_argument("--compile", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
