"""Measure methods side by side on your model: true bits, perplexity, a plot. Goes on where it was stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .printing import fields, json_text, size, table

EXAMPLES = """\
  %(prog)s my-model --methods rtn,arb-hrc:1,arb-hrc:2 --num-samples 32 --sequence-length 1024 --max-windows 30
  %(prog)s my-model --methods billm:published,arb-rc:published,arb-hrc:1,arb-hrc:2,hqq:2 --eval my-held-out-text.txt

A row takes as long as quantize and evaluate together. Run again with the same --out, an interrupted comparison goes on
after its last finished row, and further methods are added to it."""
DEFAULT_METHODS = "rtn,billm,arb,arb-x,arb-rc,arb-hrc:1,arb-hrc:2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a float model")
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="LIST",
        help="of rtn, billm, arb, arb-x, arb-rc (each of the last four with :published for the method as its authors "
        "released it), arb-hrc:1 to :3, arb-dbf:BITS, gguf, hqq:2; behind a method choices of ARBConfig, as in "
        "arb-hrc:2:hadamard=128:scale_bits=8; full precision is always there "
        f"(default: {DEFAULT_METHODS})",
    )
    parser.add_argument("--out", default="comparison", metavar="DIR", help="of the results (default: comparison)")
    parser.add_argument(
        "--eval", dest="text", default="wikitext-2-test", metavar="NAME_OR_PATH",
        help="text of the perplexity: a file, or a bundled text (default: wikitext-2-test)",
    )  # fmt: skip
    parser.add_argument("--context-length", type=int, metavar="TOKENS", help="tokens of a window (default: 2048)")
    parser.add_argument("--max-windows", type=int, metavar="N", help="measure only the first N windows")
    parser.add_argument("--dataset", default="wikitext-2", metavar="NAME_OR_PATH", help="calibration text")
    parser.add_argument("--num-samples", type=int, default=128, metavar="N", help="calibration sequences (128)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="TOKENS", help="their length (2048)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="where samples are drawn (default: 0)")
    parser.add_argument("--dtype", default="float32", help="of loading and measuring (default: float32)")
    parser.add_argument("--device-map", default="cpu", metavar="MAP", help="cpu (default), cuda, ...")
    parser.add_argument("--no-plot", action="store_true", help="no picture, which needs matplotlib")


def run(args: argparse.Namespace) -> int:
    from ..evaluate.compare import Settings, compare
    from ..evaluate.plot import plot_comparison
    from ..output_files import whole
    from .loading import check_loading, check_model, quantization_method

    if not args.out:  # a shell's unset variable, which would be the current directory
        raise ValueError("--out has an empty name.")
    check_model(args.model)
    check_loading(args.dtype, args.device_map)
    method = quantization_method(args.model)
    if method is not None:
        raise ValueError(f"{args.model} is already quantized ({method}): compare starts from the float model.")
    keys = ("model", "text", "context_length", "max_windows", "dataset", "num_samples", "sequence_length", "seed")
    settings = Settings(**{key: getattr(args, key) for key in (*keys, "dtype", "device_map")})
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    if not names:
        raise ValueError("--methods names no method.")
    if not args.no_plot:
        _check_plot()
    rows = compare(
        settings, names, args.out, progress=lambda line: print(line, file=sys.stderr, flush=True), bars=not args.json
    )
    out = Path(args.out)
    with whole(out / "compare.md") as unfinished:
        unfinished.write_text(markdown(rows) + "\n", encoding="utf-8")
    plots = [] if args.no_plot else plot_comparison(rows, out, f"{Path(args.model).name}, {args.text}")
    failed = [name for name, row in rows.items() if "error" in row]
    if args.json:
        print(json_text({"model": args.model, "out": args.out, "rows": rows, "plots": [str(path) for path in plots]}))
        return int(bool(failed))
    pairs = [("table", str(out / "compare.md")), *(("plot", str(path)) for path in plots)]
    pairs += [("failed", f"{name}: {rows[name]['error']}") for name in failed]
    print(table(HEADERS, [cells(name, row) for name, row in rows.items()]) + "\n\n" + fields(pairs))
    return int(bool(failed))


HEADERS = ["method", "true bits", "model", "weight error", "output error", "perplexity", "seconds"]


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "error" in row:
        return [name, "-", "-", "-", "-", "failed", "-"]
    errors = [row.get(key) for key in ("weight_error", "output_error")]
    return [
        name,
        f"{row['bits_per_weight']:.3f}",
        size(row["model_bytes"]),
        *("-" if error is None else f"{error:.4f}" for error in errors),
        f"{row['perplexity']['perplexity']:,.2f}",
        f"{row['seconds']:.0f}" if "seconds" in row else "-",
    ]


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table for a document."""
    lines = [HEADERS, ["---"] * len(HEADERS), *(cells(name, row) for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check_plot() -> None:
    """Told before hours of measuring."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("The plot needs matplotlib: pip install 'optimum-arb[plot]', or give --no-plot.")
