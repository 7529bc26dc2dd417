"""Measure a model's perplexity, binarized or not, on a held-out text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .printing import fields, size

EXAMPLES = """\
  %(prog)s smollm2-arb
  %(prog)s smollm2-arb --text my-held-out-text.txt --context-length 1024 --max-windows 10 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a causal language model")
    parser.add_argument(
        "--text",
        default="wikitext-2-test",
        metavar="NAME_OR_PATH",
        help="a text file, or a bundled text (default: wikitext-2-test)",
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="tokens of a window (default: 2048, or the model's positions if they are fewer)",
    )
    parser.add_argument("--max-windows", type=int, metavar="N", help="measure only the first N windows")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows of a forward pass (default: 1)")
    parser.add_argument(
        "--max-perplexity", type=float, metavar="X", help="exit with 1 where the perplexity is above this"
    )
    parser.add_argument("--backend", metavar="NAME", help="how a binarized model computes (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's own, default), float32, bfloat16, ...")
    parser.add_argument("--device-map", default="cpu", metavar="MAP", help="cpu (default), cuda, auto, ...")
    parser.add_argument(
        "--record", action="store_true", help="write the result into MODEL, a binarized one's directory, and its card"
    )


def run(args: argparse.Namespace) -> int:
    from ..evaluate.perplexity import model_positions, perplexity, read_text
    from ..hub import record_perplexity
    from .loading import load_model, load_tokenizer, quantization_method

    if args.record and (not Path(args.model).is_dir() or quantization_method(args.model) != "arb"):
        raise ValueError(f"--record needs the directory of a binarized model, and {args.model} is none.")
    read_text(args.text)  # a missing text is told before the model is loaded
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=args.dtype, device_map=args.device_map, backend=args.backend)
    result = perplexity(
        model,
        tokenizer,
        text=args.text,
        context_length=args.context_length or min(2048, model_positions(model) or 2048),
        max_windows=args.max_windows,
        batch_size=args.batch_size,
        progress=not args.json,
    )
    if args.record:
        record_perplexity(args.model, result)
    config: Any = getattr(model.config, "quantization_config", None)
    bits = getattr(config, "bits_per_weight", None)
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    failed = args.max_perplexity is not None and not result.perplexity <= args.max_perplexity
    if args.json:
        print(json.dumps({"model": args.model, "bits_per_weight": bits, "bytes": parameters, **result.to_dict()}))
        return int(failed)
    pairs = [
        ("model", args.model),
        ("perplexity", f"{result.perplexity:,.2f}"),
        ("text", result.text),
        ("tokens predicted", f"{result.tokens:,} in {result.windows} windows of {result.context_length}"),
        ("negative log likelihood", f"{result.negative_log_likelihood:.4f} nats a token"),
        ("bytes of all parameters", size(parameters)),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    if bits is not None:
        calibration = getattr(config, "calibration", None)
        pairs.insert(1, ("binarized", f"{config.method}, {bits:.4f} true bits per weight"))
        pairs.insert(2, ("calibrated on", describe_calibration(calibration)))
    if args.max_perplexity is not None:
        pairs.append(("check", f"{'above' if failed else 'at most'} {args.max_perplexity:,.2f}"))
    print(fields(pairs))
    return int(failed)


def describe_calibration(calibration: dict | None) -> str:
    """One line about the calibration that a configuration records."""
    if not calibration:
        return "nothing (data-free)"
    return ", ".join(f"{name} {value}" for name, value in calibration.items() if value != [])
