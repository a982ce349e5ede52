"""What people run on mlx-lm runs unchanged on a patched model: the real thing, twice, compared."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
import moefuse
import pytest
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from moefuse.mlx_lm import patched_loaders
from patch_support import blocks
from server_support import ROOT, child_env, serve

MODELS = ("qwen3-moe-tiny", "glm4-moe-lite-tiny")
PROMPTS = ("The list type", "Return a new array of", "The")
COUNT = 24


@functools.cache
def loaded(name: str):
    return mlx_lm.load(str(ROOT / "models" / name))


def both(name: str, run):
    """(what run(model, tokenizer) gives on stock, the same patched, the report)."""
    model, tokenizer = loaded(name)
    moefuse.unpatch(model)
    stock = run(model, tokenizer)
    report = moefuse.patch(model, ["router", "experts"])
    try:
        patched = run(model, tokenizer)
        assert report.calls["moe_router"] and report.calls["moe_experts"]
    finally:
        moefuse.unpatch(model)
    return stock, patched, report


@pytest.mark.parametrize("name", MODELS)
def test_stream_generate(name):
    def run(model, tokenizer):
        texts = []
        for prompt in PROMPTS:
            steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=COUNT)
            texts.append([(step.token, step.text) for step in steps])
        return texts

    stock, patched, report = both(name, run)
    assert patched == stock
    tokens = sum(len(text) for text in stock)
    assert report.calls["moe_experts"] >= (tokens - len(PROMPTS)) * report.modules_patched


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_weight_changes_the_text(name):
    """The comparison above must be able to fail."""

    def run(model, tokenizer):
        return mlx_lm.generate(model, tokenizer, PROMPTS[0], max_tokens=COUNT)

    model, tokenizer = loaded(name)
    stock = run(model, tokenizer)
    down = [block.switch_mlp.down_proj for block in blocks(model)]
    kept = [proj.scales for proj in down]
    moefuse.patch(model)
    try:
        for proj in down:
            proj.scales = proj.scales * -1
        assert run(model, tokenizer) != stock
    finally:
        for proj, scales in zip(down, kept, strict=True):
            proj.scales = scales
        moefuse.unpatch(model)


@pytest.mark.parametrize("name", MODELS)
def test_batch_generate(name):
    def run(model, tokenizer):
        ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
        return mlx_lm.batch_generate(model, tokenizer, ids, max_tokens=24).texts

    stock, patched, _ = both(name, run)
    assert patched == stock and any(stock)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_cache_file(name, tmp_path):
    def run(model, tokenizer):
        path = str(tmp_path / "cache.safetensors")
        cache = make_prompt_cache(model)
        start = mlx_lm.generate(model, tokenizer, PROMPTS[0], max_tokens=8, prompt_cache=cache)
        save_prompt_cache(path, cache)
        again = load_prompt_cache(path)
        return start, mlx_lm.generate(
            model, tokenizer, PROMPTS[1], max_tokens=16, prompt_cache=again
        )

    stock, patched, _ = both(name, run)
    assert patched == stock


def test_speculative_decoding():
    """A draft of the other family, patched too: same tokens, same acceptances."""
    draft, _ = loaded(MODELS[1])

    def run(model, tokenizer):
        ids = mx.array(tokenizer.encode(PROMPTS[0]))
        steps = speculative_generate_step(ids, model, draft, max_tokens=24, num_draft_tokens=2)
        return [(int(token), bool(from_draft)) for token, _, from_draft in steps]

    stock, patched, _ = both(MODELS[0], run)
    assert patched == stock
    moefuse.patch(draft)
    try:
        assert both(MODELS[0], run)[:2] == (stock, stock)
    finally:
        moefuse.unpatch(draft)


def command(module: str, name: str, *words: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *words, "--model", str(ROOT / "models" / name)],
        env=child_env(**env), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    # The text between the two rules; what follows are timings.
    return done.stdout.split("=" * 10)[1]


@pytest.mark.parametrize("name", MODELS)
def test_generate_command(name):
    words = ("generate", "--prompt", PROMPTS[0], "--max-tokens", "32", "--temp", "0")
    stock = command("mlx_lm", name, *words)
    assert command("moefuse.mlx_lm", name, *words) == stock
    assert len(stock.strip()) > 10


@pytest.mark.parametrize("command_name", ["generate", "server"])
def test_the_commands_patch_what_they_load(command_name):
    with patched_loaders(command_name) as module:
        model = module.load(str(ROOT / "models" / MODELS[0]))[0]
        assert all("_moefuse" in block.__dict__ for block in blocks(model))
    model = module.load(str(ROOT / "models" / MODELS[0]))[0]
    assert not any("_moefuse" in block.__dict__ for block in blocks(model))


def test_unknown_command_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "moefuse.mlx_lm", "fly"],
        env=child_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "command: expected one of" in done.stderr and "'fly'" in done.stderr


def post(base: str, messages: list[dict], stream: bool, tokens: int = 24) -> urllib.request.Request:
    """A chat completion as an OpenAI client words it."""
    body = {"messages": messages, "max_tokens": tokens, "stream": stream}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    return urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), headers)


def ask(base: str, *texts: str, stream: bool):
    """One chat completion after `texts`, user and assistant in turn -> (text, finish_reason)."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    request = post(base, messages, stream)
    with urllib.request.urlopen(request, timeout=90) as reply:
        raw = reply.read().decode()
    if not stream:
        choice = json.loads(raw)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    parts = [json.loads(line) for line in re.findall(r"^data: (\{.*)$", raw, re.M)]
    choices = [part["choices"][0] for part in parts if part["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"]


def hang_up(base: str) -> None:
    """A client that goes away in the middle of a long answer."""
    request = post(base, [{"role": "user", "content": PROMPTS[0]}], stream=True, tokens=400)
    with urllib.request.urlopen(request, timeout=90) as reply:
        while not reply.readline().startswith(b"data: {"):
            pass


def conversation(module: str, name: str, log: Path, **env: str):
    with serve(module, ROOT / "models" / name, log, **env) as server:
        base = server.base
        plain = [ask(base, text, stream=False) for text in PROMPTS[:2]]
        streamed = [ask(base, text, stream=True) for text in PROMPTS[:2]]
        with ThreadPoolExecutor(2) as pool:  # two clients at once share a batch
            at_once = list(pool.map(lambda text: ask(base, text, stream=True), PROMPTS[:2]))
            leaving = pool.submit(hang_up, base)
            beside = ask(base, PROMPTS[0], stream=True)
            leaving.result()
        history = ask(base, PROMPTS[0], plain[0][0], PROMPTS[1], stream=False)
    return plain, streamed, at_once, beside, history


# What the server's log says it fused, by the flag that chooses it.
FUSED = {"router,experts": "moe_router, moe_experts fused in", "step": "step fused in 1 modules"}


@pytest.mark.parametrize("name", MODELS)
def test_server(name, tmp_path):
    stock = conversation("mlx_lm", name, tmp_path / "stock.log")
    for variants, told in FUSED.items():
        log = tmp_path / f"{variants}.log"
        assert conversation("moefuse.mlx_lm", name, log, MOEFUSE_VARIANTS=variants) == stock
        assert told in log.read_text()
    plain, streamed, _, beside, history = stock
    assert streamed == plain and all(len(text) > 5 for text, _ in plain)
    assert beside == plain[0] and len(history[0]) > 5
