"""mlx-lm's server on a patched model, before real clients: the OpenAI package and plain HTTP."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from mlx_lm_support import FUSED, MODELS, PROMPTS, child_env, folder


@contextmanager
def server(module: str, name: str, log: Path, **env: str):
    """mlx_lm's server on a free loopback port -> its base address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["server", "--model", str(folder(name)), "--port", str(port), "--temp", "0"]
    hub = log.parent / "hub"  # /v1/models lists it, and fails where there is none
    hub.mkdir(exist_ok=True)
    env = child_env(HF_HUB_CACHE=str(hub), **env)
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *words], env=env, stdout=out, stderr=out
        )
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5).close()
                break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not come up: {log.read_text()[-2000:]}")
                time.sleep(0.2)
        yield base
    finally:
        child.terminate()
        child.wait(timeout=30)


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


def through_openai(base: str) -> list:
    """What the OpenAI package reads: models, an answer, the same streamed, and a completion."""
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=90) as client:
        (model,) = [found.id for found in client.models.list() if found.id.endswith("-tiny")]
        messages = [{"role": "user", "content": PROMPTS[0]}]
        settings = {"model": "default_model", "max_tokens": 24, "temperature": 0}
        chat = client.chat.completions.create(messages=messages, **settings)
        parts = client.chat.completions.create(messages=messages, stream=True, **settings)
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        plain = client.completions.create(prompt=PROMPTS[1], **settings).choices[0].text
        with client.chat.completions.create(messages=messages, stream=True, **settings) as leaving:
            next(iter(leaving))  # and hangs up
    answer = chat.choices[0].message.content
    assert text == answer and chat.usage.completion_tokens > 0
    return [Path(model).name, answer, chat.choices[0].finish_reason, plain]


def conversation(module: str, name: str, log: Path, **env: str):
    with server(module, name, log, **env) as base:
        plain = [ask(base, text, stream=False) for text in PROMPTS[:2]]
        streamed = [ask(base, text, stream=True) for text in PROMPTS[:2]]
        with ThreadPoolExecutor(2) as pool:  # two clients at once share a batch
            at_once = list(pool.map(lambda text: ask(base, text, stream=True), PROMPTS[:2]))
            leaving = pool.submit(hang_up, base)
            beside = ask(base, PROMPTS[0], stream=True)
            leaving.result()
        packaged = through_openai(base)
        history = ask(base, PROMPTS[0], plain[0][0], PROMPTS[1], stream=False)
    return plain, streamed, at_once, beside, packaged, history


@pytest.mark.parametrize("name", MODELS)
def test_server(name, tmp_path):
    stock = conversation("mlx_lm", name, tmp_path / "stock.log")
    for variants, told in FUSED.items():
        log = tmp_path / f"{variants}.log"
        assert conversation("moefuse.mlx_lm", name, log, MOEFUSE_VARIANTS=variants) == stock
        assert told in log.read_text()
    plain, streamed, _, beside, packaged, history = stock
    assert streamed == plain and all(len(text) > 5 for text, _ in plain)
    assert beside == plain[0] and len(history[0]) > 5
    assert packaged[:3] == [name, *plain[0]] and len(packaged[3]) > 5
