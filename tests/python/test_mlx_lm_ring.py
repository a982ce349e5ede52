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

COUNT = 24

# One rank: its shard of the model, decoded on stock, with the ops, and with the step asked for.
RANK = """
import json, sys
import mlx.core as mx
import mlx_lm, moefuse
from mlx_lm.utils import sharded_load

group = mx.distributed.init(strict=True, backend="ring")
model, tokenizer = sharded_load(sys.argv[1], tensor_group=group)
found = {"size": group.size()}
for variants in ([], ["router", "experts"], ["router", "experts", "step"]):
    report = moefuse.patch(model, variants)
    tokens = []
    for prompt in json.loads(sys.argv[2]):
        steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=int(sys.argv[3]))
        tokens.append([step.token for step in steps])
    found["+".join(variants)] = {"tokens": tokens, **report.to_dict()}
print(json.dumps(found))
"""


def ring(path, hosts) -> list[dict]:
    """What each of two ranks found."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(path), json.dumps(PROMPTS), str(COUNT)],
            env=child_env(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)),
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
    """Half of every expert is in each process; the sums meet after the fused op."""
    full = unquantised(folder(name), tmp_path / "full")
    path = tmp_path / name  # groups of 32: a half of the 64 columns is whole groups
    mlx_lm.convert(str(full), str(path), quantize=True, q_bits=4, q_group_size=32)
    model, tokenizer = mlx_lm.load(str(path))
    steps = [mlx_lm.stream_generate(model, tokenizer, text, max_tokens=COUNT) for text in PROMPTS]
    alone = [[step.token for step in each] for each in steps]
    layers = moefuse.patch(model).modules_patched
    moefuse.unpatch(model)

    for found in ring(path, tmp_path / "hosts.json"):
        assert found["size"] == 2
        fused, stepped = found["router+experts"], found["router+experts+step"]
        assert found[""]["tokens"] == fused["tokens"] == stepped["tokens"] == alone
        assert fused["modules_patched"] == layers
        assert fused["calls"]["moe_experts"] >= layers * COUNT
        # The step knows no group: it sees that the shard is not the config's model, and says so.
        assert "step" not in stepped["calls"] and stepped["calls"]["moe_experts"]
        assert any(reason.startswith("step: [") for reason in stepped["fallbacks"])
