"""Plants one change at a time in the kernel texts, rebuilds the emulated tests, counts survivors.

    python tests/metal/mutate.py --mlx-include DIR [--sample 250] [--resume]

Needs g++ and GoogleTest; takes some 5 s of a core a mutant and is no part of the test command. Two
kinds: the ones thought of (mutants.py), and a sample, drawn with a fixed seed, of all the places
where an operator, a number, a rounding, a condition or a statement can be changed. Of the sample,
those that do not compile are no mutants. The list with the last outcome is mutants.txt. Exit code 1
when more than 5 % live that change something.
"""

import argparse
import concurrent.futures
import datetime
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile

from mutants import EQUIVALENT, MUTANTS

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The test programs that see a text.
HELPERS = {
    "lanes": "moe stages",
    "affine": "moe stages",
    "moe_combine": "moe stages",
    "moe_experts": "moe stages",
    "moe_router": "moe stages",
    "norm": "stages",
    "attention": "stages",
}
OPS = {
    "gather_qmm_swiglu",
    "moe_combine",
    "moe_experts_down",
    "moe_experts_gate_up",
    "moe_router_sigmoid",
    "moe_router_softmax",
}

# What a line of kernel text can become: a pattern and its replacement.
OPERATORS = [
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r"(?<!template) < ", " <= "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" && ", " || "),
    (r"\brounded<T>\(", "("),
    (r"(?<=[(,?:] )-(?=[a-z])", ""),
    (r"\badd_rn\(", "mul_rn("),
    (r"\bmul_rn\(", "add_rn("),
    (r"\b0\.0f", "1.0f"),
    (r"\b1\.0f", "0.0f"),
    (r"(?<![\w.<])(\d+)(?=u?\b(?![.>]))", lambda found: str(int(found[1]) + 1)),
    (r"(?<=\bif )\(.*\)(?= |$)", "(true)"),
    (r"(?<=\bif )\(.*\)(?= |$)", "(false)"),
    (r"^ *[\w.\[\]]+ [|*+]?= .*;$", ""),
    (r"^ *group_barrier\(\);$", ""),
]

# As the tests are built (CMakeLists.txt).
SANITIZE = [
    "-fsanitize=undefined,bounds-strict,float-cast-overflow",
    "-fno-sanitize-recover=all",
]


def all_mutants():
    """Every mutant that OPERATORS make of the kernel texts, dialects and signatures aside."""
    found = []
    for path in sorted((ROOT / "src/kernels").iterdir()):
        if path.suffix == ".body" or path.stem in HELPERS:
            lines = path.read_text().splitlines()
            tests = HELPERS.get(path.stem) or ("moe" if path.stem in OPS else "stages")
            for number, line in enumerate(lines):
                found += [(path.name, *ends, tests) for ends in line_mutants(lines, number, line)]
    return list(dict.fromkeys(found))


def line_mutants(lines, number, line):
    """(what stands there, what is planted) for one line; lines before it make it the only one."""
    code = re.sub(r"\s*//.*", "", line)
    if code.startswith(("#", "template", "FUNC")):
        return
    start, text = number, "\n".join(lines)
    while text.count("\n".join(lines[start : number + 1])) > 1:
        start -= 1
    before = "".join(before + "\n" for before in lines[start:number])
    for pattern, replacement in OPERATORS:
        for at in re.finditer(pattern, code):
            planted = at.expand(replacement) if isinstance(replacement, str) else replacement(at)
            yield before + line, before + code[: at.start()] + planted + code[at.end() :]


def compile_flags(texts, mlx_include):
    return [
        "g++",
        "-std=gnu++20",
        "-O0",
        "-ffp-contract=off",
        "-w",
        f"-I{ROOT}/tests/metal/emulator",
        f"-I{ROOT}/tests/metal",
        f"-I{texts}",
        "-isystem",
        mlx_include,
    ]


