"""A soak of mlx-lm's patched server: mixed requests for a while, every answer held against stock's.

    python tests/soak/soak.py models/qwen3-moe-tiny --seconds 3600 --report soak.json

The unpatched server answers each case first, one at a time; then several clients at once send the
same cases to the patched one in random order, streamed and not, batched and alone, between
requests that are wrong and clients that hang up. A wrong token, a status that differs, a server
that is not healthy or that keeps growing ends it with exit code 1. Loopback only.

What a request is batched with, and which prefix of it is cached, moves stock's own logits; where
two tokens are next to equal, stock answers either. An answer that is not stock's to the letter is
therefore spelled out again with the unpatched model in this process: it is a tie if each of its
tokens lies within TIE of that model's best, and wrong if not. Ties are counted and told.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from server_support import ROOT, Server, serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SECONDS_AT_MOST = 24 * 3600
CLIENTS = 3
SPELLED_AT_MOST = 512
TIE = 1.0  # logits; stock's are off by 0.6 from float32's in the mean position of these checkpoints
SAMPLE_SECONDS = 5
# The allocator's and mlx-lm's caches fill in the first fifth of a run; after that the fitted line
# may rise by no more than this.
WARM_SHARE, MB_PER_HOUR = 0.2, 16.0


@dataclass(frozen=True)
class Case:
    """One request; `good` is False where the answer is a refusal."""

    path: str
    body: bytes
    good: bool = True


@dataclass(frozen=True)
class Answer:
    status: int
    text: str = ""
    finish: str | None = None
    tokens: tuple[int, ...] | None = None  # a stream does not tell them


def _case(path: str, good: bool = True, **body) -> Case:
    return Case(path, json.dumps(body).encode(), good)


def good_cases() -> list[Case]:
    """Chats of one turn and more, completions, short and long contexts; some can't be batched."""
    texts = [item["text"] for item in json.loads((ROOT / "models/prompts.json").read_text())]
    rng = random.Random(7)
    cases = []
    for i, text in enumerate(texts):
        start = text[: rng.choice((12, 40, 90, 400))]
        alone = {"seed": i} if i % 4 == 3 else {}
        size = {"max_tokens": rng.choice((1, 8, 24, 60)), **alone}
        turns = [{"role": "user", "content": start}]
        if i % 3 == 2:
            turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why"}]
        if i % 5 == 4:
            turns.insert(0, {"role": "system", "content": "Answer in one line."})
        cases.append(_case(CHAT, messages=turns, **size))
        cases.append(_case(TEXT, prompt=start, **size))
        cases.append(_case(TEXT, prompt=start, stop=["the"], max_tokens=24))
    return cases


def bad_cases() -> list[Case]:
    """What mlx-lm refuses: each has to come back with the status that stock gives it."""
    hello = [{"role": "user", "content": "The"}]
    return [
        Case(CHAT, b"{", False),
        Case(CHAT, b"[]", False),
        Case("/v1/nowhere", b"{}", False),
        _case(CHAT, False, prompt="no messages"),
        _case(TEXT, False, messages=hello),
        _case(TEXT, False, prompt=5),
        _case(CHAT, False, messages=hello, max_tokens=0),
        _case(CHAT, False, messages=hello, max_tokens="many"),
        _case(CHAT, False, messages=hello, temperature=-1),
        _case(CHAT, False, messages=hello, top_p=2),
        _case(CHAT, False, messages=hello, logit_bias={"a": "b"}),
        _case(CHAT, False, messages=[]),
        _case(CHAT, False, messages=[{"role": "user", "content": [{"type": "video"}]}]),
        _case(CHAT, False, messages=hello, model="/nowhere/at/all"),
    ]


def _connect(server: Server, case: Case, **more) -> http.client.HTTPConnection:
    """A connection with the request sent; `more` is added to a JSON body."""
    body = json.dumps({**json.loads(case.body), **more}) if more else case.body
    host = server.base.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=600)
    connection.request("POST", case.path, body, {"Content-Type": "application/json"})
    return connection


