"""Files and numbers that do not fit: a named error at the border, or the right tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import moefuse
import numpy as np
import pytest
from lab_support import tiny  # noqa: F401
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from moefuse import _core, cli, step
from moefuse.lab import LabError, checkpoint, synth
from patch_support import FAMILIES, VOCAB, same_bits
from patch_support import tiny as tiny_model
from typer.testing import CliRunner

CASES = int(os.environ.get("MOEFUSE_PROPERTY_CASES", "300"))
NAMED = re.compile(r"^\[[\w ,.]+\] .*: expected .*, got ", re.S)
runner = CliRunner()


@pytest.fixture
def copy(tiny, tmp_path):  # noqa: F811
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


# -- the tokenizer's files -----------------------------------------------------------------------

HALF = "half"
TOKENIZERS = {
    "missing": ("tokenizer.json", None, "tokenizer.json, got none"),
    "empty": ("tokenizer.json", "", "tokenizer.json: expected JSON, got"),
    "truncated": ("tokenizer.json", HALF, "tokenizer.json: expected JSON, got"),
    "an array": ("tokenizer.json", "[]", "tokenizer.json: expected an object, got list"),
    "another object": ("tokenizer.json", '{"a": 1}', "expected files that transformers reads"),
    "no text": ("tokenizer.json", b"\xff\xfe{}", "tokenizer.json: expected JSON, got"),
    "deep": ("tokenizer.json", "[" * 100_000, "tokenizer.json: expected JSON, got"),
    "settings truncated": ("tokenizer_config.json", HALF, "tokenizer_config.json: expected JSON"),
    "settings an array": ("tokenizer_config.json", "[1]", "expected an object, got list"),
    "unknown class": (
        "tokenizer_config.json",
        '{"tokenizer_class": "NoSuchTokenizer", "eos_token": 5}',
        "expected files that transformers reads",
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_files(copy, kind):
    name, content, message = TOKENIZERS[kind]
    path = copy / name
    if content is None:
        path.unlink()
    else:
        old = path.read_bytes()
        data = old[: len(old) // 2] if content is HALF else content
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    result = runner.invoke(cli.app, ["generate", str(copy), "--prompt", "A list"])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert "error: [tokenizer] " in said and message in said
    assert "Traceback" not in said


def test_a_tokenizer_of_another_model(copy):
    """Its tokens lie beyond the embedding, where MLX would read whatever is there."""
    path = copy / "config.json"
    config = json.loads(path.read_text())
    tokens = json.loads((copy / "tokenizer.json").read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 400, "content": "<far>"})
    tokens["model"]["vocab"]["<far>"] = 400
    (copy / "tokenizer.json").write_text(json.dumps(tokens))
    message = rf"\[tokenizer\] tiny: expected tokens 0 to {config['vocab_size'] - 1} .*, got 400"
    with pytest.raises(LabError, match=message):
        checkpoint.load(checkpoint.inspect(copy))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in %}", "[generate] --chat: expected a template that takes the prompt"),
        (b"\xff", "[tokenizer] tiny: expected files that transformers reads"),
        ("{{ 1 / 0 }}", "[generate] --chat: expected a template that takes the prompt"),
        ("{{ raise_exception('no users') }}", "[generate] --chat: expected a template"),
        ("{{ messages.__class__.__mro__ }}", "[generate] --chat: expected a template"),
    ],
)
def test_chat_templates(copy, template, message):
    path = copy / "chat_template.jinja"
    path.write_bytes(template if isinstance(template, bytes) else template.encode())
    result = runner.invoke(cli.app, ["generate", str(copy), "--prompt", "A list", "--chat"])
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and message in said, said


@pytest.mark.parametrize("content", [HALF, "[]", '{"model": {"vocab": {}}}', '{"model": []}'])
def test_a_tokenizer_that_a_synthetic_checkpoint_cannot_take(copy, tmp_path, content):
    path = copy / "tokenizer.json"
    path.write_text(path.read_text()[:500] if content is HALF else content)
    with pytest.raises(LabError, match=r"\[synth\] tokenizer: expected a vocabulary in tiny/"):
        synth.write("qwen3-30b-a3b", 1, tmp_path / "new", tokenizer=copy)


# -- files that change after they were checked ---------------------------------------------------


def cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def replace(path: Path) -> None:
    """Another file of the same size under the same name."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("change", [cut, replace, Path.unlink], ids=["cut", "replaced", "gone"])
