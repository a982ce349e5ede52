"""Plants one change at a time in the kernel texts, rebuilds the emulated tests, counts survivors.

    python tests/metal/mutate.py --mlx-include DIR [--only TEXT] [--out FILE]

Needs g++ and GoogleTest; takes some 20 s a mutant and is not part of the test command. Each mutant
is (file, what stands there, what is planted, test program). The list with the outcome of the last
run is mutants.txt. Exit code 1 when more than 5 % live that change something.
"""

import argparse
import concurrent.futures
import pathlib
import shutil
import subprocess
import sys
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
    ("affine.h", "mul_rn(float(m.biases[g])", "mul_rn(float(m.scales[g])", "stages"),
    ("affine.h", "return add_rn(low, high);", "return low;", "stages"),
    ("affine.h", "e.sum = add_rn(low, high);", "e.sum = low;", "stages"),
    ("affine.h", "q.w[b / 32]", "q.w[a / 32]", "moe"),
    ("affine.h", "i == uint(r) ? f.v[r] : v", "i <= uint(r) ? f.v[r] : v", "moe"),
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
        "rest = fma_rn(float(up.scales[scale])",
        "rest = fma_rn(float(gate.scales[scale])",
        "moe",
    ),
    ("moe_experts.h", "uint scale = expert * rows * (cols / GROUP);", "uint scale = 0;", "moe"),
    ("moe_experts_down.body", "group_barrier();\n", "", "moe"),
    ("moe_experts.h", "if (expert < experts) {\n    y", "if (true) {\n    y", "moe"),
    ("moe_experts.h", "if (expert < experts) {\n    h", "if (expert <= experts) {\n    h", "moe"),
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
    ("attention_gqa.body", "capacity + first) * D", "capacity) * D", "stages"),
    ("attention_gqa.body", "sequence * KV_HEADS", "group_z * KV_HEADS", "stages"),
    ("attention_gqa.body", "(q, rope + group_z * D", "(q, rope", "stages"),
    ("attention_gqa.body", "newest + KV_HEADS * D", "newest", "stages"),
    (
        "attention_gqa.body",
        "cache + cached * D + lane_id * N",
        "cache + cached * D + D + lane_id * N",
        "stages",
    ),
    ("attention_gqa.body", "cached * group_y / SPLITS + simd_id", "simd_id", "stages"),
    ("attention_gqa.body", "group_y == uint(SPLITS - 1)", "group_y == 0u", "stages"),
    ("attention_mla.body", "(latent_q, lane_id), scale[0]", "(latent_q, lane_id), 1.0f", "stages"),
    ("attention_mla.body", "angles, lane_id), scale[0])", "angles, lane_id), 1.0f)", "stages"),
    ("attention_gqa.body", "lane_id), scale[0]);", "lane_id), 1.0f);", "stages"),
    ("attention_mla.body", "places[4 * group_z] * places", "group_z * places", "stages"),
    ("attention_mla.body", "places[4 * group_z + 2] - first", "places[4 * group_z + 2]", "stages"),
    ("attention_mla.body", "if (group_x == 0u)", "if (true)", "stages"),
    ("attention_mla.body", "rope + group_z * ROPE", "rope", "stages"),
    ("attention_mla.body", "if (d < uint(ROPE)) score", "score", "stages"),
    ("attention_mla.body", "group_barrier();\n", "", "stages"),
    (
        "attention_mla.body",
        "+ (group_z * KV_STRIDE + KV_OFFSET)",
        "+ (group_z * KV_STRIDE)",
        "stages",
    ),
    ("attention_out.body", "rounded<T>(pick<4>(y, lane_id))", "0.0f", "stages"),
    ("attention_out.body", "row + lane_id < uint(ROWS)", "true", "stages"),
    ("attention_out.body", "i / SPLITS * SPLITS", "0", "stages"),
    ("attention.h", "total = fma_rn(stats[2 * i + 1]", "total = fma_rn(stats[1]", "stages"),
    ("attention.h", "if (lane == 0u) {", "if (simd == 0u) {", "stages"),
    ("moe_combine.body", "uint at = group_y * K + i;", "uint at = i;", "moe"),
    ("moe_combine.body", "if (d < uint(D))", "if (true)", "moe"),
    ("moe_router_softmax.body", "if (LOGITS)", "if (!LOGITS)", "moe"),
    ("moe_router_softmax.body", "logits[group_x * E + i]", "logits[i]", "moe"),
    ("moe_router_sigmoid.body", "group_x * K, lane_id", "0, lane_id", "moe"),
    ("moe_router_sigmoid.body", "bias, scaling[0]", "logits, scaling[0]", "moe"),
    ("moe_router.h", "add_rn(sum, 1e-20f)", "add_rn(sum, 1e-2f)", "moe"),
    ("moe_router.h", "taken |= winner % 32u == lane", "taken |= winner % 32u != lane", "moe"),
    ("moe_experts_gate_up.body", "slot * I, row", "slot * I + 1, row", "moe"),
    ("moe_experts_gate_up.body", "up_biases), E,", "up_biases), E + 1,", "moe"),
    ("moe_experts_down.body", "down_biases), E,", "down_biases), E + 1,", "moe"),
    ("moe_experts_down.body", "weights[group_y * K + i]", "weights[i]", "moe"),
    ("moe_experts_down.body", "STEPS ? rounded<T>(part) : part", "part", "moe"),
    ("gather_qmm_swiglu.body", "matrix < uint(MATRICES) ? E : 0", "E", "moe"),
    ("embed.body", "token * (H / GROUP) + i / GROUP", "token * (H / GROUP)", "stages"),
    ("embed.body", "token < uint(V)", "token <= uint(V)", "stages"),
    ("embed.body", "i * BITS % 32u", "0u", "stages"),
    ("norm_gate_up.body", "x + group_y * H", "x", "stages"),
    ("norm_gate_up.body", "group_y * I, row, I", "group_y * I, row, I + 4", "stages"),
    ("mla_unembed.body", "group_y, V, LORA", "0, V, LORA", "stages"),
    ("mla_unembed.body", "group_barrier();\n", "", "stages"),
    ("mla_unembed.body", "share[s], sum", "1.0f, sum", "stages"),
    ("norm_qkv.body", "first = NQ + NK;", "first = NQ;", "stages"),
    ("norm_qkv.body", "x + group_y * STRIDE", "x + group_y * H", "stages"),
    ("norm_router_sigmoid.body", "scaling[0]", "1.0f", "stages"),
    ("norm_router_sigmoid.body", "logits[row] = rounded<T>(sum)", "logits[row] = sum", "stages"),
    ("norm_router_sigmoid.body", "out[group_x * H + k]", "out[k]", "stages"),
    (
        "norm_router_softmax.body",
        "row < uint(E); row += 64",
        "row < uint(E) && row < 64; row += 64",
        "stages",
    ),
    ("moe_experts_gate_up_shared.body", "group_y < uint(K)", "group_y <= uint(K)", "stages"),
    ("moe_experts_down_shared.body", "parts[K * 4 + thread_id]", "0.0f", "stages"),
    ("moe_experts_down_residual.body", "float(residual[i])", "0.0f", "stages"),
    ("moe_experts_down_residual.body", "rounded<T>(sum)", "sum", "stages"),
    ("moe_experts_down_shared.body", "stack = E;", "stack = 1;", "stages"),
    ("moe_experts_gate_up_shared.body", "expert = indices", "expert = 0u * indices", "stages"),
    ("linear_residual.body", "i = group_y * ROWS", "i = 0u * ROWS", "stages"),
    ("linear_residual.body", "x + group_y * COLS", "x", "stages"),
]

# What no test can see, with the reason: (file, what is planted).
EQUIVALENT = {
    ("attention_gqa.body", "group_y == 0u"): "another stretch takes the newest position, once",
}


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
    alive = [
        m for line, m in zip(lines, chosen, strict=True)
        if not line.startswith("killed") and (m[0], m[2]) not in EQUIVALENT
    ]
    print(f"{len(chosen)} mutants, {len(alive)} alive that change something")
    sys.exit(len(alive) > 0.05 * len(chosen))


if __name__ == "__main__":
    main()
