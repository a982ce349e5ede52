"""The PyTorch anchor on a CPU: its decoder beside plain loops, its bytes and cells."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the anchor in PyTorch needs torch")

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def anchor(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))
    import torch_decode

    return torch_decode


@pytest.mark.parametrize("way", ["grouped", "gather", "fused"])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "glm-4.7-flash"])
def test_the_decoder_beside_plain_loops(anchor, name, way):
    assert anchor.check_decoder(name, way, "cpu") < 1e-5


def test_a_wrong_rotation_is_seen(anchor, monkeypatch):
    right = anchor.rotated
    monkeypatch.setattr(anchor, "rotated", lambda x, c, s, h: right(x, c, -s, h))
    assert anchor.check_decoder("qwen3-30b-a3b", "gather", "cpu") > 1e-3


def test_bytes_of_a_step_count_the_chosen_experts_once(anchor):
    config = anchor.geometry("qwen3-30b-a3b", **anchor.SMALL["qwen3-30b-a3b"])
    decoder = anchor.Decoder(config, "cpu", torch.bfloat16)
    decoder.begin(1, 24, 10)
    found = decoder.bytes_read(1, 10, "gather")
    attention = 16 * (8 + 2 * 2) * 64 + 64 * 8 * 16 + 2 * 64 + 2 * 16
    layer = attention + 12 * 64 + 4 * 3 * 32 * 64 + 2 * 2 * 16 * 10
    assert found == 2 * (3 * layer + 96 * 64 + 64 + 64)


def test_a_cell_names_the_fastest_way(anchor, monkeypatch):
    """The graph is pretended: a CPU has none."""

    class Steps:
        def __init__(self, decoder, way, layers):
            self.replay = lambda: decoder.step(way, layers)

    def captured(decoder, way, layers=None):
        if way == "grouped":
            raise RuntimeError("no kernel of that kind")
        return Steps(decoder, way, layers), torch.zeros(1)

    def milliseconds(graph, tokens):
        for _ in range(tokens):
            graph.replay()
        return 2.0

    monkeypatch.setattr(anchor.Decoder, "captured", captured)
    monkeypatch.setattr(anchor, "milliseconds", milliseconds)
    config = anchor.geometry("glm-4.7-flash", **anchor.SMALL["glm-4.7-flash"])
    decoder = anchor.Decoder(config, "cpu", torch.bfloat16)
    chosen = SimpleNamespace(real_layers=47, tokens=4, repeats=2, experts=["grouped", "gather"])
    found = anchor.cell(decoder, 16, 2, chosen, 1e12)
    assert found["failed"] == {"grouped": "no kernel of that kind"} and found["experts"] == "gather"
    assert found["ms"] == {"gather": [2.0, 2.0]} and found["tok_s"] == 1000.0
    assert found["scaled_layers"] == 47 and found["scaled_tok_s"] == 1000.0
    assert found["share_of_read"] == pytest.approx(found["bytes_per_step"] / 2e9)
    json.dumps(found)


def test_the_geometry_is_the_one_that_synth_writes(anchor):
    synth = pytest.importorskip("moefuse.lab.synth")
    for name in anchor.SMALL:
        assert synth.LIKE[name].items() <= anchor.geometry(name).items()
