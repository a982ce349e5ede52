"""Builds the training text, the held-out text and the tokenizer of the two small checkpoints.

    python models/corpus.py OUT_DIR [--packages DIR]

Fetches Debian 12 documentation packages with `apt-get download` (into DIR, where those already
there are kept), turns their reStructuredText sources into plain text and writes to OUT_DIR:

    train.txt      the training documents, each ended by the eos token's text
    heldout.txt    whole documents that no training step sees
    tokenizer/     byte-level BPE, as transformers saves it
    train.npy      train.txt as uint16 token ids
    heldout.npy    heldout.txt as uint16 token ids
    corpus.json    package versions, sizes and digests

The result depends only on the packages' contents.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from pathlib import Path

import numpy as np

# Package -> licence of its documentation: its /usr/share/doc/*/copyright; what its pages say.
PACKAGES = {
    "python3.11-doc": "PSF-2.0",
    "cinder-doc": "Apache-2.0",
    "cython-doc": "Apache-2.0",
    "glance-doc": "Apache-2.0",
    "heat-doc": "Apache-2.0",
    "ironic-doc": "Apache-2.0",
    "keystone-doc": "Apache-2.0",
    "mypy-doc": "MIT",
    "neutron-doc": "Apache-2.0",
    "nova-doc": "Apache-2.0",
    "numba-doc": "BSD-2-Clause",
    "python-aiohttp-doc": "Apache-2.0",
    "python-astropy-doc": "BSD-3-Clause",
    "python-attr-doc": "MIT",
    "python-babel-doc": "BSD-3-Clause",
    "python-cffi-doc": "MIT",
    "python-click-doc": "BSD-3-Clause",
    "python-coverage-doc": "Apache-2.0",
    "python-cryptography-doc": "Apache-2.0",
    "python-dask-doc": "BSD-3-Clause",
    "python-distributed-doc": "BSD-3-Clause",
    "python-flask-doc": "BSD-3-Clause",
    "python-gevent-doc": "MIT",
    "python-h5py-doc": "BSD-3-Clause",
    "python-ipython-doc": "BSD-3-Clause; CC-BY-4.0",
    "python-jinja2-doc": "BSD-3-Clause",
    "python-kombu-doc": "BSD-3-Clause",
    "python-pandas-doc": "BSD-3-Clause",
    "python-pil-doc": "HPND",
    "python-pymongo-doc": "Apache-2.0",
    "python-pytest-doc": "MIT",
    "python-requests-doc": "Apache-2.0",
    "python-skimage-doc": "BSD-3-Clause",
    "python-sklearn-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT",
    "python-sympy-doc": "BSD-3-Clause",
    "python-tables-doc": "BSD-3-Clause",
    "python-tornado-doc": "Apache-2.0; CC-BY-3.0",
    "python-werkzeug-doc": "BSD-3-Clause",
    "python-xarray-doc": "Apache-2.0",
    "sphinx-doc": "BSD-2-Clause",
    "swift-doc": "Apache-2.0",
}
EOS = "<|endoftext|>"
VOCAB_SIZE = 2048
MIN_BYTES = 600  # shorter sources are stubs for generated pages
HELDOUT_BYTES = 290_000
# Pages that are lists of one-line changes, or machine-made, teach a small model little.
SKIPPED = re.compile(
    r"changelog|changes/|/generated/|whats_new/v|genindex|/_static/|licenses?\.rst"
)
# No template: a chat is its messages' text, which the model continues.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

DROPPED = (
    "toctree|index|image|figure|only|currentmodule|module|sectionauthor|moduleauthor|highlight|"
    "testsetup|testcleanup|plot|raw|include|literalinclude|autoclass|automodule|autofunction|"
    "automethod|autosummary|autodata|autoexception|ipython|contents|meta|rst-class|audit-event|"
    "default-domain|productionlist|tabularcolumns|bibliography|auto\\w+|impl-detail|availability"
)
BLOCK = re.compile(rf"^( *)\.\. (?:({DROPPED})::.*|_[^:]*:.*|\|.*|\[#.*|[^:\n]*)$", re.I)
DIRECTIVE = re.compile(r"^( *)\.\. ([\w:+-]+?):: ?(.*)$")
ADMONITIONS = {"note", "warning", "tip", "seealso", "important", "caution", "hint", "danger"}
VERSIONS = {
    "versionadded": "New in version ",
    "versionchanged": "Changed in version ",
    "deprecated": "Deprecated since version ",
}
CODE = {"code-block", "code", "sourcecode", "doctest", "testcode", "testoutput", "parsed-literal"}


def directive_text(indent: str, name: str, argument: str) -> str:
    """The one line that stands for a directive's head in plain text."""
    name = name.split(":")[-1].lower()
    if name in CODE:
        return ""
    if name in ADMONITIONS:
        return f"{indent}{'See also' if name == 'seealso' else name.capitalize()}: {argument}"
    if name in VERSIONS:
        return f"{indent}{VERSIONS[name]}{argument}:"
    return indent + argument


def drop_blocks(lines: list[str]) -> list[str]:
    """Removes comments, targets and the directives that hold no text, with their bodies."""
    kept: list[str] = []
    skip_indent = -1
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if skip_indent >= 0 and (not line.strip() or indent > skip_indent):
            continue
        skip_indent = -1
        match = BLOCK.match(line)
        if match and not DIRECTIVE.match(line) or match and match[2]:
            skip_indent = indent
            continue
        kept.append(line)
    return kept


