"""Leaves of a library's CUDA machine code one architecture alone; the rest becomes zeros.

MLX's CUDA library has code for many; for a machine that only files of limited size can be brought
to, one is enough, and zeros pack to nothing. Entries of PTX are zeroed too.
  python benchmarks/cuda/prune_fatbin.py LIBRARY ARCHITECTURE     e.g. libmlx.so 90
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

# What `cuobjdump` reads: a header (magic, version, its own size, bytes behind it), then entries:
# kind (1: PTX, 2: machine code), two bytes of something else, the entry header's size, bytes
# behind it, and 28 bytes from its beginning the architecture.
MAGIC = 0xBA55ED50
HEADER, ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<I")
MACHINE_CODE = 2


def prune(data: bytearray, architecture: int) -> tuple[int, int]:
    """Zeroes in place what is of another architecture: (entries left, entries zeroed).

    Raises ValueError, with `data` as it was, where an entry leaves its section or nothing is left.
    """
    left, gone, at = 0, [], data.find(struct.pack("<I", MAGIC))
    while at >= 0:
        _, version, size, content = HEADER.unpack_from(data, at)
        end = at + size + content
        if version != 1 or size != HEADER.size or end > len(data):  # four bytes that look like it
            at = data.find(struct.pack("<I", MAGIC), at + 4)
            continue
        entry = at + size
        while entry < end:
            kind, _, header, content = ENTRY.unpack_from(data, entry)
            if header < 32 or entry + header + content > end:
                raise ValueError(f"[prune_fatbin] byte {entry}: an entry leaves its section")
            (its_own,) = ARCHITECTURE.unpack_from(data, entry + 28)
            if kind == MACHINE_CODE and its_own == architecture:
                left += 1
            else:
                gone.append((entry + header, content))
            entry += header + content
        at = data.find(struct.pack("<I", MAGIC), end)
    if left == 0:
        raise ValueError(f"[prune_fatbin] architecture: expected code for {architecture}, got none")
    for start, count in gone:
        data[start : start + count] = bytes(count)
    return left, len(gone)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    library = bytearray(path.read_bytes())
    kept, zeroed = prune(library, int(sys.argv[2]))
    print(f"{kept} entries left, {zeroed} zeroed")
    path.write_bytes(library)
