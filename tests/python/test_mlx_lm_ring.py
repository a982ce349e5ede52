"""Tensor parallel: two processes on mlx's ring backend say what one process says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import mlx_lm
import moefuse
import pytest
from mlx_lm_support import MODELS, PROMPTS, child_env, folder, unquantised

COUNT, TEXTS = 12, PROMPTS[:2]

# One rank: its shard of each model decoded on stock and with the ops; then the step is asked for.
RANK = """
import json, sys
import mlx.core as mx
import mlx_lm, moefuse
from mlx_lm.utils import sharded_load

group = mx.distributed.init(strict=True, backend="ring")
count, prompts, *paths = map(json.loads, sys.argv[1:])
found = {"size": group.size()}
for path in paths:
    model, tokenizer = sharded_load(path, tensor_group=group)
    found[path] = []
    for variants in ([], ["router", "experts"]):
        report = moefuse.patch(model, variants)
        tokens = []
        for prompt in prompts:
            steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=count)
            tokens.append([step.token for step in steps])
        found[path].append({"tokens": tokens, **report.to_dict()})
    found[path].append(moefuse.patch(model, ["experts", "step"]).to_dict())
print(json.dumps(found))
"""


def ring(paths: list[str], hosts) -> list[dict]:
    """What each of two ranks found in the models."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(json.dumps, (COUNT, TEXTS, *paths))],
            env=child_env(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts), MOEFUSE_NUM_THREADS="1"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, told, strict=True):
        assert rank.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in told]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_say_what_one_says(name, tmp_path):
    """Half of every expert is in each process; the sums meet after the fused op.

    In float32 the tokens are one process's. In bfloat16 stock's are not, because each half is
    rounded before the sum; there the fused ops give what stock gives on the same two processes.
    """
    full = unquantised(folder(name), tmp_path / "full")
    paths = {dtype: str(tmp_path / dtype) for dtype in ("float32", "bfloat16")}
    for dtype, path in paths.items():  # groups of 32: a half of the 64 columns is whole groups
        mlx_lm.convert(
            str(full), path, quantize=True, q_bits=4, q_group_size=32, dtype=dtype
        )  # fmt: skip
    model, tokenizer = mlx_lm.load(paths["float32"])
    steps = [mlx_lm.stream_generate(model, tokenizer, text, max_tokens=COUNT) for text in TEXTS]
    alone = [[step.token for step in each] for each in steps]
    layers = moefuse.patch(model).modules_patched
    moefuse.unpatch(model)

    ranks = ring(list(paths.values()), tmp_path / "hosts.json")
    for found in ranks:
        assert found["size"] == 2
        for path in paths.values():
            stock, fused, stepped = found[path]
            assert stock["tokens"] == fused["tokens"]
            assert not stock["calls"] and fused["modules_patched"] == layers
            assert fused["calls"]["moe_experts"] >= layers * COUNT
            # The step knows no group: the shard is not the config's model, and that is told.
            assert stepped["patterns"] == ["moe_experts"]
            assert any(reason.startswith("step: [") for reason in stepped["fallbacks"])
        assert found[paths["float32"]][1]["tokens"] == alone
    assert alone[0] != alone[1]