def _said(choice: dict) -> str:
    part = choice.get("message") or choice.get("delta") or {}
    return choice.get("text") or part.get("content") or ""


def ask(server: Server, case: Case) -> Answer:
    """The whole answer at once, with its tokens."""
    more = {"logprobs": True} if case.good else {}
    connection = _connect(server, case, **more)
    try:
        reply = connection.getresponse()
        raw = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        return Answer(reply.status)
    choice = json.loads(raw)["choices"][0]
    tokens = tuple(item["id"] for item in choice.get("logprobs", {}).get("content", []))
    return Answer(200, _said(choice), choice["finish_reason"], tokens)


def ask_streamed(server: Server, case: Case) -> Answer:
    connection = _connect(server, case, stream=True)
    try:
        reply = connection.getresponse()
        raw = reply.read().decode()
    finally:
        connection.close()
    if reply.status != 200:
        return Answer(reply.status)
    parts = [json.loads(line) for line in re.findall(r"^data: (\{.*)$", raw, re.M)]
    choices = [part["choices"][0] for part in parts if part["choices"]]
    return Answer(200, "".join(map(_said, choices)), choices[-1]["finish_reason"])


def hang_up(server: Server, case: Case) -> None:
    """A client that leaves after the first piece of a long answer."""
    connection = _connect(server, case, stream=True, max_tokens=300)
    try:
        reply = connection.getresponse()
        while (line := reply.readline()) and not line.startswith(b"data: {"):
            pass
    finally:
        connection.close()


def differs(want: Answer, got: Answer) -> bool:
    """Token by token where the answer tells them, else by its text."""
    if want.status != 200 or got.status != 200:
        return want.status != got.status
    if got.tokens is not None and got.tokens != want.tokens:
        return True
    return (got.text, got.finish) != (want.text, want.finish)


def rss_mb(pid: int) -> float:
    done = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


class Speller:
    """The unpatched model, which tells how far below its best the tokens of an answer lie."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()

    @cached_property
    def loaded(self):
        import mlx_lm

        return mlx_lm.load(str(self.folder))

    def prompt(self, case: Case) -> list[int]:
        tokenizer, body = self.loaded[1], json.loads(case.body)
        if "prompt" in body:
            return tokenizer.encode(body["prompt"])
        return tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)

    def gap(self, case: Case, text: str) -> float:
        """The largest distance, in logits, of a token from the best; infinite beyond TIE."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        model, tokenizer = self.loaded
        cache, spelled, worst = make_prompt_cache(model), [], 0.0
        inputs = self.prompt(case)
        text = text.lstrip()  # as the server's detokenizer begins

        def said(tokens: list[int]) -> str:
            return tokenizer.decode(tokens).lstrip().rstrip("\ufffd")

        while said(spelled) != text.rstrip("\ufffd"):
            logits = model(mx.array([inputs]), cache=cache)[0, -1].astype(mx.float32)
            best = logits.max().item()
            near = [i for i, v in enumerate(logits.tolist()) if v >= best - TIE]
            near.sort(key=lambda i: -logits[i].item())
            fits = (i for i in near if text.startswith(said([*spelled, i])))
            token = next(fits, None)
            if token is None or len(spelled) == SPELLED_AT_MOST:
                return float("inf")
            worst = max(worst, best - logits[token].item())
            spelled.append(token)
            inputs = [token]
        return worst


