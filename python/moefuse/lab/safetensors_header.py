"""The table of tensors in front of a safetensors file, read before any of them is trusted.

Every failure is a LabError that names the file or tensor, what was expected and what was found.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from . import LabError

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, dict]:
    """Tensor table of a safetensors file, checked against the file's size byte for byte."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise LabError(f"[checkpoint] {path.name}: expected an 8-byte length, got {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise LabError(
                f"[checkpoint] {path.name} header: expected at most {size - 8} bytes, "
                f"got a length of {length} (torn or truncated file)"
            )
        raw = stream.read(length)
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LabError(f"[checkpoint] {path.name} header: expected JSON, got {error}") from None
    if not isinstance(table, dict):
        raise LabError(f"[checkpoint] {path.name} header: expected an object, got {table!r:.40}")
    table.pop("__metadata__", None)
    _check_spans(path.name, table, size - 8 - length)
    _check_dtypes(table)
    return table


def _check_dtypes(table: dict) -> None:
    """Floats, but for quantised codes and the mx formats' scales: MLX computes with others too."""
    for name, entry in table.items():
        expected = ["BF16", "F16", "F32"]
        if name.endswith(".weight") and len(entry["shape"]) > 1:
            expected.append("U32")
        if name.endswith(".scales"):
            expected.append("U8")
        if entry["dtype"] not in expected:
            raise LabError(
                f"[checkpoint] {name}: expected {' or '.join(expected)}, got {entry['dtype']}"
            )


def _check_spans(file: str, table: dict, data_bytes: int) -> None:
    end = 0
    try:
        spans = sorted((*entry["data_offsets"], name) for name, entry in table.items())
        for begin, stop, name in spans:
            dtype, shape = table[name]["dtype"], table[name]["shape"]
            if dtype not in ITEM_BYTES:
                raise LabError(f"[checkpoint] {file} {name}: expected a known dtype, got {dtype!r}")
            need = math.prod(shape) * ITEM_BYTES[dtype]
            if stop - begin != need or begin != end:
                raise LabError(
                    f"[checkpoint] {file} {name}: expected bytes {end}..{end + need} for "
                    f"{dtype}{shape}, got {begin}..{stop}"
                )
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LabError):
            raise
        raise LabError(
            f"[checkpoint] {file} header: expected dtype, shape and data_offsets per tensor, "
            f"got {error!r}"
        ) from None
    if end != data_bytes:
        raise LabError(
            f"[checkpoint] {file}: expected {end} bytes of tensors, got {data_bytes} "
            "(torn or truncated file)"
        )
