"""Greedy decode of a model's geometry in PyTorch: random bfloat16 weights, one CUDA graph a step.

    python benchmarks/peers/torch_decode.py qwen3-30b-a3b --contexts 1024 --batches 1,4 --json FILE
    python benchmarks/peers/torch_decode.py --check      # small geometries beside plain loops

What PyTorch makes of the same layers by itself: products by cuBLAS, caches of fixed length, no
host between two steps. The chosen experts are read in each way that PyTorch has (`--experts`) and
the fastest is the anchor:
  grouped  grouped_mm over rows sorted by expert
  gather   the chosen matrices copied together, then bmm
  fused    one product and sum over indexed weights, which only torch.compile makes one kernel of
With --compile the layers go through torch.compile (one compilation a kind of layer) before the
whole step is captured. Weights are bfloat16, so a token reads four times what 4 bits take: the
share of the read ceiling is the figure to compare. The geometry is `moefuse synth --like`'s.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

SYNTH = Path(__file__).parents[2] / "python" / "moefuse" / "lab" / "synth.py"
WAYS = ("grouped", "gather", "fused")
SMALL = {
    "qwen3-30b-a3b": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 16,
        "num_key_value_heads": 2, "num_experts": 12, "num_experts_per_tok": 4,
        "moe_intermediate_size": 32, "vocab_size": 96,
    },
    "glm-4.7-flash": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 48,
        "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 24,
        "n_routed_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
        "intermediate_size": 96, "vocab_size": 96,
    },
}  # fmt: skip


def geometry(name: str, **other) -> dict:
    """The config that `moefuse synth --like NAME` writes, read without importing MLX."""
    body = ast.parse(SYNTH.read_text(encoding="utf-8")).body
    assigned = (n for n in body if isinstance(n, ast.Assign))
    table = next(n for n in assigned if ast.unparse(n.targets[0]) == "LIKE")
    config = {**ast.literal_eval(table.value)[name], **other}
    config["experts"] = config.get("num_experts") or config["n_routed_experts"]
    config["latent"] = "kv_lora_rank" in config
    return config


def shapes(c: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a layer; what reads the same row is one matrix."""
    hidden, heads, width = c["hidden_size"], c["num_attention_heads"], c["moe_intermediate_size"]
    found = {"norm_1": (hidden,), "norm_2": (hidden,)}
    if c["latent"]:
        q, latent, pe = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
        nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
        found |= {"a": (q + latent + pe, hidden), "q_norm": (q,), "kv_norm": (latent,)}
        found |= {"q_b": (heads * (nope + pe), q), "embed": (heads, latent, nope)}
        found |= {"unembed": (heads, value, latent), "o": (hidden, heads * value)}
    else:
        size, kv = c["head_dim"], c["num_key_value_heads"]
        found |= {"qkv": ((heads + 2 * kv) * size, hidden), "q_norm": (size,), "k_norm": (size,)}
        found |= {"o": (hidden, heads * size)}
    if layer < c.get("first_k_dense_replace", 0):
        dense = c["intermediate_size"]
        return found | {"dense_up": (2 * dense, hidden), "dense_down": (hidden, dense)}
    found |= {"router": (c["experts"], hidden)}
    found |= {"up": (c["experts"], 2 * width, hidden), "down": (c["experts"], hidden, width)}
    if c["latent"]:
        found |= {"bias": (c["experts"],)}
        found |= {"shared_up": (2 * width, hidden), "shared_down": (hidden, width)}
    return found


def drawn(name: str, shape: tuple[int, ...], device, dtype) -> torch.Tensor:
    if name == "bias":
        return torch.empty(shape, device=device).uniform_(-0.1, 0.1)
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, shape[-1] ** -0.5)


def rotated(x, cos, sin, halves: bool):
    """Rotary positions on the last axis: pairs are halves (Qwen) or neighbours (GLM)."""
    y = x.float()
    a, b = y.chunk(2, -1) if halves else (y[..., ::2], y[..., 1::2])
    pair = (a * cos - b * sin, b * cos + a * sin)
    return (torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)).to(x.dtype)


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def attend(q, keys, values, mask, scale: float):
    """q [n, rows, d] over keys [n, length, d]: products and a softmax in float32."""
    scores = torch.bmm(q, keys.transpose(1, 2)).float() * scale + mask
    return torch.bmm(torch.softmax(scores, -1).to(q.dtype), values)


