"""Takes one kernel's bitcode out of a metallib, for llvm-dis: what docs/METAL.md says of MLX's own
kernels (sums of halves, contraction, compile options) can be read there.

    pip download --no-deps --only-binary=:all: --platform macosx_14_0_arm64 mlx-metal==0.32.4
    unzip -j mlx_metal-*.whl mlx/lib/mlx.metallib
    python tests/metal/stock/metallib.py mlx.metallib col_reduce_small_1_reduce_sumbfloat16 |
        llvm-dis | grep -E "fadd|fmuladd|air.compile"

Without a name: the names of all kernels.
"""

import argparse
import pathlib
import struct
import sys


def functions(data):
    """{name: bitcode} of a metallib: a list of tagged records, then the bitcode they point into."""
    if data[:4] != b"MTLB":
        raise SystemExit("expected a metallib, which begins with MTLB")
    (list_at,), (bitcode_at,) = (struct.unpack_from("<Q", data, place) for place in (24, 72))
    (count,) = struct.unpack_from("<I", data, list_at)
    found, at = {}, list_at + 4
    for _ in range(count):
        (size,) = struct.unpack_from("<I", data, at)
        tags, place = {}, at + 4
        while place < at + size and data[place : place + 4] != b"ENDT":
            (length,) = struct.unpack_from("<H", data, place + 4)
            tags[data[place : place + 4]] = data[place + 6 : place + 6 + length]
            place += 6 + length
        start = bitcode_at + struct.unpack("<3Q", tags[b"OFFT"])[2]
        (length,) = struct.unpack("<Q", tags[b"MDSZ"])
        found[tags[b"NAME"].rstrip(b"\0").decode()] = data[start : start + length]
        at += size
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metallib", type=pathlib.Path)
    parser.add_argument("name", nargs="?")
    args = parser.parse_args()
    found = functions(args.metallib.read_bytes())
    if args.name is None:
        print("\n".join(found))
    elif args.name in found:
        sys.stdout.buffer.write(found[args.name])
    else:
        raise SystemExit(f"{args.name}: expected one of {len(found)} kernels, got no such name")


if __name__ == "__main__":
    main()
