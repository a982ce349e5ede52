"""Plants one change at a time in the kernel texts, rebuilds the emulated tests, counts survivors.

    python tests/metal/mutate.py --mlx-include DIR [--only TEXT] [--out FILE]

Needs g++ and GoogleTest; takes some 20 s a mutant and is not part of the test command. Each mutant
is (file, what stands there, what is planted, test program). The list with the outcome of the last
run is mutants.txt.
"""

import argparse
import concurrent.futures
import pathlib
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

MUTANTS = [
    (
        "lanes.h",
        "uint m = 16; m > 0; m >>= 1) v = add_rn",
        "uint m = 8; m > 0; m >>= 1) v = add_rn",
        "moe",
    ),
    ("lanes.h", "-1.42860677e-6f", "1.42860677e-6f", "moe"),
    ("lanes.h", "return x < 0.0f ? y : rounded<T>", "return x <= 1.0f ? y : rounded<T>", "moe"),
    ("lanes.h", "x > 88.7228f", "x > 88.0f", "moe"),
    (
        "affine.h",
        "float rest = fma_rn(float(m.biases[g])",
        "float rest = fma_rn(float(m.scales[g])",
        "stages",
    ),
    ("affine.h", "k < cols; k += 256", "k + 8 < cols; k += 256", "moe"),
    (
        "affine.h",
        "n * (cols / GROUP) + k / GROUP",
        "n * (cols / GROUP) + k / (2 * GROUP)",
        "stages",
    ),
    ("affine.h", "row + r < last ? row + r : last", "row + r", "stages"),
    (
        "moe_router.h",
        "key > best_key || (key == best_key && rank > best_rank)",
        "key > best_key",
        "moe",
    ),
    ("moe_router.h", "LAST_WINS ? i + 1u : uint(E) - i", "i + 1u", "moe"),
    ("moe_router.h", "return NAN_HIGH ? 0xffffffffu : 0u", "return 0xffffffffu", "moe"),
    ("moe_router.h", "v == 0.0f ? 0.0f : v", "v", "moe"),
    ("moe_router.h", "best.value[K - 1 - c];\n    sum", "best.value[c];\n    sum", "moe"),
    ("moe_router.h", "float w = NORM && K > 1", "float w = K > 1", "moe"),
    ("moe_router.h", "if (!NORM) sum = exp_sum<E>(logits, top, lane);", "", "moe"),
    (
        "moe_combine.h",
        "return rounded<T>(add_rn(sum, rounded<T>(mul_rn(y, weight))));",
        "return rounded<T>(add_rn(sum, mul_rn(y, weight)));",
        "moe",
    ),
    ("moe_combine.h", "if (COMBINE == 1) return add_rn(sum, mul_rn(y, weight));", "", "moe"),
    (
        "moe_experts.h",
        "u.v[r] = fma_rn(float(up.scales[scale])",
        "u.v[r] = fma_rn(float(gate.scales[scale])",
        "moe",
    ),
    ("moe_experts.h", "uint scale = expert * rows * (cols / GROUP);", "uint scale = 0;", "moe"),
    ("moe_experts_down.body", "group_barrier();\n", "", "moe"),
    ("moe_experts_down.body", "if (expert < uint(E)) {", "if (true) {", "moe"),
    ("moe_experts_gate_up.body", "x + group_z * H", "x", "moe"),
    ("gather_qmm_swiglu.body", "(matrix * M + group_y)", "(matrix + group_y)", "moe"),
    ("norm.h", "eps)));", "0.0f)));", "stages"),
    (
        "norm.h",
        "partial[thread_at / 32u] = sum;\n  group_barrier();",
        "partial[thread_at / 32u] = sum;",
        "stages",
    ),
    ("norm.h", "rounded<T>(mul_rn(x, scale))", "mul_rn(x, scale)", "stages"),
    ("attention.h", "lane < 16u ? -s : s", "lane < 16u ? s : -s", "stages"),
    ("attention.h", "a.sum = fma_rn(a.sum, keep, p);", "a.sum = add_rn(a.sum, p);", "stages"),
    ("attention.h", "top == -as_float(0x7f800000u) ? 0.0f : ", "", "stages"),
    ("attention.h", "i % 2u == 0u ? -s : s", "s", "stages"),
    ("attention_gqa.body", "if (group_x % PER == 0u)", "if (true)", "stages"),
    (
        "attention_gqa.body",
        "cache + cached * D + lane_id * N",
        "cache + cached * D + D + lane_id * N",
        "stages",
    ),
    ("attention_gqa.body", "cached * group_y / SPLITS + simd_id", "simd_id", "stages"),
    ("attention_gqa.body", "group_y == uint(SPLITS - 1)", "group_y == 0u", "stages"),
    ("attention_mla.body", "mul_rn(lane_sum(score), scale[0])", "lane_sum(score)", "stages"),
    ("attention_mla.body", "group_barrier();\n", "", "stages"),
    (
        "attention_mla.body",
        "+ (group_z * KV_STRIDE + KV_OFFSET)",
        "+ (group_z * KV_STRIDE)",
        "stages",
    ),
    ("attention_out.body", "rounded<T>(pick<4>(y, lane_id))", "0.0f", "stages"),
    ("mla_unembed.body", "group_y, V, LORA", "0, V, LORA", "stages"),
    ("norm_qkv.body", "first = NQ + NK;", "first = NQ;", "stages"),
    ("norm_router_sigmoid.body", "scaling[0]", "1.0f", "stages"),
    (
        "norm_router_softmax.body",
        "row < uint(E); row += 64",
        "row < uint(E) && row < 64; row += 64",
        "stages",
    ),
    ("moe_experts_gate_up_shared.body", "group_y < uint(K)", "group_y <= uint(K)", "stages"),
    ("moe_experts_down_shared.body", "parts[K * 4 + thread_id]", "0.0f", "stages"),
    ("moe_experts_down_residual.body", "float(residual[i])", "0.0f", "stages"),
    ("linear_residual.body", "x + group_y * COLS", "x", "stages"),
]


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
    file, old, new, test = mutant
    texts, program = work / "kernels", work / "program"
    shutil.copytree(ROOT / "src/kernels", texts)
    original = (texts / file).read_text()
    if old not in original:
        raise SystemExit(f"{file}: expected {old!r} in the text, found none")
    (texts / file).write_text(original.replace(old, new, 1))
    source = str(ROOT / f"tests/metal/test_{test}.cpp")
    command = [
        *compile_flags(texts, mlx_include),
        source,
        str(work.parent / "emulator.o"),
        "-o",
        str(program),
        "-lgtest",
        "-lgtest_main",
    ]
    if subprocess.run(command, capture_output=True).returncode != 0:
        return "does not build"
    try:
        run = subprocess.run([str(program)], capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "killed (endless)"
    return "survived" if run.returncode == 0 else "killed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlx-include", required=True)
    parser.add_argument("--only", default="", help="only mutants of files with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "tests/metal/mutants.txt"))
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in m[0]]
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        subprocess.run(
            [
                *compile_flags(ROOT / "src/kernels", args.mlx_include),
                "-c",
                str(ROOT / "tests/metal/emulator/emulator.cpp"),
                "-o",
                str(work / "emulator.o"),
            ],
            check=True,
        )

        def run(numbered):
            number, mutant = numbered
            place = work / str(number)
            place.mkdir()
            line = (
                f"{outcome(place, mutant, args.mlx_include):16} {mutant[0]}: "
                f"{mutant[1]!r} -> {mutant[2]!r}"
            )
            shutil.rmtree(place)
            print(line, flush=True)
            return line

        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            lines = list(pool.map(run, enumerate(chosen)))
    pathlib.Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