def plain_text(source: str) -> str:
    """reStructuredText to plain text: the words and the code, without the markup."""
    lines = drop_blocks(source.expandtabs(4).splitlines())
    text = "\n".join(
        directive_text(*m.groups()) if (m := DIRECTIVE.match(line)) else line for line in lines
    )
    text = re.sub(r"^ *:(?!param|type|return|raise)[\w-]+:(?:\s.*)?\n", "", text, flags=re.M)
    text = re.sub(r":(pep|rfc):`([^`<]+?)`", lambda m: f"{m[1].upper()} {m[2]}", text)
    text = re.sub(r":(?:\w+:)?(?:func|meth):`[!~]?([^`<]+?)(?:\(\))?`", r"\1()", text)
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]+?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`]*>`__?", r"\1", text)
    text = re.sub(r"``([^`\n]+)``", r"`\1`", text)
    text = re.sub(r"`([^`\n]+)`__?", r"\1", text)
    underline = r"^[ =+~^\"'*#.:-]*([=+~^\"'*#.:-])\1{2,}[ =+~^\"'*#.:-]*$\n?"
    text = re.sub(underline, "", text, flags=re.M)
    text = re.sub(r"\s*(?<!:)::$", ":", text, flags=re.M)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def fetch(packages: Path) -> None:
    packages.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not list(packages.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=packages, check=True)
        if not (packages / name).is_dir():
            archive = next(packages.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg", "-x", archive, packages / name], check=True)


def without_repeats(text: str, seen: set[bytes]) -> str:
    """The paragraphs that no page had before: boilerplate taught the models to loop."""
    kept = []
    for paragraph in text.split("\n\n"):
        digest = hashlib.sha1(" ".join(paragraph.split()).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return "\n\n".join(kept).strip() + "\n"


def documents(packages: Path) -> list[tuple[str, str]]:
    """(name, text) of every page, sorted by name, each paragraph once."""
    found, seen = [], set()
    for package in PACKAGES:
        root = packages / package
        for path in sorted(root.rglob("*")):
            name = f"{package}/{path.relative_to(root)}"
            if not re.search(r"\.rst(\.txt)?(\.gz)?$", name) or SKIPPED.search(name):
                continue
            if path.is_symlink() or not path.is_file():
                continue
            data = path.read_bytes()
            data = gzip.decompress(data) if name.endswith(".gz") else data
            text = plain_text(data.decode("utf-8", "replace"))
            text = without_repeats(text, seen)
            if len(text.encode()) >= MIN_BYTES:
                found.append((name, text))
    return found


def split(pages: list[tuple[str, str]]) -> tuple[list[str], list[str], list[str]]:
    """(training texts, the held-out texts to commit, all held-out names), by a hash of the name."""

    def order(page: tuple[str, str]) -> str:
        return hashlib.sha1(page[0].encode()).hexdigest()

    ranked = sorted(pages, key=order)
    held = [p for p in ranked if int(order(p), 16) % 20 == 0]
    train = [p[1] for p in ranked if int(order(p), 16) % 20 != 0]
    shown, size = [], 0
    for _, text in sorted(held, key=lambda p: (not p[0].startswith("python3.11"), order(p))):
        if len(text) <= 40_000 and size + len(text.encode()) + 1 <= HELDOUT_BYTES:
            shown.append(text)
            size += len(text.encode()) + 1
    return train, shown, [p[0] for p in held]


def train_tokenizer(texts: list[str], folder: Path):
    """Byte-level BPE over the training documents only."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Runs of spaces stay whole (indentation), digits come one at a time.
    words = Regex(r" ?[A-Za-z]+| {2,}(?=\S)|\n+ *|\d| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="default: OUT/packages")
    args = parser.parse_args()
    packages = args.packages or args.out / "packages"
    args.out.mkdir(parents=True, exist_ok=True)
    fetch(packages)
    train, shown, held_names = split(documents(packages))
    tokenizer = train_tokenizer(train, args.out / "tokenizer")
    eos = tokenizer.token_to_id(EOS)
    report = {"packages": {}, "vocab_size": tokenizer.get_vocab_size(), "heldout": held_names}
    for name, texts in (("train", train), ("heldout", shown)):
        joined = "".join(t + EOS + "\n" for t in texts) if name == "train" else "\n".join(texts)
        (args.out / f"{name}.txt").write_text(joined, encoding="utf-8", newline="\n")
        ids = [i for e in tokenizer.encode_batch(texts) for i in [*e.ids, eos]]
        np.save(args.out / f"{name}.npy", np.array(ids, dtype=np.uint16))
        report[name] = {
            "documents": len(texts),
            "bytes": sum(len(t.encode()) for t in texts),
            "tokens": len(ids),
            "sha256": hashlib.sha256(joined.encode()).hexdigest(),
        }
    for name, licence in PACKAGES.items():
        archive = next(packages.glob(f"{name}_*.deb")).name
        report["packages"][name] = {"file": archive, "licence": licence}
    (args.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    print({k: report[k] for k in ("train", "heldout", "vocab_size")})


if __name__ == "__main__":
    main()