def attention(c: dict, w: dict, cache: tuple, h, at: dict):
    """Grouped-query attention; h [rows, hidden] -> [rows, hidden]. The caches grow in place."""
    rows, size = h.shape[0], c["head_dim"]
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    mixed = F.linear(h, w["qkv"]).view(rows, heads + 2 * kv, size)
    q, k, v = mixed.split((heads, kv, kv), 1)
    eps = c["rms_norm_eps"]
    q = rotated(F.rms_norm(q, (size,), w["q_norm"], eps), at["cos"], at["sin"], True)
    k = rotated(F.rms_norm(k, (size,), w["k_norm"], eps), at["cos"], at["sin"], True)
    keys, values = cache  # [rows, kv, length, size]
    keys[:, :, at["place"]] = k[:, :, None]
    values[:, :, at["place"]] = v[:, :, None]
    grouped = q.reshape(rows * kv, heads // kv, size)
    out = attend(grouped, keys.flatten(0, 1), values.flatten(0, 1), at["mask"], size**-0.5)
    return F.linear(out.reshape(rows, -1), w["o"])


def latent_attention(c: dict, w: dict, cache: tuple, h, at: dict):
    """Absorbed latent attention: all heads read one cache of latents beside rotated keys."""
    rows, heads, eps = h.shape[0], c["num_attention_heads"], c["rms_norm_eps"]
    q_rank, latent, pe = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope = c["qk_nope_head_dim"]
    q, kv, k_pe = F.linear(h, w["a"]).split((q_rank, latent, pe), -1)
    q = F.linear(F.rms_norm(q, (q_rank,), w["q_norm"], eps), w["q_b"]).view(rows, heads, -1)
    q_pe = rotated(q[..., nope:], at["cos"], at["sin"], False)
    k_pe = rotated(k_pe, at["cos"], at["sin"], False)
    kv = F.rms_norm(kv, (latent,), w["kv_norm"], eps)
    q = torch.bmm(q[..., :nope].transpose(0, 1), w["embed"].transpose(1, 2)).transpose(0, 1)
    (cached,) = cache  # [rows, length, latent + pe]
    cached[:, at["place"]] = torch.cat((kv, k_pe), -1)[:, None]
    q = torch.cat((q, q_pe), -1)
    out = attend(q, cached, cached[..., :latent], at["mask"], (nope + pe) ** -0.5)
    out = torch.bmm(out.transpose(0, 1), w["unembed"].transpose(1, 2)).transpose(0, 1)
    return F.linear(out.reshape(rows, -1), w["o"])


def route(c: dict, w: dict, h):
    """Chosen experts and their weights, both [rows, top_k]."""
    logits, k = F.linear(h, w["router"]).float(), c["num_experts_per_tok"]
    if not c["latent"]:
        scores, chosen = torch.softmax(logits, -1).topk(k)
        return chosen, scores / scores.sum(-1, keepdim=True)
    scores = torch.sigmoid(logits)
    chosen = (scores + w["bias"]).topk(k).indices
    scores = scores.gather(1, chosen)
    return chosen, scores / scores.sum(-1, keepdim=True) * c["routed_scaling_factor"]


def grouped(w: dict, x, chosen):
    """Rows of the same expert lie together; offsets say where each expert's end."""
    flat = chosen.flatten()
    order = flat.argsort()
    experts = torch.arange(w["up"].shape[0], device=flat.device)
    ends = (flat[:, None] <= experts).sum(0, dtype=torch.int32)
    rows = x[order // chosen.shape[1]]
    up = F.grouped_mm(rows, w["up"].transpose(1, 2), offs=ends)
    down = F.grouped_mm(swiglu(up), w["down"].transpose(1, 2), offs=ends)
    return torch.empty_like(down).index_copy_(0, order, down)


def gather(w: dict, x, chosen):
    flat = chosen.flatten()
    rows = x.repeat_interleave(chosen.shape[1], 0)[..., None]
    up = torch.bmm(w["up"][flat], rows)[..., 0]
    return torch.bmm(w["down"][flat], swiglu(up)[..., None])[..., 0]


def fused(w: dict, x, chosen):
    flat = chosen.flatten()
    rows = x.repeat_interleave(chosen.shape[1], 0)
    up = (w["up"][flat].float() * rows[:, None].float()).sum(-1).to(x.dtype)
    return (w["down"][flat].float() * swiglu(up)[:, None].float()).sum(-1).to(x.dtype)


EXPERTS = {"grouped": grouped, "gather": gather, "fused": fused}


def feed_forward(c: dict, w: dict, h, way: str, seen: list | None):
    if "dense_up" in w:
        return F.linear(swiglu(F.linear(h, w["dense_up"])), w["dense_down"])
    chosen, scores = route(c, w, h)
    if seen is not None:
        seen.append(chosen)
    y = EXPERTS[way](w, h, chosen).view(*chosen.shape, -1)
    y = (y.float() * scores[..., None]).sum(1).to(h.dtype)
    if "shared_up" in w:
        y = y + F.linear(swiglu(F.linear(h, w["shared_up"])), w["shared_down"])
    return y


class Decoder:
    """Weights, caches of `length` positions and the step for `rows` rows."""

    def __init__(self, config: dict, device, dtype):
        self.c, self.device, self.dtype = config, device, dtype
        self.layers = [
            {n: drawn(n, s, device, dtype) for n, s in shapes(config, i).items()}
            for i in range(config["num_hidden_layers"])
        ]
        table = (config["vocab_size"], config["hidden_size"])
        self.embedding = torch.empty(table, device=device, dtype=dtype).normal_()
        self.head = drawn("head", table, device, dtype)
        self.norm = drawn("norm", table[1:], device, dtype)
        self.layer = self._layer
        self.seen: list | None = None  # the experts of every layer, where they are wanted

    def begin(self, rows: int, length: int, context: int) -> None:
        """Caches of random numbers for `rows` rows, `context` of whose positions are in use."""
        c, make = self.c, {"device": self.device, "dtype": self.dtype}
        if c["latent"]:
            parts = [(rows, length, c["kv_lora_rank"] + c["qk_rope_head_dim"])]
            size = c["qk_rope_head_dim"]
        else:
            parts = [(rows, c["num_key_value_heads"], length, c["head_dim"])] * 2
            size = c["head_dim"]
        self.caches = [tuple(torch.empty(p, **make).normal_() for p in parts) for _ in self.layers]
        rates = c["rope_theta"] ** (-torch.arange(0, size, 2, device=self.device) / size)
        angles = torch.arange(length, device=self.device)[:, None] * rates
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.arange(length, device=self.device)
        self.place = torch.zeros(1, dtype=torch.long, device=self.device)
        self.token = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.restart(context)

    def restart(self, context: int) -> None:
        self.place.fill_(context)
        self.token.copy_(torch.arange(1, len(self.token) + 1))

    def _layer(self, w: dict, cache: tuple, x, at: dict, way: str, seen: list | None):
        shape, eps = x.shape[-1:], self.c["rms_norm_eps"]
        look = latent_attention if self.c["latent"] else attention
        x = x + look(self.c, w, cache, F.rms_norm(x, shape, w["norm_1"], eps), at)
        return x + feed_forward(self.c, w, F.rms_norm(x, shape, w["norm_2"], eps), way, seen)

    def step(self, way: str, layers: int | None = None) -> torch.Tensor:
        """One greedy token a row; everything that changes is on the device. -> logits"""
        hidden = (self.positions > self.place).float() * -1e30
        at = {"place": self.place, "mask": hidden}
        at |= {"cos": self.cos[self.place], "sin": self.sin[self.place]}
        x = self.embedding[self.token]
        for w, cache in zip(self.layers[:layers], self.caches, strict=False):
            x = self.layer(w, cache, x, at, way, self.seen)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.c["rms_norm_eps"])
        logits = F.linear(x, self.head)
        self.token.copy_(logits.argmax(-1))
        self.place.add_(1)
        return logits

    def captured(self, way: str, layers: int | None = None) -> tuple:
        """(a CUDA graph of the step, the logits that it leaves)"""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                self.step(way, layers)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(way, layers)
        return graph, logits

    def bytes_read(self, rows: int, context: int, way: str) -> int:
        """Bytes of weights and caches that a step at `context` has to read once, at least."""
        self.seen = []
        self.restart(context)
        layer, self.layer = self.layer, self._layer
        self.step("gather" if way == "fused" else way)
        self.layer, seen = layer, iter(self.seen)
        self.seen = None
        total = sum(t.nbytes for t in (self.head, self.norm)) + rows * self.embedding[0].nbytes
        for w, cache in zip(self.layers, self.caches, strict=True):
            distinct = next(seen).unique().numel() if "router" in w else 0
            for name, tensor in w.items():
                chosen = distinct if name in ("up", "down") else len(tensor)
                total += chosen * tensor[0].nbytes
            total += sum(t.nbytes // len(self.positions) * context for t in cache)
        return total


def milliseconds(graph, tokens: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(tokens):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / tokens


def read_rate() -> float:
    """Bytes a second of the fastest plain reduction over 4 GiB."""
    words = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    best = math.inf
    for reduce in (torch.sum, torch.amax):
        reduce(words)
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(8):
                reduce(words)
            end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 8)
    return words.nbytes / best * 1e3


def timed(decoder: Decoder, way: str, context: int, tokens: int, repeats: int, layers=None):
    """ms a step of every repetition, from the same place each time."""
    decoder.restart(context)
    graph, logits = decoder.captured(way, layers)
    found = []
    for _ in range(repeats + 1):
        decoder.restart(context)
        found.append(milliseconds(graph, tokens))
    if not torch.isfinite(logits).all():
        raise RuntimeError(f"{way}: expected finite logits")
    return found[1:]


def cell(decoder: Decoder, context: int, rows: int, chosen: argparse.Namespace, ceiling: float):
    """Each way of the experts timed at a context and batch; the fastest is the anchor."""
    real = chosen.real_layers
    decoder.begin(rows, context + chosen.tokens + 8, context)
    found = {"context": context, "batch": rows, "ms": {}, "failed": {}}
    for way in chosen.experts:
        begin = time.perf_counter()
        try:
            ms = timed(decoder, way, context, chosen.tokens, chosen.repeats)
        except RuntimeError as error:  # a way that this PyTorch or card does not have
            found["failed"][way] = str(error).splitlines()[0][:200]
            print(f"  {way}: {found['failed'][way]}", flush=True)
            continue
        found["ms"][way] = ms
        seconds = time.perf_counter() - begin
        print(f"  {way}: {statistics.median(ms):.3f} ms a step ({seconds:.0f} s)", flush=True)
    if not found["ms"]:
        return found
    best = min(found["ms"], key=lambda way: statistics.median(found["ms"][way]))
    ms = statistics.median(found["ms"][best])
    size = decoder.bytes_read(rows, context, best)
    found |= {"experts": best, "ms_per_step": ms, "tok_s": rows * 1e3 / ms}
    found |= {"bytes_per_step": size, "share_of_read": size / (ms * 1e-3) / ceiling}
    if real != len(decoder.layers):  # what is not a layer is measured alone
        rest = statistics.median(timed(decoder, best, context, chosen.tokens, 3, 0))
        found["ms_without_layers"] = rest
        whole = rest + (ms - rest) / len(decoder.layers) * real
        found |= {"scaled_layers": real, "scaled_tok_s": rows * 1e3 / whole}
    shown = {k: v for k, v in found.items() if k != "ms"}
    print(json.dumps(shown), flush=True)
    return found


def reference(decoder: Decoder, row: int, fed: list[int]) -> torch.Tensor:
    """Logits of the last of the tokens `fed`, in plain float32 loops over heads and experts."""
    c, past = decoder.c, [[] for _ in decoder.layers]
    for place, token in enumerate(fed):
        x = decoder.embedding[token].float()
        for w, seen in zip(decoder.layers, past, strict=True):
            w = {n: t.float() for n, t in w.items()}
            h = F.rms_norm(x, x.shape, w["norm_1"], c["rms_norm_eps"])
            look = _latent_loop if c["latent"] else _grouped_loop
            x = x + w["o"] @ look(c, w, h, place, seen)
            x = x + _experts_loop(c, w, F.rms_norm(x, x.shape, w["norm_2"], c["rms_norm_eps"]))
    return decoder.head.float() @ F.rms_norm(x, x.shape, decoder.norm.float(), c["rms_norm_eps"])


def _turned(x, place: int, theta: float, halves: bool):
    out, n = x.clone(), len(x)
    for i in range(n // 2):
        a, b = (i, i + n // 2) if halves else (2 * i, 2 * i + 1)
        angle = place * theta ** (-2 * i / n)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def _look(q, keys: list, values: list):
    scores = torch.stack([q @ k for k in keys]) / math.sqrt(len(q))
    return sum(p * v for p, v in zip(torch.softmax(scores, 0), values, strict=True))


def _grouped_loop(c: dict, w: dict, h, place: int, seen: list):
    heads, kv, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    mixed = (w["qkv"] @ h).view(-1, size)

    def placed(x, norm):
        x = F.rms_norm(x, x.shape, norm, c["rms_norm_eps"])
        return _turned(x, place, c["rope_theta"], True)

    keys = [placed(mixed[heads + i], w["k_norm"]) for i in range(kv)]
    seen.append((keys, mixed[heads + kv :]))
    out = []
    for head in range(heads):
        own = head * kv // heads
        pairs = [(k[own], v[own]) for k, v in seen]
        out.append(_look(placed(mixed[head], w["q_norm"]), *zip(*pairs, strict=True)))
    return torch.cat(out)


def _latent_loop(c: dict, w: dict, h, place: int, seen: list):
    """Not absorbed: each head's own keys and values are made of the latents."""
    q_rank, latent, nope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_nope_head_dim"]
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    mixed = w["a"] @ h
    kv = F.rms_norm(mixed[q_rank : q_rank + latent], (latent,), w["kv_norm"], eps)
    seen.append((kv, _turned(mixed[q_rank + latent :], place, theta, False)))
    q = w["q_b"] @ F.rms_norm(mixed[:q_rank], (q_rank,), w["q_norm"], eps)
    out = []
    for head, own in enumerate(q.view(c["num_attention_heads"], -1)):
        own = torch.cat((own[:nope], _turned(own[nope:], place, theta, False)))
        keys = [torch.cat((w["embed"][head].T @ kv, pe)) for kv, pe in seen]
        out.append(_look(own, keys, [w["unembed"][head] @ kv for kv, _ in seen]))
    return torch.cat(out)


def _experts_loop(c: dict, w: dict, h):
    if "dense_up" in w:
        return w["dense_down"] @ swiglu(w["dense_up"] @ h)
    logits = w["router"] @ h
    scores = torch.sigmoid(logits) if c["latent"] else torch.softmax(logits, 0)
    by = scores + w["bias"] if c["latent"] else scores
    chosen = sorted(range(len(by)), key=lambda e: -float(by[e]))[: c["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) / c.get("routed_scaling_factor", 1.0)
    y = sum(scores[e] / total * (w["down"][e] @ swiglu(w["up"][e] @ h)) for e in chosen)
    return y + w["shared_down"] @ swiglu(w["shared_up"] @ h) if c["latent"] else y


def check_decoder(name: str, way: str, device: str, steps: int = 6, rows: int = 2) -> float:
    """Relative error of the last step's logits against the loops, from position 0, in float32;
    on a GPU by a captured graph."""
    torch.manual_seed(0)
    decoder = Decoder(geometry(name, **SMALL[name]), device, torch.float32)
    decoder.begin(rows, 16, 0)
    fed: list[list[int]] = [[] for _ in range(rows)]
    graph, logits = decoder.captured(way) if device == "cuda" else (None, None)
    decoder.restart(0)
    for _ in range(steps):
        for row, token in enumerate(decoder.token.tolist()):
            fed[row].append(token)
        if graph:
            graph.replay()
        else:
            logits = decoder.step(way)
    truth = torch.stack([reference(decoder, row, fed[row]) for row in range(rows)])
    return float((logits - truth).norm() / truth.norm())


def check_grouped(device: str) -> float:
    """grouped_mm in bfloat16, all that it takes on a GPU, against `gather` in float32."""
    w = {"up": (12, 64, 64), "down": (12, 64, 32)}
    w = {n: drawn(n, s, device, torch.bfloat16) for n, s in w.items()}
    x = torch.randn(3, 64, device=device).bfloat16()
    chosen = torch.stack([torch.randperm(12)[:4] for _ in range(3)]).to(device)
    truth = gather({n: t.float() for n, t in w.items()}, x.float(), chosen)
    return float((grouped(w, x, chosen).float() - truth).norm() / truth.norm())


def check() -> None:
    """Every small geometry and way of the experts, beside plain loops; exits where one is off."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = {"grouped in bfloat16": (0.02, lambda: check_grouped(device))}
    for name in SMALL:
        for way in WAYS if device == "cpu" else WAYS[1:]:
            jobs[f"{name} {way}"] = (1e-4, lambda n=name, w=way: check_decoder(n, w, device))
    for name, (bound, job) in jobs.items():
        error = job()
        print(f"{name} on {device}: relative error {error:.2g}", flush=True)
        if not error < bound:
            raise SystemExit(f"check: {name}: expected a relative error below {bound}, got {error}")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=list(SMALL))
    parser.add_argument("--check", action="store_true", help="small geometries beside plain loops")
    parser.add_argument("--contexts", type=numbers, default=[1024])
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--experts", type=lambda text: text.split(","), help="|".join(WAYS))
    parser.add_argument("--compile", action="store_true", help="torch.compile each kind of layer")
    parser.add_argument("--tune", action="store_true", help="--compile: search block sizes, slow")
    parser.add_argument("--layers", type=int, help="default: as many as fit; rates are scaled")
    parser.add_argument("--tokens", type=int, default=128, help="of a repetition")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(words)
    chosen.experts = chosen.experts or (["grouped", "gather"], WAYS)[chosen.compile]
    if not chosen.check and (chosen.model is None or set(chosen.experts) - set(WAYS)):
        parser.error(f"expected a model, and experts of {', '.join(WAYS)}")
    return chosen


def compiled(decoder: Decoder, tune: bool) -> None:
    """Every layer by torch.compile: one compilation a kind of layer, way, batch and context.

    tune: with one row, products become reductions whose block sizes are searched for.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.coordinate_descent_tuning = tune
    decoder.layer = torch.compile(decoder._layer, dynamic=False)


def fitting(config: dict, wanted: int | None) -> int:
    """Layers that fit into the card's free memory, with 6 GB for caches and copies."""
    per_layer = sum(2 * math.prod(s) for s in shapes(config, config["num_hidden_layers"]).values())
    table = 4 * config["vocab_size"] * config["hidden_size"]
    fit = int((torch.cuda.mem_get_info()[0] - table - 6e9) // per_layer)
    return max(2, min(wanted or config["num_hidden_layers"], fit))


def main(words: list[str] | None = None) -> None:
    chosen = arguments(words)
    if chosen.check:
        check()
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch_decode: expected a CUDA device, got none; --check runs anywhere")
    config = geometry(chosen.model)
    chosen.real_layers = config["num_hidden_layers"]
    config["num_hidden_layers"] = fitting(config, chosen.layers)
    ceiling = read_rate()
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    decoder = Decoder(config, "cuda", torch.bfloat16)
    torch.cuda.synchronize()
    if chosen.compile:
        compiled(decoder, chosen.tune)
    major, minor = torch.cuda.get_device_capability()
    found = {
        "model": chosen.model,
        "layers": config["num_hidden_layers"],
        "of_layers": chosen.real_layers,
        "dtype": "bfloat16",
        "compiled": chosen.compile,
        "tuned": chosen.compile and chosen.tune,
        "weights_gb": torch.cuda.memory_allocated() / 1e9,
        "read_bytes_per_s": ceiling,
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "python": platform.python_version(),
        "command": " ".join(["torch_decode.py", *(words or sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tokens": chosen.tokens,
        "cells": [],
    }
    print(
        f"{found['model']}: {found['layers']} of {found['of_layers']} layers, "
        f"{found['weights_gb']:.1f} GB drawn in {time.perf_counter() - begin:.1f} s; "
        f"{found['device']} reads {ceiling / 1e9:.0f} GB/s",
        flush=True,
    )
    for rows in chosen.batches:
        for context in chosen.contexts:
            with torch.inference_mode():
                found["cells"].append(cell(decoder, context, rows, chosen, ceiling))
            if chosen.json:  # whole after every cell
                chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
