"""Checks of the kernel texts that the emulator cannot make: address spaces and house rules.

    python tests/metal/check_texts.py [--clang clang++ [--sources PROGRAM]]

Address spaces: every text as C++ for OpenCL, where __global, __local and __private stand for
device, threadgroup and thread; a pointer of one kind that meets another is an error. Lint: what
that compile lets pass. --sources: the same compile for what metal_sources (PROGRAM) writes, where
the signature is the one that MLX generates: small inputs come as constant. Exit code 1 with the
findings; 77 (skipped) with --clang and no such program.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "src/kernels"
HELPERS = [
    "lanes.h",
    "norm.h",
    "affine.h",
    "attention.h",
    "moe_combine.h",
    "moe_experts.h",
    "moe_router.h",
]
PREAMBLE = """
#define FUNC inline
#define UNROLL _Pragma("unroll")
#define SHARED_ARRAY(type, name, size) __local type name[size]
void group_barrier();
uint shuffle(uint v, uint lane);
float shuffle(float v, uint lane);
uint shuffle_xor(uint v, uint mask);
float shuffle_xor(float v, uint mask);
float mul_rn(float a, float b);
float add_rn(float a, float b);
float fma_rn(float a, float b, float c);
float div_rn(float a, float b);
float sqrt_rn(float a);
float round_even(float a);
template <int N> struct Words { uint w[N]; };
template <int N> Words<N> load_words(const __global uint* p, uint at) {
  Words<N> words;
  for (int i = 0; i < N; ++i) words.w[i] = p[at + i];
  return words;
}
template <typename T> __global T* writable(const __global T* p) {
  return const_cast<__global T*>(p);
}
"""
IDS = "  uint group_x = 0, group_y = 0, group_z = 0, lane_id = 0, simd_id = 0, thread_id = 0;\n"
VALUES = {"BITS": 4, "GROUP": 32, "D": 64, "H": 64, "I": 64, "E": 40, "K": 4}
# What the generated sources take from MLX's own preamble and from Metal. bfloat is a float here.
METAL = """
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#undef as_uint
#undef as_float
#define device __global
#define constant __constant
#define threadgroup __local
typedef uint uint32_t;
typedef float bfloat16_t;
typedef half float16_t;
template <typename T, typename U> T as_type(U v);
template <typename T> T simd_shuffle(T v, ushort lane);
template <typename T> T simd_shuffle_xor(T v, ushort mask);
namespace mem_flags { enum Flags { mem_threadgroup }; }
void threadgroup_barrier(mem_flags::Flags flags);
namespace precise { float divide(float a, float b); float sqrt(float a); }
"""
LINT = [  # (pattern, where it is forbidden, why)
    (r"#\s*(if|ifdef|ifndef|else)", ".h.body", "dialects are headers, not conditions in a text"),
    (r"\[[&=]?\]\s*\(", ".h.body", "a lambda"),
    (r"\bstatic\b", ".h.body", "a static local or global"),
    (r"^(?:const(?:expr)? )?(?:float|uint|int|bool) \w+( =|;|\[)", ".h", "a global variable"),
    (r"\batomic", ".h.body", "an atomic"),
    (
        r"(?<![\w.])(exp|log|sin|cos|tanh|rsqrt|fma|simd_sum|simd_max)\s*\(",
        ".h.body",
        "a device function whose bits differ",
    ),
    (
        r"\b(float|uint|int|bool|T|U)\s*[&*]\s*\w+",
        ".h.body",
        "a pointer or reference without an address space",
    ),
    (r"\w+_(shape|strides|ndim)\b", ".body", "a name that fast::metal_kernel would expand"),
]


def signatures():
    """{stem: (template parameters, inputs, outputs)} from signatures.h, AFFINE_IN expanded."""
    text = (KERNELS / "signatures.h").read_text().replace("\\\n", " ")
    found = {}
    for name, body in re.findall(r"#define (\w+)_SIGNATURE (.*)", text):
        body = re.sub(
            r"AFFINE_IN\((\w*),[^)]*\)",
            r"IN(uint, \1weight, 0) IN(T, \1scales, 0) IN(T, \1biases, 0)",
            body,
        )
        parameters = re.findall(r"\b(TYPE|INT|BOOL)\((\w+)\)", body)
        found[name.lower()] = (
            parameters,
            re.findall(r"\bIN\((\w+), (\w+)", body),
            re.findall(r"\bOUT\((\w+), (\w+)", body),
        )
    return found


def strip(text):
    return re.sub(r"//[^\n]*|#pragma once", "", text)


def opencl_source():
    """One translation unit with every text as an OpenCL kernel."""
    source = PREAMBLE + "".join(strip((KERNELS / h).read_text()) for h in HELPERS)
    for stem, (parameters, inputs, outputs) in signatures().items():
        kinds = {"T": "float", "A": "float", "U": "float", "W": "float"}
        arguments = [f"__global const {kinds.get(t, t)}* {n}" for t, n in inputs]
        arguments += [f"__global {kinds.get(t, t)}* {n}" for t, n in outputs]
        source += f"__kernel void {stem}({', '.join(arguments)}) {{\n"
        for kind, name in parameters:
            if kind == "TYPE":
                source += f"  using {name} = float;\n"
            else:
                value = "true" if kind == "BOOL" else VALUES.get(name, 32)
                source += f"  constexpr {'bool' if kind == 'BOOL' else 'int'} {name} = {value};\n"
        source += IDS + strip((KERNELS / f"{stem}.body").read_text()) + "}\n"
    return source


def generated_source(text):
    """One of metal_sources' files: its template parameters become constants, its kernel plain."""
    helpers, parameters, rest = re.match(
        r"(.*)\ntemplate <([^\n]*)>\n\[\[kernel\]\] void (.*)", text, re.DOTALL
    ).groups()
    kernel, values = re.match(
        r"(.*)\ntemplate \[\[host_name.*<([^<>]*)>;\n$", rest, re.DOTALL
    ).groups()
    source = METAL + helpers + "\n"
    for parameter, value in zip(parameters.split(", "), values.split(", "), strict=True):
        kind, name = parameter.split()
        source += (
            f"using {name} = {value};\n"
            if kind == "typename"
            else f"constexpr __constant {kind} {name} = {value};\n"
        )
    return source + "__kernel void " + re.sub(r" \[\[\w+(\(\d+\))?\]\]", "", kernel)


