"""Whole generations of both trained checkpoints on the GPU, by tests/cuda/run_on_gpu.sh.

Stock mlx-lm against itself, the step against itself (the same tokens every time), the step against
the CPU's executor and against stock (where they part, by how much the CPU's executor, in float32,
prefers the other's token); rows of a batch against each alone; one generation to the end of the
context; both models at once.
Where stock cannot process the prompt (MLX 0.32.4 lacks products of some shapes on CUDA), the step
takes it token by token.
Exits with 1 where the step's tokens differ from its own, or part by more than a tie.

python tests/cuda/generations.py [models/NAME ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import moefuse
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from moefuse.lab.fidelity import Window
from moefuse.lab.oracle import forced_logits

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENS = 200
TIE = 0.25  # logits between two tokens, about two steps of bfloat16 at 20


def prompts_of(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(p["text"]) for p in json.loads((MODELS / "prompts.json").read_text())]


def tokens_of(model, prompt: list[int], count: int = TOKENS, chunk: int = 2048) -> list[int]:
    """chunk: tokens of the prompt at a time; one at a time is the step's own."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count, prefill_step_size=chunk)
    return [int(token) for token, _ in steps]


def parting(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


class OnCpu:
    """The CPU as the device, for what runs inside."""

    def __enter__(self):
        mx.set_default_device(mx.cpu)

    def __exit__(self, *_):
        mx.set_default_device(mx.gpu)


def margin(
    model, prompt: list[int], agreed: list[int], ours: int, theirs: int, chunk: int
) -> float:
    """How many logits the CPU's executor prefers `theirs` by, after what both said.

    Its sums and what goes from stage to stage are float32: stock's own logits are off by as much as
    a tie is wide, and parted from the step where the executor's best two were 0.004 apart.
    """
    with OnCpu():
        moefuse.patch(model, step=True, accumulate="fp32_no_fma")
        every = Window("", 0, len(agreed) + 1)
        logits = forced_logits(model, prompt, agreed, every, chunk)[-1]
        moefuse.unpatch(model)
    return float(logits[theirs] - logits[ours])


def on_cpu(model, prompts: list[list[int]], chunk: int) -> list[list[int]]:
    with OnCpu():
        moefuse.patch(model, step=True, accumulate="fp32_no_fma")
        tokens = [tokens_of(model, p, chunk=chunk) for p in prompts]
        moefuse.unpatch(model)
    return tokens


def partings(label: str, model, prompts, step, other, chunk: int) -> list[str]:
    """Told: the texts that are the same. Returned: where they part by more than a tie."""
    parted = []
    for prompt, ours, theirs in zip(prompts, step, other, strict=True):
        at = parting(ours, theirs)
        if at is not None:
            by = margin(model, prompt, ours[:at], ours[at], theirs[at], chunk)
            parted.append((at, by))
    print(
        f"  step against {label}: {len(prompts) - len(parted)} of {len(prompts)} the same;"
        f" parted at (place, the executor's margin): {[(a, round(m, 3)) for a, m in parted]}"
    )
    return [f"parted from {label} by {m:.3f} logits" for _, m in parted if not m <= TIE]


def stock_twice(model, prompts) -> list[list[list[int]]]:
    """Stock's tokens, two runs; [] where it cannot."""
    try:
        stock = [[tokens_of(model, p) for p in prompts] for _ in range(2)]
    except RuntimeError as error:
        print(f"  stock cannot: {error}")
        return []
    same = sum(a == b for a, b in zip(*stock, strict=True))
    print(f"  stock against itself: {same} of {len(prompts)} the same")
    return stock


def check(name: Path) -> list[str]:
    model, tokenizer = load(str(name))
    prompts = prompts_of(tokenizer)
    print(name.name)
    stock, faults = stock_twice(model, prompts), []
    chunk = 2048 if stock else 1
    report = moefuse.patch(model, step=True, accumulate="fp32_no_fma")
    step = [[tokens_of(model, p, chunk=chunk) for p in prompts] for _ in range(2)]
    long = tokens_of(model, prompts[0], 3900 - len(prompts[0]), chunk)
    moefuse.unpatch(model)
    print(f"  calls {dict(report.calls)}, fallbacks {dict(report.fallbacks)}")
    if not report.calls.get("step"):
        faults.append("the step did not run")
    if step[0] != step[1]:
        faults.append("the step's tokens differ from its own")
    if long[:TOKENS] != step[0][0]:
        faults.append("a long generation begins otherwise")
    print(f"  {len(long)} tokens in one generation, {len(set(long))} different ones")
    cpu = on_cpu(model, prompts, chunk)
    if stock:
        faults += partings("stock", model, prompts, step[0], stock[0], chunk)
    return faults + partings("the CPU's executor", model, prompts, step[0], cpu, chunk)


def check_two_models(names: list[Path]) -> list[str]:
    """Two models of a process take turns token by token: the tokens that each has alone."""
    models = [load(str(name)) for name in names[:2]]
    prompts = [prompts_of(tokenizer)[0][:32] for _, tokenizer in models]
    for model, _ in models:
        moefuse.patch(model, step=True, accumulate="fp32_no_fma")
    alone = [
        tokens_of(model, p, 100, chunk=1) for (model, _), p in zip(models, prompts, strict=True)
    ]
    turns = [
        generate_step(mx.array(p), model, max_tokens=100, prefill_step_size=1)
        for (model, _), p in zip(models, prompts, strict=True)
    ]
    together = zip(*[[int(t) for t, _ in pair] for pair in zip(*turns, strict=True)], strict=True)
    same = [list(tokens) for tokens in together] == alone
    for model, _ in models:
        moefuse.unpatch(model)
    print(f"{len(models)} models token by token in turns: {'as alone' if same else 'OTHERWISE'}")
    return [] if same else ["two models in turns: other tokens than alone"]


def check_rows(name: Path) -> list[str]:
    """Four prompts of one length as a batch, and each alone, prompts through the step too."""
    model, tokenizer = load(str(name))
    prompts = [p[:32] for p in prompts_of(tokenizer)[:4]]
    moefuse.patch(model, step=True, accumulate="fp32_no_fma")

    def greedy(rows: list[list[int]]) -> list[list[int]]:
        cache = make_prompt_cache(model)
        for column in zip(*rows, strict=True):
            logits = model(mx.array(column)[:, None], cache=cache)
        out = []
        for _ in range(100):
            token = mx.argmax(logits[:, -1], -1)
            out.append(token.tolist())
            logits = model(token[:, None], cache=cache)
        return [list(row) for row in zip(*out, strict=True)]

    together, apart = greedy(prompts), [greedy([p])[0] for p in prompts]
    moefuse.unpatch(model)
    same = sum(a == b for a, b in zip(together, apart, strict=True))
    print(f"{name.name}: {same} of 4 rows of a batch as alone")
    return [] if same == 4 else [f"{4 - same} rows of a batch differ from what they are alone"]


def main() -> None:
    names = [Path(n) for n in sys.argv[1:]] or sorted(
        p.parent for p in MODELS.glob("*/config.json")
    )
    faults = [f"{n.name}: {f}" for n in names for f in check(n)]
    faults += [f"{n.name}: {f}" for n in names for f in check_rows(n)]
    if len(names) > 1:
        faults += check_two_models(names)
    print("\n".join(faults) if faults else "generations: no fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
