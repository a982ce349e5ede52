"""Checks a checkpoint folder before anything is loaded, then loads it through mlx-lm.

Every failure is a LabError that names the file or field, what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model, load_tokenizer

from .. import _core
from . import LabError, environment, files
from .safetensors_header import read_header

FAMILIES = {"qwen3_moe": "qwen", "glm4_moe_lite": "glm"}
EXPERTS_FIELD = {"qwen3_moe": "num_experts", "glm4_moe_lite": "n_routed_experts"}
MAX_LAYERS, MAX_SIZE = 1024, 1 << 24  # mlx-lm would build a module for each before it complains
# What mlx-lm and transformers read beside config.json; they don't say in which of them they failed.
TOKENIZER_JSON = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "generation_config.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder. `digest` covers config.json and every weight file.

    stamps: what tells each of those files, as it was when it was checked, from a later one.
    """

    path: Path
    config: dict
    weight_files: tuple[Path, ...]
    stamps: tuple[tuple, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def family(self) -> str:
        return FAMILIES[self.model_type]

    @property
    def kind(self) -> str:
        """synthetic (says so in its config), trained (carries its curve) or real."""
        if "moefuse_synth" in self.config:
            return "synthetic"
        return "trained" if (self.path / "training.json").is_file() else "real"

    @property
    def experts(self) -> int:
        return self.config[EXPERTS_FIELD[self.model_type]]

    @property
    def geometry(self) -> dict:
        c = self.config
        return {
            "hidden": c["hidden_size"],
            "layers": c["num_hidden_layers"],
            "moe_layers": self.moe_layers,
            "experts": self.experts,
            "top_k": c["num_experts_per_tok"],
            "expert_width": c["moe_intermediate_size"],
            "vocab": c["vocab_size"],
        }

    @property
    def moe_layers(self) -> int:
        c = self.config
        if self.model_type == "qwen3_moe":
            sparse = c.get("decoder_sparse_step", 1)
            dense = c.get("mlp_only_layers", [])
            return sum(
                i not in dense and (i + 1) % sparse == 0 for i in range(c["num_hidden_layers"])
            )
        first, every = c.get("first_k_dense_replace", 1), c.get("moe_layer_freq", 1)
        return sum(i >= first and i % every == 0 for i in range(c["num_hidden_layers"]))

    @property
    def quantization(self) -> dict:
        """The checkpoint's default (group_size, bits, mode) and how many layers differ from it."""
        found = self.config.get("quantization") or {}
        plain = {k: v for k, v in found.items() if not isinstance(v, dict)}
        return {**plain, "exceptions": sum(isinstance(v, dict) for v in found.values())}

    @property
    def read_files(self) -> tuple[Path, ...]:
        return (self.path / "config.json", *self.weight_files)

    @property
    def digest(self) -> str:
        with _DIGESTING:
            if self.stamps not in _DIGESTS:
                found = _digest(self.read_files)
                self.require_unchanged()
                _DIGESTS[self.stamps] = found
        self.require_unchanged()
        return _DIGESTS[self.stamps]

    def digest_early(self) -> None:
        """Begin on the digest in a thread: where it is asked for, a large one may be known."""
        threading.Thread(target=_try_digest, args=(self,), daemon=True).start()

    def record(self, root: Path) -> dict:
        """The capsule's `model`. `synth` is what `moefuse synth` makes the same bytes from."""
        made = self.config.get("moefuse_synth")
        return {
            **({"synth": made} if made else {}),
            "path": environment.relative(self.path, root),
            "kind": self.kind,
            "digest": self.digest,
            "model_type": self.model_type,
            "geometry": self.geometry,
            "quantization": self.quantization,
        }

    def require_unchanged(self) -> None:
        """Raise LabError if a file is no longer the one that was checked."""
        for file, before in zip(self.read_files, self.stamps, strict=True):
            if _stamp(file) != before:
                raise LabError(
                    f"[checkpoint] {file.name}: expected the file that was checked, "
                    "got one that has changed since"
                )


def _try_digest(checkpoint: Checkpoint) -> None:
    with suppress(LabError, OSError):  # told where the digest is asked for
        _ = checkpoint.digest


_DIGESTS: dict[tuple, str] = {}  # by stamps: a large model is read once
_DIGESTING = threading.Lock()


def _digest(paths: tuple[Path, ...]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return "sha256:" + total.hexdigest()


def _stamp(file: Path) -> tuple:
    try:
        found = file.stat()
    except OSError as error:
        return (error.errno,)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_json(path: Path, root: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"[checkpoint] {root.name}/{path.name}: expected a file, got none") from None
    except (ValueError, RecursionError) as error:
        raise LabError(f"[checkpoint] {path.name}: expected JSON, got {error}") from None
    if not isinstance(found, dict):
        raise LabError(f"[checkpoint] {path.name}: expected an object, got {type(found).__name__}")
    return found


def _check_config(config: dict) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise LabError(
            f"[config.json] model_type: expected one of {sorted(FAMILIES)}, got {kind!r}"
        )
    fields = ("hidden_size", "num_hidden_layers", "num_experts_per_tok", "moe_intermediate_size")
    for field in (*fields, "vocab_size", EXPERTS_FIELD[kind]):
        value = config.get(field)
        most = MAX_LAYERS if field == "num_hidden_layers" else MAX_SIZE
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise LabError(
                f"[config.json] {field}: expected an integer from 1 to {most}, got {value!r:.80}"
            )
    experts, top_k = config[EXPERTS_FIELD[kind]], config["num_experts_per_tok"]
    if top_k > experts:
        raise LabError(
            f"[config.json] num_experts_per_tok: expected at most {experts} (experts), got {top_k}"
        )


def _check_index(folder: Path, tensors: dict[str, str]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = _read_json(index, folder).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise LabError(
            f"[checkpoint] {index.name} weight_map: expected an object, got {weight_map!r:.40}"
        )
    for name, file in weight_map.items():
        if tensors.get(name) != file:
            raise LabError(
                f"[checkpoint] {index.name} {name}: expected it in {file}, "
                f"got {tensors.get(name, 'no such tensor')}"
            )


def inspect(path: str | Path) -> Checkpoint:
    """Check a model folder by its headers alone; no weight is read."""
    folder = Path(path)
    files.require_text("model", folder)
    if not folder.is_dir():
        raise LabError(f"[model] {path}: expected a model folder, got none")
    parts = tuple(sorted(folder.glob("model*.safetensors")))
    stamps = tuple(_stamp(file) for file in (folder / "config.json", *parts))
    config = _read_json(folder / "config.json", folder)
    _check_config(config)
    if not parts:
        raise LabError(f"[checkpoint] {folder.name}: expected model*.safetensors, got none")
    tensors: dict[str, str] = {}
    for file in parts:
        for name in read_header(file):
            if name in tensors:
                raise LabError(
                    f"[checkpoint] {name}: expected one copy, got {tensors[name]} and {file.name}"
                )
            tensors[name] = file.name
    _check_index(folder, tensors)
    return Checkpoint(folder.resolve(), config, parts, stamps)


def recorded(record: dict, root: Path, elsewhere: Path | None = None) -> Checkpoint:
    """The checkpoint that a capsule's `model` names. Raises LabError if it is another by now."""
    found = inspect(elsewhere or files.inside(root, record["path"]))
    if found.digest != record["digest"]:
        raise LabError(
            f"[rerun] model {found.name}: expected {record['digest']}, got {found.digest}"
        )
    return found


def _load(checkpoint: Checkpoint, lazy: bool):
    """(model, config) through mlx-lm; a config that contradicts the tensors is a LabError."""
    try:
        return load_model(checkpoint.path, lazy=lazy)
    except Exception as error:  # mlx-lm's classes compute with what config.json says
        checkpoint.require_unchanged()
        raise LabError(f"[checkpoint] {checkpoint.name}: config and tensors: {error}") from error


def load_weights(checkpoint: Checkpoint, lazy: bool = False):
    """The model alone; `lazy` leaves its weights unread."""
    return _load(checkpoint, lazy)[0]


def _check_tokenizer_files(folder: Path) -> None:
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise LabError(f"[tokenizer] {folder.name}: expected {VOCABULARIES[0]}, got none")
    for name in TOKENIZER_JSON:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise LabError(f"[tokenizer] {name}: expected JSON, got {error}") from None
        if not isinstance(found, dict):
            raise LabError(f"[tokenizer] {name}: expected an object, got {type(found).__name__}")


def read_tokenizer(checkpoint: Checkpoint, config: dict | None = None):
    """mlx-lm's tokenizer; what is wrong with its files is a LabError, whoever found it.

    config: as mlx-lm has read it, where it has.
    """
    config = config or checkpoint.config
    _check_tokenizer_files(checkpoint.path)
    try:
        found = load_tokenizer(checkpoint.path, eos_token_ids=config.get("eos_token_id"))
        last = max(found.get_vocab().values(), default=-1)
        found.decode(found.encode("a text"))  # some settings are only looked at here
    except Exception as error:  # the tokenizers package raises bare ones
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise LabError(
            f"[tokenizer] {checkpoint.name}: expected files that transformers reads, got {first}"
        ) from error
    if not 0 <= last < config["vocab_size"]:
        raise LabError(
            f"[tokenizer] {checkpoint.name}: expected tokens 0 to {config['vocab_size'] - 1} "
            f"(config.json vocab_size), got {last}"
        )
    return found


def _check_memory(name: str, weight_bytes: int) -> None:
    """Raise ValueError where the weights exceed the default device's free memory."""
    device = mx.default_device()
    free = mx.device_info(device).get("free_memory") if device.type == mx.gpu else None
    if free is None:  # Metal does not tell, and shares the host's
        _core.check_memory(name, weight_bytes)
    elif weight_bytes > free:
        raise LabError(
            f"[checkpoint] {name}: expected weights that fit into the {free} bytes free on the "
            f"device, got {weight_bytes}"
        )


def load(checkpoint: Checkpoint):
    """(model, tokenizer) as mlx_lm.load gives them, of the very files that were checked.

    Raises ValueError, before a weight is read, with the estimate where it exceeds the free memory.
    """
    checkpoint.require_unchanged()
    _check_memory(checkpoint.name, sum(f.stat().st_size for f in checkpoint.weight_files))
    model, config = _load(checkpoint, lazy=True)
    tokenizer = read_tokenizer(checkpoint, config)
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        checkpoint.require_unchanged()
        raise LabError(f"[checkpoint] {checkpoint.name}: expected weights, got {error}") from error
    checkpoint.require_unchanged()
    return model, tokenizer
