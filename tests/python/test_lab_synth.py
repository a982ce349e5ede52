"""Synthetic checkpoints: true geometry, same seed same bytes, loadable by plain mlx_lm."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from lab_support import write_tokenizer
from mlx.utils import tree_flatten
from moefuse.lab import LabError, checkpoint, measure, synth

SMALL = {
    "qwen3-30b-a3b": {
        "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "moe_intermediate_size": 64,
    },
    "glm-4.7-flash": {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32,
        "moe_intermediate_size": 64,
    },
}  # fmt: skip


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Folder of a tokenizer; both geometries made small."""
    for like, change in SMALL.items():
        monkeypatch.setitem(synth.LIKE, like, {**synth.LIKE[like], **change})
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("like", sorted(synth.LIKE))
def test_written_checkpoint_decodes_and_says_what_it_is(source, tmp_path, like):
    synth.write(like, 3, tmp_path / "out", tokenizer=source, vocab=400, seed=5)
    found = checkpoint.inspect(tmp_path / "out")
    assert found.kind == "synthetic"
    assert found.geometry["moe_layers"] == (3 if "qwen" in like else 2)
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    ids = tokenizer.encode("A list holds items.")
    run = measure.generate(model, ids, 24)
    assert max(run.tokens) < 257  # padding of the vocabulary is never chosen
    assert len(set(run.tokens)) > 8  # the text goes on
    logits = np.array(model(mx.array([[*ids, *run.tokens]]))[0].astype(mx.float32))[:, :257]
    assert 1.5 < logits.std() < 6.0
    best = np.sort(logits)[:, -2:]
    assert 0.5 < np.median(best[:, 1] - best[:, 0]) < 6.0


def test_router_is_8_bit_for_qwen_and_plain_for_glm(source, tmp_path):
    for like, dtype in (("qwen3-30b-a3b", mx.uint32), ("glm-4.7-flash", mx.bfloat16)):
        synth.write(like, 2, tmp_path / like, tokenizer=source, vocab=400)
        model, _ = mlx_lm.load(str(tmp_path / like))
        gate = model.layers[1].mlp.gate
        assert gate.weight.dtype == dtype
        assert getattr(gate, "bits", None) == (8 if dtype == mx.uint32 else None)


def test_float32_is_float32_throughout(source, tmp_path):
    synth.write("glm-4.7-flash", 2, tmp_path / "out", tokenizer=source, vocab=400, dtype="float32")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    kinds = {leaf.dtype for _, leaf in tree_flatten(model.parameters())}
    assert kinds == {mx.float32, mx.uint32}


def test_an_output_row_is_made_of_its_predecessors_embeddings(source, tmp_path):
    synth.write("qwen3-30b-a3b", 1, tmp_path / "out", tokenizer=source, vocab=400)
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    first = model.lm_head.weight.shape[1] * synth.SUCCESSORS[0] // sum(synth.SUCCESSORS)
    inputs = {tuple(row) for row in np.array(model.model.embed_tokens.weight)[:, :first].tolist()}
    outputs = np.array(model.lm_head.weight)
    assert all(tuple(row) in inputs for row in outputs[:257, :first].tolist())
    assert not outputs[257:].any()


def test_same_seed_same_bytes(source, tmp_path):
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synth.write("qwen3-30b-a3b", 2, tmp_path / name, tokenizer=source, vocab=400, seed=seed)
        digests.append(checkpoint.inspect(tmp_path / name).digest)
    assert digests[0] == digests[1] != digests[2]


def test_geometry_is_the_published_one():
    qwen, glm = synth.LIKE["qwen3-30b-a3b"], synth.LIKE["glm-4.7-flash"]
    names = ("hidden_size", "num_hidden_layers", "num_experts_per_tok", "moe_intermediate_size")
    assert [qwen[n] for n in (*names, "num_experts", "vocab_size")] == [
        2048, 48, 8, 768, 128, 151_936,
    ]  # fmt: skip
    assert [glm[n] for n in (*names, "n_routed_experts", "vocab_size")] == [
        2048, 47, 4, 1536, 64, 154_880,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"like": "gpt-2"}, "like: expected one of"),
        ({"layers": 0}, "layers: expected at least 1"),
        ({"vocab": 100}, "vocab: expected at least 257, got 100"),
        ({"dtype": "float16"}, "dtype: expected one of"),
    ],
)
def test_refusals_leave_nothing(source, tmp_path, change, message):
    args = {"like": "qwen3-30b-a3b", "layers": 1, "vocab": 400, **change}
    with pytest.raises(LabError, match=message):
        synth.write(
            args["like"],
            args["layers"],
            tmp_path / "out",
            tokenizer=source,
            vocab=args["vocab"],
            dtype=args.get("dtype", "bfloat16"),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_a_folder_in_use_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(LabError, match="new or empty folder"):
        synth.write("qwen3-30b-a3b", 1, tmp_path / "out", tokenizer=source, vocab=400)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert json.loads((source / "tokenizer.json").read_text())
