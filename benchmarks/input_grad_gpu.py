"""Microseconds of the input's gradient through a packed layer on a GPU, beside torch's bfloat16 product.

    python benchmarks/input_grad_gpu.py
    python benchmarks/input_grad_gpu.py --shapes 4096x4096 --tokens 2048 --planes 1

What LoRA training takes going back: `grad W`, of a packed weight through the dense one, which is made for the call.
Medians of replays of a CUDA graph over four weights. Each result is first compared with a float32 product.
"""

from __future__ import annotations

import argparse

import torch

from optimum_arb.format.layout import planes_layout
from optimum_arb.ops.backends.triton.gemm import gemm_input_grad
from optimum_arb.ops.backends.triton.timing import graph_time, random_weight

COPIES = 4


def measure(out_features: int, in_features: int, tokens: int, planes: list[int]) -> str:
    """A row of the table."""
    grad = torch.randn(tokens, out_features, device="cuda", dtype=torch.bfloat16)
    shape = (COPIES, out_features, in_features)
    dense = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    baseline = graph_time(lambda i, w=dense: torch.mm(grad, w[i]), COPIES, 5)  # type: ignore[misc]
    cells = [f"{out_features} x {in_features}", str(tokens), f"{baseline:.1f}"]
    for count in planes:
        layout = planes_layout(count, col_scale=True)
        weights = [random_weight(layout, out_features, in_features, 128, False, "cuda", s) for s in range(COPIES)]
        expected = grad.float() @ weights[0].unpack().dequantize()
        wrong = float((gemm_input_grad(grad, weights[0]).float() - expected).norm() / expected.norm())
        if not wrong < 1e-2:
            raise SystemExit(f"{cells[0]}, {count} planes: a relative error of {wrong:.1e}")
        took = graph_time(lambda i, w=weights: gemm_input_grad(grad, w[i]), COPIES, 5)  # type: ignore[misc]
        cells.append(f"{took:.1f}, {baseline / took:.2f}x")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="The input's gradient through packed layers against bfloat16.")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,8192x8192", help="OUTxIN,...")
    parser.add_argument("--tokens", default="512,2048,8192")
    parser.add_argument("--planes", default="1,2")
    args = parser.parse_args()
    planes = [int(count) for count in args.planes.split(",")]
    print("| shape | tokens | bf16, µs | " + " | ".join(f"{count} planes" for count in planes) + " |")
    print("|---" * (3 + len(planes)) + "|")
    for shape in args.shapes.split(","):
        rows, columns = (int(size) for size in shape.split("x"))
        for tokens in args.tokens.split(","):
            print(measure(rows, columns, int(tokens), planes), flush=True)


if __name__ == "__main__":
    main()