def test_a_file_that_changes_between_check_and_read(copy, name, change):
    found = checkpoint.inspect(copy)
    change(copy / name)
    with pytest.raises(LabError, match=rf"\[checkpoint\] {name}: expected the file that was"):
        checkpoint.load(found)
    if change is not Path.unlink:
        with pytest.raises(LabError, match=rf"\[checkpoint\] {name}: expected the file that was"):
            _ = found.digest  # no capsule takes the digest of another file


def test_a_file_that_is_cut_while_it_is_read(copy, monkeypatch):
    """After the headers, before the data: MLX reads by offset, so it is an error and no signal."""
    read = checkpoint.load_tokenizer

    def slow(*args, **more):
        cut(copy / "model.safetensors")
        return read(*args, **more)

    monkeypatch.setattr(checkpoint, "load_tokenizer", slow)
    with pytest.raises(LabError, match=r"\[checkpoint\] model.safetensors: expected the file"):
        checkpoint.load(checkpoint.inspect(copy))


def test_a_plan_of_weights_that_are_gone(copy):
    """Arrays that MLX has not read yet, when their file is cut: the tensor is named."""
    config = (copy / "config.json").read_text()
    weights = mx.load(str(copy / "model.safetensors"))
    cut(copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"^\[model\] \S+: expected data that can be read, got "):
        _core.Decoder(config, weights, "exact")


# -- JSON that is JSON, and still not what it should be ------------------------------------------

JUNK = (None, True, -1, 0, 1, 3, 2**40, 2**70, 0.5, 1e300, "", "x", [], [[1]], {}, {"a": 1})


def spoil(value, rng):
    """`value` with one of its parts, at any depth, replaced, dropped or doubled."""
    if isinstance(value, dict) and value:
        key = list(value)[rng.integers(len(value))]
        if rng.integers(4) == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: spoil(value[key], rng)}
    if isinstance(value, list) and value and rng.integers(2):
        at = rng.integers(len(value))
        return [*value[:at], spoil(value[at], rng), *value[at + 1 :]]
    return JUNK[rng.integers(len(JUNK))]


def spoil_file(path: Path, rng) -> None:
    data = path.read_bytes()
    if rng.integers(4) == 0:
        at = rng.integers(len(data))
        path.write_bytes(data[:at] + bytes([rng.integers(256)]) * rng.integers(3) + data[at + 1 :])
    elif path.suffix == ".json":
        path.write_text(json.dumps(spoil(json.loads(data), rng)))
    else:  # the header of a safetensors file
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(spoil(json.loads(data[8 : 8 + size]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def test_spoilt_checkpoints(tiny, tmp_path):  # noqa: F811
    """Each either loads or is refused by name; a header or an index never gets past the check."""
    refused = 0
    for case in range(CASES // 5):
        rng = np.random.default_rng([20261125, case])
        folder = Path(shutil.copytree(tiny, tmp_path / "spoilt", dirs_exist_ok=True))
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}}))
        files = [folder / "config.json", index, folder / "model.safetensors"]
        spoil_file(files[rng.integers(len(files))], rng)
        try:
            checkpoint.load_weights(checkpoint.inspect(folder), lazy=True)
        except LabError as error:
            refused += 1
            assert re.match(r"^\[[\w.]+\] .*: ", str(error), re.S), (case, error)
        except BaseException as error:
            error.add_note(f"case {case}")
            raise
    assert refused > CASES // 20


