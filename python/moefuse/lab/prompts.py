"""The lab's fixed prompts: `[{"name", "text"}]`, tokenised once and known by their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import LabError

LONG_TOKENS = 400


@dataclass(frozen=True)
class Prompt:
    name: str
    ids: tuple[int, ...]

    @property
    def is_long(self) -> bool:
        return len(self.ids) >= LONG_TOKENS

    @property
    def digest(self) -> str:
        """Over the token ids: the text alone would hide a change of tokenizer."""
        joined = ",".join(map(str, self.ids))
        return "sha256:" + hashlib.sha256(joined.encode()).hexdigest()

    def record(self) -> dict:
        return {"name": self.name, "digest": self.digest, "tokens": len(self.ids)}


def find_file(model_path: Path, root: Path) -> Path:
    """prompts.json beside the model's folder, else the repository's own."""
    tried = [model_path.parent / "prompts.json", root / "models" / "prompts.json"]
    for path in tried:
        if path.is_file():
            return path
    raise LabError("[prompts] prompts.json: expected it beside the model or in models/, got none")


def encode(tokenizer, name: str, text: str, limit: int | None = None) -> Prompt:
    """Tokenise one prompt; `limit` keeps its last tokens only."""
    ids = tuple(tokenizer.encode(text))
    if len(ids) < 2:
        raise LabError(f"[prompts] {name}: expected at least 2 tokens, got {len(ids)}")
    return Prompt(name, ids[-limit:] if limit else ids)


def load(tokenizer, path: Path, limit: int | None = None) -> list[Prompt]:
    """All prompts of a file. Raises LabError on a malformed file or an empty prompt."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(item["name"], item["text"]) for item in items]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise LabError(
            f"[prompts] {path.name}: expected a list of name and text, got {error!r}"
        ) from None
    if not pairs or len(dict(pairs)) != len(pairs):
        raise LabError(f"[prompts] {path.name}: expected different names, got {len(pairs)} items")
    return [encode(tokenizer, name, text, limit) for name, text in pairs]


def recorded(tokenizer, path: Path, records: Sequence[dict]) -> list[Prompt]:
    """The prompts a capsule names, cut as it cut them; LabError when one has changed."""
    whole = {p.name: p for p in load(tokenizer, path)}
    found = []
    for record in records:
        name, count = record["name"], record["tokens"]
        prompt = Prompt(name, whole[name].ids[-count:]) if name in whole else None
        if prompt is None or prompt.digest != record["digest"]:
            got = prompt.digest if prompt else "none"
            raise LabError(f"[prompts] {name}: expected {record['digest']}, got {got}")
        found.append(prompt)
    return found


def pick(prompts: Sequence[Prompt], long: bool) -> list[Prompt]:
    """The prompts with a long or a short context; all of them if there are none of that kind."""
    return [p for p in prompts if p.is_long == long] or list(prompts)
