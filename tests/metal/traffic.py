"""Bytes and dispatches of one decoded token from the geometry, and what published bandwidths make
of them. Estimates: nothing here was measured on Apple hardware.

    python tests/metal/traffic.py [--context 1024]
"""

import argparse

BITS = 4.5  # of a 4-bit weight at group 64, with its bf16 scale and bias
# Published memory bandwidth, GB/s.
MACHINES = {"M1 Max": 400, "M2 Max": 400, "M3 Max (40 cores)": 400, "M4 Max (40 cores)": 546,
            "M5 Max (40 cores)": 614}
# Assumed, not measured: share of that bandwidth that a decode reaches, and microseconds from the
# end of one dependent dispatch to the start of the next in one command buffer.
SHARE, GAP_US = 0.75, 2.0


def weights(*shapes, bits=BITS):
    """Bytes of matrices (rows, columns)."""
    return sum(rows * columns for rows, columns in shapes) * bits / 8


def qwen(context):
    """[(stage, bytes)] of one layer, layers, bytes outside the layers."""
    h, width, k = 2048, 768, 8
    layer = [
        ("norm_qkv", weights((4096, h), (512, h), (512, h))),
        ("attention_gqa", context * 4 * 128 * 2 * 2),
        ("attention_out", weights((h, 4096))),
        ("norm_router_softmax", weights((128, h), bits=8.5)),
        ("moe_experts_gate_up", k * weights((width, h), (width, h))),
        ("moe_experts_down_residual", k * weights((h, width))),
    ]
    return layer, 48, weights((151936, h))


def glm(context):
    """The same for GLM-4.7-Flash; the dense first layer is counted as a MoE layer of its bytes."""
    h, width, k, heads = 2048, 1536, 5, 20  # the shared expert is the fifth
    layer = [
        ("norm_qkv (q_a, kv_a)", weights((768, h), (576, h))),
        ("norm_qkv (q_b)", weights((heads * 256, 768))),
        ("attention_mla", heads * weights((512, 192)) + context * 576 * 2),
        ("mla_unembed", heads * weights((256, 512))),
        ("linear_residual (o)", weights((h, heads * 256))),
        ("norm_router_sigmoid", 64 * h * 2),
        ("moe_experts_gate_up_shared", k * weights((width, h), (width, h))),
        ("moe_experts_down_shared", k * weights((h, width))),
    ]
    return layer, 47, weights((154880, h))


def report(name, model, context):
    layer, layers, rest = model(context)
    print(f"\n### {name}, {context} cached tokens\n")
    print("| dispatch of a layer | MB read |\n|---|---|")
    for stage, size in layer:
        print(f"| {stage} | {size / 1e6:.2f} |")
    per_layer = sum(size for _, size in layer)
    total, dispatches = per_layer * layers + rest, len(layer) * layers + 3
    print(f"\nA layer {per_layer / 1e6:.1f} MB in {len(layer)} dispatches; a token "
          f"{total / 1e9:.2f} GB in {dispatches} dispatches (embedding, lm_head and argmax: 3).\n")
    print("| machine | GB/s, published | bound, tok/s | estimate, tok/s |\n|---|---|---|---|")
    for machine, bandwidth in MACHINES.items():
        bound = total / bandwidth / 1e9
        estimate = bound / SHARE + dispatches * GAP_US * 1e-6
        print(f"| {machine} | {bandwidth} | {1 / bound:.0f} | {1 / estimate:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    report("Qwen3-30B-A3B, 4 bits", qwen, args.context)
    report("GLM-4.7-Flash, 4 bits", glm, args.context)


if __name__ == "__main__":
    main()