def test_spoilt_tokenizers(copy):
    """Each turns a text into tokens of the model and back, or is refused by name."""
    found = checkpoint.inspect(copy)
    names = ("tokenizer.json", "tokenizer_config.json")
    refused = 0
    for case in range(CASES // 3):
        rng = np.random.default_rng([20261127, case])
        path = copy / names[rng.integers(len(names))]
        good = path.read_bytes()
        spoil_file(path, rng)
        try:
            tokenizer = checkpoint.read_tokenizer(found)
            ids = tokenizer.encode("A list holds items in order.")
            assert all(0 <= i < found.config["vocab_size"] for i in ids)
            assert isinstance(tokenizer.decode(ids), str)
        except LabError as error:
            refused += 1
            assert NAMED.match(str(error)) and "[tokenizer] " in str(error), (case, error)
        except BaseException as error:
            error.add_note(f"case {case}")
            raise
        path.write_bytes(good)
    assert CASES // 20 < refused < CASES // 3


# -- a plan whose configuration does not suit the weights ----------------------------------------


def spoil_config(config: dict, rng) -> dict:
    """A configuration that most often parses still."""
    numbers = [k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)]
    changed = dict(config)
    for _ in range(rng.integers(1, 3)):
        key = numbers[rng.integers(len(numbers))]
        old = changed[key] or 0
        pool = (old * 2, old // 2, old + 1, old - 1, old + 2, changed[numbers[0]], 1, 0, 8, 2**24)
        changed[key] = int(pool[rng.integers(len(pool))])
    if rng.integers(3) == 0:
        key = list(config)[rng.integers(len(config))]
        changed[key] = JUNK[rng.integers(len(JUNK))]
    return changed


def spoil_weights(weights: dict, rng) -> dict:
    """One tensor gone, cut, turned, widened, of another type, or under another's name."""
    names = sorted(weights)
    name, other = (names[rng.integers(len(names))] for _ in "ab")
    a = weights[name]
    ways = (
        lambda: None,
        lambda: a[: a.shape[0] // 2],
        lambda: a[..., : a.shape[-1] // 2],
        lambda: a.T,
        lambda: mx.concatenate([a, a], axis=-1),
        lambda: mx.zeros((), a.dtype),
        lambda: mx.zeros((0, *a.shape[1:]), a.dtype),
        lambda: a.astype(mx.float16),
        lambda: a.astype(mx.int32),
        lambda: a[::-1],
        lambda: weights[other],
    )
    new = ways[rng.integers(len(ways))]()
    return {k: new if k == name else v for k, v in weights.items() if k != name or new is not None}


def first_logits(model):
    """Of one decoded token after a short prompt."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    logits = model(mx.array([[4]]), cache=cache)
    mx.eval(logits)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_refuses_what_does_not_suit_it(family):
    """... by name, whatever was changed; and what it takes, it can step."""
    model = tiny_model(family)
    config, good = json.loads(step._config(model)), dict(tree_flatten(model.parameters()))
    taken = refused = 0
    for case in range(CASES):
        rng = np.random.default_rng([20261126, case])
        changed, weights = config, good
        if rng.integers(3):
            changed = spoil_config(config, rng)
        if changed is config or rng.integers(3) == 0:
            weights = spoil_weights(good, rng)
        try:
            decoder = _core.Decoder(json.dumps(changed), weights, "exact")
        except ValueError as error:
            refused += 1
            assert NAMED.match(str(error)), (case, error)
            continue
        except BaseException as error:
            error.add_note(f"{family} case {case}")
            raise
        taken += 1
        heads, key, value = decoder.cache_shape
        layers = changed["num_hidden_layers"]
        caches = [[mx.zeros((1, heads, 8, dim), decoder.dtype) for _ in range(layers)]
                  for dim in (key, value)]  # fmt: skip
        mx.eval(caches)
        logits = decoder.step([(3, 0, 0, 0, 0)], *caches)
        mx.eval(logits)
        assert logits.shape == (1, changed["vocab_size"])
    assert refused > CASES // 2 and taken > CASES // 30


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_that_suits_gives_the_stock_bits(family):
    """The same weights unspoilt: the refusals above are not its only answer."""
    model = tiny_model(family)
    want = first_logits(model)
    moefuse.patch(model, ["step"])
    try:
        assert same_bits(first_logits(model), want)
    finally:
        moefuse.unpatch(model)


def test_a_tensor_that_no_stage_reads_may_be_unread():
    """As those of a layer that the step leaves out are, in a checkpoint loaded lazily."""
    model = tiny_model("qwen")
    weights = dict(tree_flatten(model.parameters()))
    for like in (mx.ones((64, 64)), mx.ones(())):
        weights["model.layers.9.extra.weight"] = like + 1
        _core.Decoder(step._config(model), weights, "exact")


@pytest.mark.parametrize("token", [VOCAB, 2**31, 2**32 - 1])
def test_a_token_outside_the_vocabulary(token):
    model = tiny_model("qwen")
    decoder = _core.Decoder(step._config(model), dict(tree_flatten(model.parameters())), "exact")
    heads, key, value = decoder.cache_shape
    caches = [
        [mx.zeros((1, heads, 8, d), decoder.dtype) for _ in model.layers] for d in (key, value)
    ]
    mx.eval(caches)
    with pytest.raises(ValueError, match=r"^\[step\] .*expected .*, got "):
        decoder.step([(token, 0, 0, 0, 0)], *caches)


@pytest.mark.parametrize("setting", ["MOEFUSE_ISA", "MOEFUSE_NUM_THREADS"])
@pytest.mark.parametrize("what", ["op", "step"])
def test_settings_that_do_not_exist(setting, what):
    """At the call: a thread of the step, or MLX's stream, has nobody to tell."""
    code = """if True:
        import sys
        import mlx.core as mx, moefuse
        from moefuse import _core, step
        from patch_support import tiny
        from mlx.utils import tree_flatten
        mx.set_default_device(mx.cpu)
        try:
            if sys.argv[1] == "op":
                moefuse.moe_combine_weighted_sum_fp32_no_fma(mx.ones((1, 2, 64)), mx.ones((1, 2)))
            else:
                model = tiny("qwen")
                weights = dict(tree_flatten(model.parameters()))
                _core.Decoder(step._config(model), weights, "exact")
        except ValueError as error:
            print(error)
    """
    environment = os.environ | {setting: "none", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, what]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert re.match(rf"^\[moefuse\] {setting}: expected .*, got none", run.stdout), run.stdout


@pytest.mark.parametrize("bad", [6, -1, 2**32 + 1])
@pytest.mark.parametrize("strided", [False, True])
def test_indices_that_are_known_are_refused_at_the_call(bad, strided):
    """Whatever their dtype and strides: 2**32 + 1 is not expert 1."""
    indices = mx.array([[0, 0], [1, bad]], dtype=mx.int64)
    mx.eval(indices)
    if strided:
        indices = indices.T
        mx.eval(indices)
    with mx.stream(mx.cpu):
        w = mx.quantize(mx.ones((6, 64, 64)), 64, 4)
        with pytest.raises(ValueError, match=rf"indices\[3\]: expected less than 6, got {bad}$"):
            moefuse.moe_gather_qmm_swiglu_downproj_combine(
                mx.ones((2, 64)), w, w, w, indices, mx.ones((2, 2)), group_size=64, bits=4
            )


# -- an error that MLX hands on is not the last thing a process does -----------------------------


def test_two_hundred_refusals_leave_the_stream_as_it_was():
    """Values that are there are refused at the call: MLX would lose count of its tasks."""
    with mx.stream(mx.cpu):
        down = mx.quantize(mx.ones((6, 64, 64)), 64, 4)
        gate, up = (mx.quantize(mx.ones((6, 64, 64)), 64, 4) for _ in "gu")
        x, weights = mx.ones((1, 64)), mx.ones((1, 2))
        mx.eval(gate, up, down, x, weights)
        for bad in (6, -1) * 100:
            indices = mx.array([[0, bad]])
            mx.eval(indices)
            with pytest.raises(ValueError, match=r"indices\[1\]: expected less than 6, got "):
                moefuse.moe_gather_qmm_swiglu_downproj_combine(
                    x, gate, up, down, indices, weights, group_size=64, bits=4
                )
            with pytest.raises(ValueError, match=r"rhs\] indices\[1\]: expected less than 6, got "):
                moefuse.gather_qmm_swiglu(
                    mx.ones((1, 1, 1, 64)), *gate, *up, None, indices, group_size=64, bits=4
                )
        total = mx.ones((4, 4))
        for _ in range(50):
            total = total @ total * 0.25
        assert total.sum().item() == 16
