"""Five seconds of the soak, and that it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from server_support import ROOT, serve

sys.path.insert(0, str(ROOT / "tests" / "soak"))
import soak

MODEL = ROOT / "models" / "qwen3-moe-tiny"


def test_five_seconds(tmp_path):
    report = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tests/soak/soak.py", MODEL, "--seconds", "5", "--report", report],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = json.loads(report.read_text())
    assert done.returncode == 0 and not found["wrong"], done.stdout + done.stderr
    assert sum(found["done"].get(kind, 0) for kind in ("plain", "streamed")) >= 1
    assert found["rss_mb"] and found["stock_path"] == ["step: more than one token a row (a prompt)"]


def test_a_wrong_token_a_wrong_status_and_a_leak_are_seen(tmp_path):
    """Against stock itself, with an expectation that stock does not meet."""
    case, bad = soak.good_cases()[0], soak.bad_cases()[0]
    speller = soak.Speller(MODEL)
    with serve("mlx_lm", MODEL, tmp_path / "stock.log") as server:
        good = soak.ask(server, case)
        assert not soak.differs(good, soak.ask(server, case))
        assert soak.ask(server, bad).status == 400
        other = replace(good, text="!" + good.text, tokens=(0, *good.tokens[1:]))
        run = soak.Soak(
            server, {case: other, bad: soak.Answer(400)}, speller, time.monotonic() + 60
        )
        run._weigh("plain", case, good)
        assert not run.wrong and len(run.ties) == 1  # stock's own answer is no wrong one
        run._weigh("plain", case, replace(good, text="bananas and more"))
        run._weigh("bad", bad, soak.Answer(500))
        assert len(run.wrong) == 2
    run.rss = [(5.0 * i, 100 + 0.1 * i) for i in range(200)]
    assert run.growth() == pytest.approx(0.1 / 5 * 3600)
    run.rss = [(5.0 * i, 100 + (0.1 * i if i < 40 else 4)) for i in range(200)]
    assert run.growth() == pytest.approx(0)  # what fills at first is no leak
