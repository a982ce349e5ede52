"""A damaged checkpoint is named before anything is loaded."""

import json
import shutil
import struct

import mlx.core as mx
import pytest
from lab_support import tiny  # noqa: F401
from moefuse.lab import LabError, checkpoint, prompts


@pytest.fixture
def copy(tiny, tmp_path):  # noqa: F811
    return shutil.copytree(tiny, tmp_path / "tiny")


def _edit(folder, **change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(change)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_a_good_folder_passes_and_loads(copy):
    found = checkpoint.inspect(copy)
    assert found.geometry["moe_layers"] == 2
    assert found.kind == "real"
    model, tokenizer = checkpoint.load(found)
    assert len(model.layers) == 2
    assert tokenizer.decode(tokenizer.encode("list")) == "list"


def test_digest_follows_weights_and_config(copy):
    before = checkpoint.inspect(copy).digest
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    flipped = checkpoint.inspect(copy).digest
    _edit(copy, rope_theta=1.0)
    assert len({before, flipped, checkpoint.inspect(copy).digest}) == 3


def test_missing_folder_config_and_weights(copy, tmp_path):
    with pytest.raises(LabError, match=r"\[model\].*expected a model folder"):
        checkpoint.inspect(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(LabError, match=r"expected model\*.safetensors"):
        checkpoint.inspect(copy)
    (copy / "config.json").unlink()
    with pytest.raises(LabError, match=r"config.json: expected a file"):
        checkpoint.inspect(copy)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(LabError, match=r"model.safetensors.*expected"):
        checkpoint.inspect(copy)


def test_trailing_bytes_and_wrong_spans(copy):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    with pytest.raises(LabError, match=r"expected \d+ bytes of tensors, got \d+"):
        checkpoint.inspect(copy)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"][-1] += 1
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    with pytest.raises(LabError, match=f"{name}: expected bytes"):
        checkpoint.inspect(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"model_type: expected one of .*, got 'llama'"),
        ({"model_type": None}, r"model_type: expected one of .*, got None"),
        ({"model_type": {}}, r"model_type: expected one of .*, got {}"),
        ({"num_experts": None}, r"num_experts: expected an integer from 1 to \d+, got None"),
        ({"num_experts_per_tok": 17}, r"num_experts_per_tok: expected at most 16"),
        ({"hidden_size": "64"}, r"hidden_size: expected an integer from 1 to \d+, got '64'"),
    ],
)
def test_config_that_cannot_be(copy, change, message):
    _edit(copy, **change)
    with pytest.raises(LabError, match=message):
        checkpoint.inspect(copy)


@pytest.mark.parametrize(
    "change", [{"num_experts": 8}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}]
)
def test_config_that_contradicts_the_tensors(copy, change):
    _edit(copy, **change)
    with pytest.raises(LabError, match=r"\[checkpoint\] tiny: config and tensors"):
        checkpoint.load(checkpoint.inspect(copy))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("model.norm.weight", mx.int32, "BF16 or F16 or F32, got I32"),
        ("model.norm.weight", mx.uint32, "BF16 or F16 or F32, got U32"),
        ("model.layers.0.mlp.switch_mlp.up_proj.weight", mx.int32, ".* or U32, got I32"),
        ("model.layers.0.mlp.switch_mlp.up_proj.biases", mx.uint8, "BF16 or F16 or F32, got U8"),
    ],
)
def test_a_type_that_mlx_would_compute_with(copy, name, dtype, message):
    path = copy / "model.safetensors"
    whole = mx.load(str(path))
    mx.save_safetensors(str(path), {**whole, name: whole[name].astype(dtype)})
    with pytest.raises(LabError, match=f"{name}: expected {message}"):
        checkpoint.inspect(copy)


def test_index_that_names_an_absent_tensor(copy):
    index = {"weight_map": {"model.nothing": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LabError, match=r"model.nothing: expected it in model.safetensors"):
        checkpoint.inspect(copy)


def test_prompts(copy, tmp_path):
    _, tokenizer = checkpoint.load(checkpoint.inspect(copy))
    path = tmp_path / "prompts.json"
    for text in ("", "a"):
        path.write_text(json.dumps([{"name": "short", "text": text}]))
        with pytest.raises(LabError, match=r"short: expected at least 2 tokens"):
            prompts.load(tokenizer, path)
    path.write_text('[{"name": "x"}]')
    with pytest.raises(LabError, match="expected a list of name and text"):
        prompts.load(tokenizer, path)
    path.write_text(json.dumps([{"name": "x", "text": "abcdefgh"}]))
    (cut,) = prompts.load(tokenizer, path, limit=3)
    assert len(cut.ids) == 3
    assert prompts.recorded(tokenizer, path, [cut.record()]) == [cut]
    path.write_text(json.dumps([{"name": "x", "text": "abcdefgx"}]))
    with pytest.raises(LabError, match="x: expected sha256"):
        prompts.recorded(tokenizer, path, [cut.record()])
