"""Write a binarized model as one file for another runtime: GGUF for llama.cpp."""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import TYPE_CHECKING

from .printing import fields, json_text, size, table

if TYPE_CHECKING:
    from ..export import GGUFReport

EXAMPLES = """\
  %(prog)s my-model my-model.gguf
  %(prog)s my-model my-model.gguf --embedding-type Q8_0 --allow-lossy

A model that is exported without loss: `quantize --no-col-scale --no-act-order`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a binarized model")
    parser.add_argument("out", metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--to", default="gguf", choices=["gguf"], help="the format (default: gguf)")
    parser.add_argument(
        "--embedding-type",
        default="auto",
        metavar="TYPE",
        help="of the embedding and the output layer: auto (the narrowest of Q8_0, F16, BF16, F32 that is exact; "
        "default), F32, F16, BF16 or Q8_0",
    )
    parser.add_argument(
        "--float-type",
        default="auto",
        metavar="TYPE",
        help="the same for other linears in float; F32 also for binarized weights that no narrower type holds",
    )
    parser.add_argument("--allow-lossy", action="store_true", help="write what is not exact, and tell by how much")
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="llama.cpp's name of the tokenizer's rule for words")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out of the file")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..export import export_gguf
    from ..output_files import check_writable
    from .loading import check_model, load_model, load_tokenizer, quantization_method

    check_model(args.model)
    if not args.out:
        raise ValueError("The file to write has an empty name.")
    check_writable(args.out)
    if Path(args.out).exists() and not args.overwrite:  # told before the model is loaded
        raise FileExistsError(f"{args.out} already exists. Choose another name, or --overwrite it.")
    if quantization_method(args.model) != "arb":
        raise ValueError(f"{args.model} is not binarized: binarize it first (quantize --no-col-scale --no-act-order).")
    tokenizer = None if args.no_tokenizer else load_tokenizer(args.model)
    model = load_model(args.model)
    report = export_gguf(
        model,
        tokenizer,
        args.out,
        name=Path(args.model).name,
        embedding_type=args.embedding_type,
        float_type=args.float_type,
        pre_tokenizer=args.pre_tokenizer,
        allow_lossy=args.allow_lossy,
        overwrite=args.overwrite,
    )
    print(json_text({"model": args.model, **report.to_dict()}) if args.json else describe(args.model, report))


def describe(model: str, report: GGUFReport) -> str:
    """The readable form."""
    from ..layer_warnings import kind_of

    groups = defaultdict(list)
    for tensor in report.tensors:
        groups[kind_of(tensor.name), tensor.kind, tensor.reason].append(tensor)
    rows = [
        [
            name,
            str(len(tensors)),
            kind,
            f"{sum(tensor.bytes for tensor in tensors):,}",
            "exact" if not any(tensor.difference for tensor in tensors) else _worst(tensors),
            reason or "-",
        ]
        for (name, kind, reason), tensors in groups.items()
    ]
    text = table(["tensor", "count", "type", "bytes", "difference", "why not Q1_0"], rows)
    pairs = [
        ("exported", f"{model} -> {report.path}"),
        ("architecture", f"{report.architecture}, {'with' if report.tokenizer else 'without'} tokenizer"),
        ("bits per weight", f"{report.bits_per_weight:.4f} in the file (binarized weights)"),
        ("bytes of the file", f"{report.file_bytes:,} ({size(report.file_bytes)})"),
        ("values", "all as in the model" if report.exact else "NOT all as in the model: see the differences above"),
    ]
    pairs += [("note", note) for note in report.notes]
    return text + "\n\n" + fields(pairs)


def _worst(tensors: list) -> str:
    return f"{max(tensor.difference for tensor in tensors):.1e}"
