"""The options of `quantize` and `estimate` that say how to binarize and what to calibrate on."""

from __future__ import annotations

import argparse
import inspect
import json
from collections import defaultdict
from typing import Any


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of which `build_config` makes an `ARBConfig`: what it takes has the name of its own option."""
    method = parser.add_argument_group("method")
    method.add_argument("--method", help="arb-hrc (default), arb-dbf, auto, arb-rc, arb-x, arb, billm or rtn")
    method.add_argument("--planes", type=int, metavar="N", help="sign planes of arb-hrc: 1 (default), 2 or 3")
    method.add_argument(
        "--factor-bits",
        type=float,
        metavar="X",
        help="true bits a weight of arb-dbf, which decide its ranks (default: 1)",
    )
    method.add_argument(
        "--target-bits-per-weight",
        type=float,
        metavar="X",
        help="true bits a weight of all linears together: planes of arb-hrc, ranks of arb-dbf, or with --method auto "
        "either, are chosen linear by linear",
    )
    method.add_argument("--scale-bits", type=int, metavar="N", help="bits of a stored scale: 16 (default) or 8")
    method.add_argument("--rank", type=int, metavar="N", help="rank of arb-dbf, the same for every linear")
    method.add_argument(
        "--block-size", type=int, metavar="N", help="columns that share a row scale: 128 (default), 64, -1 = whole row"
    )
    method.add_argument("--group-bitmap", metavar="WHICH", help="all, non-salient or none (the papers' methods)")
    method.add_argument(
        "--salient-columns", type=_search_or_int, metavar="N", help="search or a number (the papers' methods)"
    )
    method.add_argument("--num-iterations", type=int, metavar="N", help="rounds of the method's updates")
    method.add_argument(
        "--refinement-sweeps",
        type=int,
        metavar="N",
        help="how often arb-hrc fits all blocks again (default: 2; block after block 1, or 0 for one plane)",
    )
    method.add_argument("--compensation", metavar="KIND", help="exact (default) or diagonal (as published)")
    method.add_argument("--split-metric", metavar="KIND", help="weight (default) or score (as published)")
    method.add_argument(
        "--damp-percent",
        type=float,
        metavar="X",
        help="damping of the calibration matrix: 0.02 for arb-hrc, 0.05 for arb-dbf, else 0.01",
    )
    method.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        help="binarize columns in the order of their activations (default: arb-hrc block after block)",
    )
    method.add_argument(
        "--col-scale",
        action=argparse.BooleanOptionalAction,
        help="column scales of arb-hrc (default: yes); without them and without the order, a model of one plane is "
        "exported to GGUF without loss",
    )
    method.add_argument(
        "--hadamard",
        type=int,
        metavar="N",
        help="columns of the blocks of a Hadamard transform of arb-hrc's inputs: 64, 128, 256; 0 for none (default)",
    )
    method.add_argument(
        "--admm-iterations",
        type=int,
        metavar="N",
        help="iterations of arb-hrc's search of all blocks at once (default: 25; 0: block after block)",
    )
    method.add_argument(
        "--shrinkage",
        type=float,
        metavar="X",
        help="how much smaller the calibration matrix is made beside its diagonal (default: 0.05 for arb-hrc, else 0)",
    )
    method.add_argument(
        "--error-correction",
        type=float,
        metavar="X",
        help="how far each linear makes up for errors made before it, from 0 to 1 (default: the method's own choice)",
    )
    method.add_argument(
        "--refine",
        metavar="HOW",
        help="tune each binarized layer to the float model's outputs (block), and then the whole model (model)",
    )
    method.add_argument("--refine-steps", type=int, metavar="N", help="steps of each layer's tuning (default: 120)")
    method.add_argument(
        "--refine-learning-rate", type=float, metavar="X", help="of scales and norms, relative (default: 0.005)"
    )
    method.add_argument(
        "--refine-signs", action=argparse.BooleanOptionalAction, help="tune the signs too (default: yes)"
    )
    method.add_argument(
        "--modules-to-not-convert", nargs="+", metavar="PATTERN", help="linears to keep in float: suffixes, or re:..."
    )
    method.add_argument(
        "--other-modalities",
        action="store_true",
        default=None,
        help="binarize the vision and audio towers beside a language model too (they stay in float by default)",
    )
    method.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=KEY:VALUE",
        help="another choice for some linears, e.g. 'down_proj=planes:2,block_size:64' or 'layers.0.mlp.up_proj=skip'",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument("--dataset", metavar="NAME_OR_PATH", help="text to calibrate on (default: wikitext-2)")
    calibration.add_argument("--num-samples", type=int, metavar="N", help="calibration sequences (default: 128)")
    calibration.add_argument(
        "--held-out-samples",
        type=int,
        metavar="N",
        help="how many of them nothing is fitted to: the report tells the errors on them too (default: 0)",
    )
    calibration.add_argument("--sequence-length", type=int, metavar="TOKENS", help="their length (default: 2048)")
    calibration.add_argument("--batch-size", type=int, metavar="N", help="sequences of a batch")
    calibration.add_argument("--seed", type=int, metavar="N", help="seed where samples are drawn (default: 0)")
    calibration.add_argument("--no-calibration", action="store_true", help="binarize from the weights alone")


def build_config(args: argparse.Namespace) -> Any:
    """The `ARBConfig` of the options.

    Raises:
        ValueError, TypeError: an option that it does not take.
    """
    from ..config import ARBConfig

    fields = inspect.signature(ARBConfig).parameters
    choices = {name: choice for name, choice in vars(args).items() if name in fields and choice is not None}
    if args.no_calibration:
        given = [
            name
            for name in ("dataset", "num_samples", "held_out_samples", "sequence_length", "batch_size", "seed")
            if name in choices
        ]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} does nothing with --no-calibration: give one of the two.")
        choices["dataset"] = None
    return ARBConfig(**choices, overrides=parse_overrides(args.override))


def parse_overrides(texts: list[str]) -> dict[str, dict[str, Any]]:
    """`["down_proj=planes:2,block_size:64", "q_proj=skip"]` as `ARBConfig` takes it.

    Raises:
        ValueError: no "=", or an entry that is neither KEY:VALUE nor skip.
    """
    overrides: dict[str, dict[str, Any]] = defaultdict(dict)
    for text in texts:
        # The last "=", since a regular expression may hold others.
        pattern, _, choices = text.rpartition("=")
        for choice in choices.split(","):
            key, colon, value = choice.partition(":")
            if not pattern or (not colon and key != "skip"):
                raise ValueError(f"--override {text!r} must be PATTERN=KEY:VALUE[,KEY:VALUE...] or PATTERN=skip.")
            if key in overrides[pattern]:
                raise ValueError(f"--override gives {key} of {pattern!r} twice: give it once.")
            overrides[pattern][key] = _value(value) if colon else True
    return dict(overrides)


def _search_or_int(text: str) -> str | int:
    if text != "search" and not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither search nor a number")
    return text if text == "search" else int(text)


def _value(text: str) -> Any:
    """A number, true or false where it reads as one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
