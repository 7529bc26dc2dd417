"""Find the fastest GPU kernels for a model's shapes on this GPU, and keep them for later runs."""

from __future__ import annotations

import argparse
import os
import time

from .printing import json_text

EXAMPLES = """\
  %(prog)s llama-2-7b-arb                              the shapes of a binarized model
  %(prog)s --shapes 4096x4096,11008x4096 --planes 1,2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a binarized model: a directory or a name on the Hub")
    parser.add_argument("--shapes", help="OUTxIN,... instead of a model's")
    parser.add_argument("--planes", default="1,2", help="sign planes that go with --shapes (1,2)")
    parser.add_argument("--permuted", action="store_true", help="columns in an order of their own, as by --act-order")
    parser.add_argument("--tokens", help="numbers of tokens (all of the table's)")
    parser.add_argument("--workers", type=int, default=max(1, min(16, (os.cpu_count() or 2) - 1)), help="compiling")
    parser.add_argument("--seconds", type=float, help="stop timing after this many; what was found is kept")
    parser.add_argument("--output", help="write the table here instead of the user's cache directory")


def run(args: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("tune times kernels on a GPU, and torch sees none here.")
    from pathlib import Path

    from ..ops.backends.triton import table as tables
    from ..ops.backends.triton.tune import tune

    if (args.model is None) == (args.shapes is None):
        raise ValueError("Give a binarized model, or --shapes OUTxIN,... .")
    shapes = _parse_shapes(args.shapes, args.planes) if args.shapes else _model_shapes(args.model)
    tokens = tables.TOKENS if args.tokens is None else tuple(int(t) for t in args.tokens.split(","))
    if unknown := set(tokens) - set(tables.TOKENS):
        raise ValueError(f"--tokens {sorted(unknown)}: the table has entries for {tables.TOKENS} only.")
    path = Path(args.output) if args.output else tables.user_directory() / tables.device_file(torch.device("cuda", 0))
    kept = {tables.key(e): e for e in tables.read(path)}
    rows = []
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    for entry, baseline in tune(shapes, tokens, args.workers, deadline, args.permuted):
        kept[tables.key(entry)] = entry
        tables.write(path, kept.values())
        config = " ".join(f"{k}={v}" for k, v in entry.config.items() if k != "kernel")
        rows.append(
            [
                f"{entry.out_features}x{entry.in_features}",
                str(entry.planes),
                str(entry.tokens),
                f"{baseline:.1f}",
                f"{entry.microseconds:.1f}",
                f"{baseline / entry.microseconds:.2f}",
                entry.kernel,
                config,
            ]
        )
        if not args.json:
            print(
                ("{:>12} planes {} tokens {:>4}  bf16 {:>7} us, ours {:>7}: {:>5} times  {} {}").format(*rows[-1]),
                flush=True,
            )
    if args.json:
        print(json_text({"table": str(path), "rows": rows}))
    else:
        print(f"written to {path}")


def _parse_shapes(text: str, planes: str) -> list[tuple[int, int, int]]:
    try:
        pairs = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
        return [(n, k, int(p)) for n, k in pairs for p in planes.split(",")]
    except ValueError as error:
        raise ValueError(f"--shapes {text!r} --planes {planes!r}: write 4096x4096,11008x4096 and 1,2.") from error


def _model_shapes(name: str) -> list[tuple[int, int, int]]:
    from ..nn import ARBLinear
    from .loading import load_model

    model = load_model(name)
    found = {
        (module.out_features, module.in_features, module.layout.planes)
        for module in model.modules()
        if isinstance(module, ARBLinear)
    }
    if not found:
        raise ValueError(f"{name} has no binarized layers: binarize it first (optimum-arb quantize).")
    return sorted(found)