@dataclass
class Soak:
    """Several clients on one server until the time is over or something was wrong."""

    server: Server
    want: dict[Case, Answer]
    speller: Speller
    until: float
    ties: list[float] = field(default_factory=list)  # largest gap of each
    rss: list[tuple[float, float]] = field(default_factory=list)  # (seconds, MB)
    done: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, clients: int) -> None:
        threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            self.rss.append((time.monotonic() - start, rss_mb(self.server.pid)))
            for thread in threads:
                thread.join(SAMPLE_SECONDS / clients)

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        good = [case for case in self.want if case.good]
        bad = [case for case in self.want if not case.good]
        while time.monotonic() < self.until and not self.wrong:
            kind = rng.choices(("plain", "streamed", "bad", "left"), (5, 5, 2, 1))[0]
            case = rng.choice(bad if kind == "bad" else good)
            try:
                self._one(kind, case)
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                self._complain(f"{kind} {case}: {error!r}")

    def _one(self, kind: str, case: Case) -> None:
        if kind == "left":
            hang_up(self.server, case)
            got = None
        else:
            got = (ask_streamed if kind == "streamed" else ask)(self.server, case)
        with self.lock:
            self.done[kind] += 1
            if got is not None and got.status == 200:
                self.done["tokens"] += len(self.want[case].tokens)
        if got is not None and differs(self.want[case], got):
            self._weigh(kind, case, got)

    def _weigh(self, kind: str, case: Case, got: Answer) -> None:
        gap = float("inf")
        if self.want[case].status == got.status == 200:
            with self.speller.lock:
                gap = self.speller.gap(case, got.text)
        if gap <= TIE:
            with self.lock:
                self.ties.append(gap)
        else:
            self._complain(f"{kind} {case}: expected {self.want[case]}, got {got}")

    def _complain(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)

    def growth(self) -> float | None:
        """MB an hour of the line through the samples after the warm-up; None with too few."""
        kept = self.rss[int(len(self.rss) * WARM_SHARE) :]
        if len(kept) < 60:
            return None
        return statistics.linear_regression(*zip(*kept, strict=True)).slope * 3600


def expected(model: Path, log: Path) -> dict[Case, Answer]:
    """Stock's answers, one request at a time."""
    with serve("mlx_lm", model, log) as stock:
        return {case: ask(stock, case) for case in (*good_cases(), *bad_cases())}


def soak(model: Path, variants: str, seconds: float, clients: int, folder: Path) -> dict:
    """Everything that was seen, ready for JSON; `wrong` is empty if all was well."""
    want = expected(model, folder / "stock.log")
    log = folder / "patched.log"
    env = {"MOEFUSE_VARIANTS": variants, "MOEFUSE_NUM_THREADS": "1"}
    with serve("moefuse.mlx_lm", model, log, **env) as server:
        start = time.monotonic()
        run = Soak(server, want, Speller(model), start + seconds)
        run.run(clients)
        took = time.monotonic() - start
        healthy = urllib.request.urlopen(f"{server.base}/health", timeout=30).status == 200
    told = log.read_text()
    growth = run.growth()
    wrong = list(run.wrong)
    if not healthy:
        wrong.append("the server is not healthy")
    if " fused in " not in told or "nothing fused" in told:
        wrong.append("nothing was fused")
    if growth is not None and growth > MB_PER_HOUR:
        wrong.append(f"memory: expected at most {MB_PER_HOUR} MB an hour, got {growth:.1f}")
    return {
        "model": model.name,
        "variants": variants,
        "seconds": round(took, 1),
        "clients": clients,
        "cases": {"good": len(good_cases()), "bad": len(bad_cases())},
        "done": dict(run.done),
        "ties": {"count": len(run.ties), "largest_gap": round(max(run.ties, default=0.0), 3)},
        "stock_path": sorted(set(re.findall(r"instead of the fused one: (.*)", told))),
        "rss_mb": [round(mb, 1) for _, mb in run.rss[:: max(1, len(run.rss) // 60)]],
        "rss_mb_per_hour": None if growth is None else round(growth, 2),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--variants", default="step", help="as MOEFUSE_VARIANTS")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--report", type=Path, help="also write what is printed here")
    given = parser.parse_args()
    if not 1 <= given.seconds <= SECONDS_AT_MOST or not 1 <= given.clients <= 64:
        parser.error(f"expected 1 to {SECONDS_AT_MOST} seconds and 1 to 64 clients")
    with tempfile.TemporaryDirectory() as folder:
        found = soak(given.model, given.variants, given.seconds, given.clients, Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if given.report:
        given.report.write_text(text)
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
