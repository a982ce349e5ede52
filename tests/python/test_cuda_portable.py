"""prune_fatbin.py: of a library's CUDA code one architecture stays, byte for byte."""

from __future__ import annotations

import struct

import pytest
from script_support import load

prune_fatbin = load("benchmarks/cuda/prune_fatbin.py")
PTX, CODE = 1, 2


def entry(kind: int, architecture: int, content: bytes) -> bytes:
    head = struct.pack("<HHIQ", kind, 7, 64, len(content)) + bytes(12)
    return (head + struct.pack("<I", architecture)).ljust(64, b"\1") + content


def section(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return struct.pack("<IHHQ", prune_fatbin.MAGIC, 1, 16, len(content)) + content


def library() -> bytearray:
    stray = struct.pack("<IHHQ", prune_fatbin.MAGIC, 9, 16, 4) + b"text"  # not a section
    return bytearray(
        b"\x7fELF front "
        + stray
        + section(entry(CODE, 80, b"a" * 40), entry(CODE, 90, b"b" * 24), entry(PTX, 90, b"c" * 8))
        + b" between "
        + section(entry(CODE, 90, b"d" * 16))
        + b" end"
    )


def test_one_architecture_stays():
    data, before = library(), library()
    assert prune_fatbin.prune(data, 90) == (2, 2)
    changed = bytes(before).replace(b"a" * 40, bytes(40)).replace(b"c" * 8, bytes(8))
    assert bytes(data) == changed


@pytest.mark.parametrize("architecture", [70, 0])
def test_nothing_left_changes_nothing(architecture):
    data = library()
    with pytest.raises(ValueError, match=f"expected code for {architecture}, got none"):
        prune_fatbin.prune(data, architecture)
    assert data == library()


def test_an_entry_that_leaves_its_section_changes_nothing():
    data = library()
    at = data.find(struct.pack("<HHIQ", CODE, 7, 64, 16))
    data[at + 8 : at + 16] = struct.pack("<Q", 17)
    before = bytes(data)
    with pytest.raises(ValueError, match="leaves its section"):
        prune_fatbin.prune(data, 90)
    assert bytes(data) == before
