"""Whole generations of both trained checkpoints on the GPU, by tests/cuda/run_on_gpu.sh.

Stock mlx-lm against itself, the step against itself (the same tokens every time), the step against
the CPU's executor and against stock (where they part, by how much stock preferred its token); rows
of a batch against each alone; one generation to the end of the context; both models in one process.
Exits with 1 where the step's tokens differ from its own, or part from stock by more than a tie.

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

MODELS = Path(__file__).resolve().parents[2] / "models"
TOKENS = 200
TIE = 0.25  # logits between two tokens, about two steps of bfloat16 at 20


def prompts_of(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(p["text"]) for p in json.loads((MODELS / "prompts.json").read_text())]


def tokens_of(model, prompt: list[int], count: int = TOKENS) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def margin(model, prompt: list[int], agreed: list[int], ours: int, theirs: int) -> float:
    """How many logits stock prefers its own next token by, after what both said."""
    logits = model(mx.array([[*prompt, *agreed]]))[0, -1].astype(mx.float32)
    return (logits[theirs] - logits[ours]).item()


def parting(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def on_cpu(model, prompts: list[list[int]]) -> list[list[int]]:
    with mx.stream(mx.cpu):
        mx.set_default_device(mx.cpu)
        moefuse.patch(model, step=True, accumulate="fp32_no_fma")
        tokens = [tokens_of(model, p) for p in prompts]
        moefuse.unpatch(model)
        mx.set_default_device(mx.gpu)
    return tokens


def check(name: Path) -> list[str]:
    model, tokenizer = load(str(name))
    prompts = prompts_of(tokenizer)
    faults = []
    try:
        stock = [[tokens_of(model, p) for p in prompts] for _ in range(2)]
    except RuntimeError as error:  # MLX 0.32.4 lacks products of some shapes on CUDA
        print(f"{name.name}: skipped, stock cannot: {error}")
        return []
    report = moefuse.patch(model, step=True, accumulate="fp32_no_fma")
    step = [[tokens_of(model, p) for p in prompts] for _ in range(2)]
    long = tokens_of(model, prompts[0], 3900 - len(prompts[0]))
    moefuse.unpatch(model)
    print(f"{name.name}: calls {dict(report.calls)}, fallbacks {dict(report.fallbacks)}")
    if not report.calls.get("step"):
        faults.append("the step did not run")
    same = sum(a == b for a, b in zip(*stock, strict=True))
    print(f"  stock against itself: {same} of {len(prompts)} the same")
    if step[0] != step[1]:
        faults.append("the step's tokens differ from its own")
    if long[:TOKENS] != step[0][0]:
        faults.append("a long generation begins otherwise")
    print(f"  {len(long)} tokens in one generation, {len(set(long))} different ones")
    for label, other in (("stock", stock[0]), ("the CPU's executor", on_cpu(model, prompts))):
        parted = []
        for prompt, ours, theirs in zip(prompts, step[0], other, strict=True):
            at = parting(ours, theirs)
            if at is not None:
                parted.append((at, margin(model, prompt, ours[:at], ours[at], theirs[at])))
        print(
            f"  step against {label}: {len(prompts) - len(parted)} of {len(prompts)} the same;"
            f" parted at (place, stock's margin): {[(a, round(m, 3)) for a, m in parted]}"
        )
        faults += [f"parted from {label} by {m:.3f} logits" for _, m in parted if m > TIE]
    return faults


def tell_rows_alone(name: Path) -> None:
    """Four prompts of one length as a batch, and each alone: told, since MLX's prefill of a batch
    may differ; that the step's rows do not is step_bench's check."""
    model, tokenizer = load(str(name))
    prompts = [p[:32] for p in prompts_of(tokenizer)[:4]]
    moefuse.patch(model, step=True, accumulate="fp32_no_fma")

    def greedy(rows: list[list[int]]) -> list[list[int]]:
        cache = make_prompt_cache(model)
        logits, out = model(mx.array(rows), cache=cache), []
        for _ in range(100):
            token = mx.argmax(logits[:, -1], -1)
            out.append(token.tolist())
            logits = model(token[:, None], cache=cache)
        return [list(row) for row in zip(*out, strict=True)]

    together, apart = greedy(prompts), [greedy([p])[0] for p in prompts]
    moefuse.unpatch(model)
    same = sum(a == b for a, b in zip(together, apart, strict=True))
    print(f"{name.name}: {same} of 4 rows of a batch as alone")


def main() -> None:
    names = [Path(n) for n in sys.argv[1:]] or sorted(
        p.parent for p in MODELS.glob("*/config.json")
    )
    faults = [f"{n.name}: {f}" for n in names for f in check(n)]
    for name in names:
        tell_rows_alone(name)
    print("\n".join(faults) if faults else "generations: no fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