def outcome(work, mutant, mlx_include):
    """How a mutant fares: 'survived', or what stopped it."""
    file, old, new, tests = mutant
    texts = work / "kernels"
    shutil.copytree(ROOT / "src/kernels", texts)
    original = (texts / file).read_text()
    if old not in original:
        raise SystemExit(f"{file}: expected {old!r} in the text, found none")
    (texts / file).write_text(original.replace(old, new, 1))
    fates = (
        outcome_of_test(work, texts, test, mlx_include, flags)
        for flags in ([], SANITIZE)  # slow, so only for what lives without
        for test in tests.split()
    )
    return next((fate for fate in fates if fate != "survived"), "survived")


def outcome_of_test(work, texts, test, mlx_include, flags):
    program = work / "program"
    command = [
        *compile_flags(texts, mlx_include),
        *flags,
        *([] if flags else ["-include", str(work.parent / "common.h")]),
        str(ROOT / f"tests/metal/test_{test}.cpp"),
        str(work.parent / "emulator.o"),
        "-o",
        str(program),
        "-lgtest",
        "-lgtest_main",
    ]
    if subprocess.run(command, capture_output=True).returncode != 0:
        return "does not build"
    try:
        run = subprocess.run([str(program), "--gtest_fail_fast"], capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "killed (endless)"
    return "survived" if run.returncode == 0 else "killed"


def prepare(work, mlx_include):
    """What every mutant shares: the emulator, and the headers that hold no kernel text."""
    flags = compile_flags(ROOT / "src/kernels", mlx_include)
    emulator = str(ROOT / "tests/metal/emulator/emulator.cpp")
    command = [*flags, "-O2", "-c", emulator, "-o", str(work / "emulator.o")]
    subprocess.run(command, check=True)
    header = work / "common.h"
    header.write_text(
        '#include <gtest/gtest.h>\n#include "emulator.h"\n#include "mlx/types/half_types.h"\n'
    )
    command = [*flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(command, check=True)


def report(lines, chosen):
    """The lines of mutants.txt, and the share that lives of those that change something."""
    listed, counts = [], {"killed": 0, "equivalent": 0, "alive": 0}
    for line, mutant in zip(lines, chosen, strict=True):
        reason = EQUIVALENT.get((mutant[0], mutant[2]))
        killed = line.startswith("killed")
        if line.startswith("does not build") and mutant not in MUTANTS:
            continue
        counts["killed" if killed else "equivalent" if reason else "alive"] += 1
        listed.append(f"{line}   (equivalent: {reason})" if reason and not killed else line)
    alive = counts["alive"] / max(1, counts["killed"] + counts["alive"])
    head = (
        f"# mutate.py, {datetime.date.today()}: {len(listed)} mutants, {counts['killed']} killed, "
        f"{counts['equivalent']} equivalent, {counts['alive']} alive that change something: "
        f"{100 * (1 - alive):.1f} % of those that change something are killed."
    )
    return [head, *listed], alive


def outcomes(text):
    """{mutant: outcome} of a list, finished or not."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line[16:].split("   (equivalent")[0].strip(): line[:16].strip() for line in lines}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlx-include", required=True)
    parser.add_argument("--only", default="", help="only mutants of files with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "tests/metal/mutants.txt"))
    parser.add_argument("--sample", type=int, default=250, help="how many mutants are drawn")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes that --out has")
    args = parser.parse_args()
    sample = random.Random(20261124).sample(all_mutants(), args.sample)
    chosen = [m for m in [*MUTANTS, *sample] if args.only in m[0]]
    out = pathlib.Path(args.out)
    known = outcomes(out.read_text()) if args.resume and out.exists() else {}
    out.write_text("".join(f"{fate:16} {name}\n" for name, fate in known.items()))
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        prepare(work, args.mlx_include)

        def run(numbered):
            number, mutant = numbered
            name = f"{mutant[0]}: {mutant[1]!r} -> {mutant[2]!r}"
            if name in known:
                return f"{known[name]:16} {name}"
            place = work / str(number)
            place.mkdir()
            line = f"{outcome(place, mutant, args.mlx_include):16} {name}"
            shutil.rmtree(place)
            with out.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
            return line

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            lines = list(pool.map(run, enumerate(chosen)))
    listed, alive = report(lines, chosen)
    out.write_text("\n".join(listed) + "\n")
    print(listed[0])
    sys.exit(alive > 0.05)


if __name__ == "__main__":
    main()