def generated_errors(clang, program):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([program, folder], check=True, capture_output=True)
        paths = sorted(pathlib.Path(folder).glob("*.metal"))
        findings = [
            f"{path.name}: {line}"
            for path in paths
            for line in compile_errors(clang, generated_source(path.read_text())).splitlines()
        ]
        stems = {re.sub(r"^\d+_moefuse_|\.metal$", "", path.name) for path in paths}
        findings += [f"{stem}: no generated source" for stem in signatures().keys() - stems]
        planted = (
            next(path for path in paths if "norm_qkv" in path.name)
            .read_text()
            .replace("const device uint32_t* k_weight", "const constant uint32_t* k_weight")
        )
        if not compile_errors(clang, generated_source(planted)):
            findings.append("the compile of generated sources passes a planted mistake")
        print(f"{len(paths)} generated sources of {len(stems)} kernels compiled")
    return findings


def compile_errors(clang, source):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "texts.clcpp"
        path.write_text(source)
        run = subprocess.run(
            [
                clang,
                "-x",
                "cl",
                "-cl-std=clc++2021",
                "-target",
                "spir64",
                "-w",
                "-fsyntax-only",
                str(path),
            ],
            capture_output=True,
            text=True,
        )
    return run.stderr if run.returncode else ""


def lint(name, text):
    findings = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.split("//")[0]
        for pattern, suffixes, why in LINT:
            applies = pathlib.Path(name).suffix in re.findall(r"\.\w+", suffixes)
            if applies and re.search(pattern, line):
                findings.append(f"{name}:{number}: {why}: {line.strip()}")
        if len(line) > 100:
            findings.append(f"{name}:{number}: more than 100 columns")
    if name.endswith(".body") and text.count("\n") > 80:
        findings.append(f"{name}: more than 80 lines")
    return findings


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clang", help="also compile for address spaces with this program")
    parser.add_argument("--sources", help="also compile what this program, metal_sources, writes")
    args = parser.parse_args()
    findings = []
    for path in sorted([*KERNELS.glob("*.body"), *(KERNELS / h for h in HELPERS)]):
        findings += lint(path.name, path.read_text())
    if args.clang and not shutil.which(args.clang):
        print(f"skipped: no {args.clang} on this machine")
        sys.exit(77)
    if args.clang:
        findings += compile_errors(args.clang, opencl_source()).splitlines()
        planted = opencl_source().replace(
            "SHARED_ARRAY(T, normed, H);", "SHARED_ARRAY(T, normed, H); __global float* p = normed;"
        )
        if not compile_errors(args.clang, planted):
            findings.append("the address-space check passes a planted mistake")
        if args.sources:
            findings += generated_errors(args.clang, args.sources)
    print("\n".join(findings) or "the kernel texts pass")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
