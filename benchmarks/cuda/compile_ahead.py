"""Compiles MLX's quantised products for the GPU at hand in parallel, in front of a campaign.

MLX compiles a kernel when it first runs, one after the other, 15 to 20 seconds for each tile size
and dtype of a quantised product; what it compiled it keeps in a folder of files, by name. Here
each is compiled by a process of its own, in a folder of its own, and all are moved there.
  python benchmarks/cuda/compile_ahead.py [--load FILE] [--save FILE]
--load takes the kernels of an earlier run from FILE instead, --save only packs what is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import mlx.core as mx

FOLDER = "MLX_PTX_CACHE_DIR"
# Name of a job -> (dtype, bits, rows). Tiles of 16, 64, 128 and 256 rows are decoding and the
# lab's prompts; the oracle's float32 reads 7 rows at once. `gather`: rows of one expert each;
# `back`: the other way through the matrix, as GLM's prompts go through embed_q.
JOBS = {
    **{f"bfloat16 b4 m{m}": ("bfloat16", 4, m) for m in (8, 64, 128, 200)},
    **{f"bfloat16 b8 m{m}": ("bfloat16", 8, m) for m in (8, 64, 128, 200)},
    "float32 b4 m7": ("float32", 4, 7),
    "float32 b8 m7": ("float32", 8, 7),
    "gather bfloat16": ("bfloat16", 4, 64),
    "gather float32": ("float32", 4, 64),
    "back bfloat16": ("bfloat16", 4, 64),
    "back float32": ("float32", 4, 7),
}


def product(job: str) -> mx.array:
    """The job's product on the default device: what is in the operands does not matter."""
    dtype, bits, rows = JOBS[job]
    dtype, size, experts = getattr(mx, dtype), 512, 4
    many = (experts,) if job.startswith("gather") else ()
    weight = mx.zeros((*many, size, size * bits // 32), mx.uint32)
    scales = mx.ones((*many, size, size // 64), dtype)
    if many:
        x, which = mx.ones((rows, 1, size), dtype), mx.arange(rows, dtype=mx.uint32) % experts
        return mx.gather_qmm(x, weight, scales, scales, rhs_indices=which, bits=bits)
    forth = not job.startswith("back")
    x = mx.ones((rows, size), dtype)
    return mx.quantized_matmul(x, weight, scales, scales, transpose=forth, bits=bits)


def kept() -> Path:
    """Where MLX keeps kernels from one process to the next."""
    return Path(os.environ.get(FOLDER, Path(tempfile.gettempdir(), "mlx", mx.__version__, "ptx")))


def _files(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.ptx"))


def compile_all() -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        running = {}
        for number, job in enumerate(JOBS):
            folder = Path(work, str(number))
            own = {**os.environ, FOLDER: str(folder)}
            words = [sys.executable, __file__, "--job", job]
            running[job] = (subprocess.Popen(words, env=own), folder)
        for job, (process, folder) in running.items():
            code = process.wait()
            print(f"{job}: exit {code}, {_files(folder)} files", flush=True)
            if folder.is_dir():
                shutil.copytree(folder, kept(), dirs_exist_ok=True)
    seconds = time.monotonic() - begin
    print(f"{_files(kept())} kernels compiled ahead in {seconds:.0f} s", flush=True)


def save(file: Path) -> None:
    """Pack the kernels, without their sources."""
    with tarfile.open(file, "w:gz") as packed:
        for path in sorted(kept().rglob("*")):
            if path.suffix in (".ptx", ".txt"):
                packed.add(path, path.relative_to(kept()).as_posix(), recursive=False)


def load(file: Path) -> None:
    with tarfile.open(file) as packed:
        for member in packed:
            parts = Path(member.name).parts
            if member.isfile() and ".." not in parts and not Path(member.name).is_absolute():
                path = kept().joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(packed.extractfile(member).read())
    print(f"{_files(kept())} kernels of an earlier run", flush=True)


def run_job(job: str) -> None:
    begin = time.monotonic()
    mx.eval(product(job))
    print(f"  {job}: {time.monotonic() - begin:.1f} s", flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(words)
    if chosen.job:
        run_job(chosen.job)
    elif not mx.cuda.is_available():
        print("compile_ahead: no CUDA device, nothing to compile", flush=True)
    elif chosen.save:
        save(chosen.save)
    else:
        if chosen.load:
            load(chosen.load)
        if not _files(kept()):
            compile_all()


if __name__ == "__main__":
    main()
