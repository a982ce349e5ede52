"""mlx-lm's Python functions on a patched model: the real thing on stock and patched, compared."""

from __future__ import annotations

import functools
import json

import mlx.core as mx
import mlx_lm
import moefuse
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_support import MODELS, PROMPTS, folder, unquantised
from moefuse.mlx_lm import patched_loaders
from patch_support import blocks

COUNT = 24
OPS = ("moe_router", "moe_experts")
EVERYTHING = (*OPS, "step")


@functools.cache
def loaded(name: str):
    return mlx_lm.load(str(folder(name)))


def compared(model, run, *, ran=EVERYTHING):
    """What run() gives on stock, which must be what it gives patched -> (that, the reports).

    The first report is that of the ops, the second that of the whole step. `ran`: the stems that
    must have run; the others must not.
    """
    moefuse.unpatch(model)
    stock, reports = run(), []
    for variants in (["router", "experts"], ["step"]):
        reports.append(moefuse.patch(model, variants))
        try:
            assert run() == stock, variants
        finally:
            moefuse.unpatch(model)
    ops, step = reports
    assert {*ops.calls, *(stem for stem in step.calls if stem == "step")} == set(ran)
    return stock, reports


@pytest.mark.parametrize("name", MODELS)
def test_stream_generate(name):
    model, tokenizer = loaded(name)

    def run():
        texts = []
        for prompt in PROMPTS:
            steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=COUNT)
            texts.append([(step.token, step.text) for step in steps])
        return texts

    stock, (ops, step) = compared(model, run)
    decoded = sum(len(text) for text in stock) - len(PROMPTS)
    assert ops.calls["moe_experts"] >= decoded * ops.modules_patched
    assert step.calls["step"] >= decoded


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
    model, tokenizer = loaded(name)
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]

    def run():
        return mlx_lm.batch_generate(model, tokenizer, ids, max_tokens=24).texts

    stock, _ = compared(model, run)
    assert len(stock) == len(PROMPTS) and any(stock)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_cache_file(name, tmp_path):
    model, tokenizer = loaded(name)

    def run():
        path = str(tmp_path / "cache.safetensors")
        cache = make_prompt_cache(model)
        start = mlx_lm.generate(model, tokenizer, PROMPTS[0], max_tokens=8, prompt_cache=cache)
        save_prompt_cache(path, cache)
        again = load_prompt_cache(path)
        return start, mlx_lm.generate(
            model, tokenizer, PROMPTS[1], max_tokens=16, prompt_cache=again
        )

    compared(model, run)


def test_speculative_decoding():
    """A draft of the other family, patched too: same tokens, same acceptances."""
    (model, tokenizer), (draft, _) = map(loaded, MODELS)
    ids = mx.array(tokenizer.encode(PROMPTS[0]))

    def run():
        steps = speculative_generate_step(ids, model, draft, max_tokens=24, num_draft_tokens=2)
        return [(int(token), bool(from_draft)) for token, _, from_draft in steps]

    # The model checks several tokens at once, which is a prompt to the step: only drafts step.
    stock, _ = compared(model, run, ran=OPS)
    assert any(from_draft for _, from_draft in stock)
    for variants in (["router", "experts"], ["step"]):
        report = moefuse.patch(draft, variants)
        try:
            assert compared(model, run, ran=OPS)[0] == stock
            assert report.calls[report.patterns[-1]] >= 24
        finally:
            moefuse.unpatch(draft)


def adapter(name: str, path, keys: list[str]) -> str:
    """A LoRA adapter on the last layer, in mlx-lm's own file format, that changes the text."""
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": keys}
    model, _ = mlx_lm.load(str(folder(name)))
    linear_to_lora_layers(model, 1, settings)
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(value.shape) * 0.3
        for name, value in tree_flatten(model.parameters())
        if name.endswith(("lora_a", "lora_b"))
    }
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("keys", "experts", "step"),
    [
        (["mlp.switch_mlp.gate_proj"], "experts: gate_proj is a LoRASwitchLinear", "gate_proj"),
        (["self_attn.o_proj"], None, "o_proj"),
    ],
    ids=["experts", "attention"],
)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_fall_back_where_they_are(name, keys, experts, step, tmp_path):
    path = adapter(name, tmp_path / "adapter", keys)
    model, tokenizer = mlx_lm.load(str(folder(name)), adapter_path=path)

    def run():
        return mlx_lm.generate(model, tokenizer, PROMPTS[0], max_tokens=COUNT)

    stock, (ops, whole) = compared(model, run, ran=OPS)
    assert stock != mlx_lm.generate(*loaded(name), PROMPTS[0], max_tokens=COUNT)
    assert ops.fallbacks.get(experts, 0) >= (COUNT if experts else 0)
    assert {text for text in ops.fallbacks if "_proj" in text} == ({experts} if experts else set())
    assert whole.modules_patched == 0
    assert any(step in reason for reason in whole.fallbacks), whole.fallbacks


@pytest.fixture(scope="module", params=MODELS)
def full(request, tmp_path_factory):
    """A trained model's folder in bfloat16."""
    return unquantised(folder(request.param), tmp_path_factory.mktemp("full") / request.param)


def eight_bits_in(part: str):
    """A quantisation of mixed width: mlx-lm's quant_predicate."""
    return lambda path, _: {"group_size": 64, "bits": 8 if part in path else 4, "mode": "affine"}


# mlx_lm.convert's arguments, what runs on its output, and why the experts of a layer may not.
CONVERSIONS = {
    "4 bits": ({"q_bits": 4}, EVERYTHING, None),
    "8 bits": ({"q_bits": 8}, EVERYTHING, None),
    "4 bits in groups of 32": ({"q_bits": 4, "q_group_size": 32}, EVERYTHING, None),
    "8-bit attention": ({"quant_predicate": eight_bits_in("self_attn")}, EVERYTHING, None),
    "8-bit down": (
        {"quant_predicate": eight_bits_in("down_proj")},
        ("moe_router", "step"),
        "differ in mode, bits",
    ),
    "mxfp4": ({"q_mode": "mxfp4", "q_group_size": 32}, OPS, None),
    "nvfp4": ({"q_mode": "nvfp4", "q_group_size": 16}, OPS, None),
    "mxfp8": ({"q_mode": "mxfp8", "q_group_size": 32}, OPS[:1], "quantised as mxfp8"),
    "mixed_4_6": ({"quant_predicate": "mixed_4_6"}, OPS, "has 6 bits"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_convert_writes(name, full, tmp_path):
    arguments, ran, reason = CONVERSIONS[name]
    target = str(tmp_path / "converted")
    mlx_lm.convert(str(full), target, quantize=True, **{"q_group_size": 64, **arguments})
    model, tokenizer = mlx_lm.load(target)

    def run():
        return mlx_lm.generate(model, tokenizer, PROMPTS[0], max_tokens=COUNT)

    stock, (ops, step) = compared(model, run, ran=ran)
    assert len(stock) > 10
    assert "step" in ran or any(text.startswith("step: [model]") for text in step.fallbacks)
    told = [text for text in ops.fallbacks if "_proj" in text]
    assert [reason in text for text in told] == [True] * len(told) if reason else not told


@pytest.mark.parametrize("command_name", ["generate", "server"])
def test_the_commands_patch_what_they_load(command_name):
    with patched_loaders(command_name) as module:
        model = module.load(str(folder(MODELS[0])))[0]
        assert all("_moefuse" in block.__dict__ for block in blocks(model))
    model = module.load(str(folder(MODELS[0])))[0]
    assert not any("_moefuse" in block.__dict__ for block in blocks(model))
