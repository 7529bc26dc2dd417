"""Binarize a model and save it packed, with its tokenizer, a decoder layer in memory at a time.

Calibrates on a text unless --no-calibration is given. Options that are left out have the defaults of `ARBConfig`. A run
that was interrupted or killed goes on with --resume behind the last layer that it finished.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from .printing import fields, ratio, size, table

if TYPE_CHECKING:
    from ..calibration.distributed import Ranks
    from ..report import ModelReport

# Errors of a module -> the heads of their columns.
ERRORS = {"weight_error": "weight error", "output_error": "output error", "held_out_error": "held-out error"}

EXAMPLES = """\
  %(prog)s HuggingFaceTB/SmolLM2-135M-Instruct smollm2-arb --planes 2
  %(prog)s my-model my-model-arb --override down_proj=planes:3 --dataset my-texts.txt
  %(prog)s my-model for-llama-cpp --no-col-scale --no-act-order
  %(prog)s large-model large-model-arb --device-map cuda --activations-on-disk /scratch --resume
  torchrun --nproc-per-node 2 -m optimum_arb quantize large-model large-model-arb --device-map cuda"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of the model to binarize")
    parser.add_argument("out", metavar="OUT", help="directory to save it in")
    add_method_arguments(parser)
    other = parser.add_argument_group("loading and saving")
    other.add_argument("--dtype", default="auto", help="auto (the checkpoint's own, default), float32, bfloat16, ...")
    other.add_argument(
        "--device-map", default="cpu", metavar="MAP", help="where layers are binarized: cpu (default), cuda, auto"
    )
    other.add_argument("--max-shard-size", metavar="SIZE", help="size of a safetensors file, e.g. 2GB")
    other.add_argument(
        "--rank-timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="started by torchrun: how long a process waits for the others (default: 3600)",
    )
    other.add_argument("--overwrite", action="store_true", help="replace a model that lies in OUT")
    other.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    other.add_argument(
        "--activations-on-disk",
        nargs="?",
        const=True,
        default=False,
        metavar="DIR",
        help="keep the calibration's hidden states in files (in DIR, on a fast disk) and not in memory",
    )
    hub = parser.add_argument_group("upload")
    hub.add_argument(
        "--push-to-hub", metavar="REPO", help="upload what is in OUT to this model on the Hub, e.g. me/model"
    )
    hub.add_argument("--private", action="store_true", help="make it a private one, if it is new")
    hub.add_argument("--revision", metavar="BRANCH", help="the branch to upload to (default: main)")
    hub.add_argument(
        "--base-model", metavar="NAME", help="for the model card: MODEL's name on the Hub, where MODEL is a directory"
    )


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
    method.add_argument("--refine-steps", type=int, metavar="N", help="steps of each layer's tuning (default: 400)")
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


def run(args: argparse.Namespace) -> None:
    from ..calibration.distributed import distributed

    with distributed(args.rank_timeout) as ranks:
        _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    from ..checkpoint.quantize import quantize_checkpoint
    from ..hub import check_access, push_directory
    from ..saving import check_output_directory
    from .loading import check_model, load_processor, quantization_method

    if not args.resume:  # of a run that was interrupted at its very end, the model may be there already
        check_output_directory(args.out, overwrite=args.overwrite)
    config = build_config(args)
    check_model(args.model)
    if args.push_to_hub:
        check_access(args.push_to_hub)
    elif args.private or args.revision:
        raise ValueError(f"--{'private' if args.private else 'revision'} does nothing without --push-to-hub.")
    method = quantization_method(args.model)
    if method is not None:
        raise ValueError(
            f"{args.model} is already {'binarized' if method == 'arb' else f'quantized with {method}'}: "
            "start from the float model."
        )
    found = quantize_checkpoint(
        args.model,
        args.out,
        config,
        resume=args.resume,
        overwrite=args.overwrite,
        device=args.device_map,
        dtype=args.dtype,
        activations_on_disk=args.activations_on_disk,
        max_shard_size=args.max_shard_size,
        processor=load_processor(args.model),
    )
    if not ranks.is_first:
        return
    report, seconds = found.report, found.seconds
    if args.push_to_hub:
        options = {"private": args.private or None, "revision": args.revision}
        try:
            push_directory(found.path, args.push_to_hub, files=found.files, **options)
        except OSError as error:
            raise type(error)(
                f"{error} The model is saved in {args.out}; to try again: optimum-arb push {args.out} "
                f"{args.push_to_hub}"
            ) from error
    if args.json:
        result = {
            "model": args.model,
            "out": args.out,
            "pushed_to": args.push_to_hub,
            "seconds": seconds,
            "resumed_layers": found.resumed_layers,
            "config": found.config.to_dict(),
            **report.to_dict(),
        }
        print(json.dumps(result))
    else:
        print(describe(args.model, args.out, report, seconds))
        if args.push_to_hub:
            print(f"uploaded to {args.push_to_hub}")


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
            for name in ("dataset", "num_samples", "held_out_samples", "sequence_length", "seed")
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
            overrides[pattern][key] = _value(value) if colon else True
    return dict(overrides)


def describe(model: str, out: str, report: ModelReport, seconds: float) -> str:
    """The readable form."""
    from ..layer_warnings import kind_of, warning_lines

    kinds = defaultdict(list)
    for module in report.modules:
        kinds[kind_of(module.name)].append(module)
    rows = []
    for kind, modules in kinds.items():
        weights, count = sum(m.weights for m in modules), sum(m.stored_bytes for m in modules)
        methods = ", ".join(sorted({f"{m.method} ({m.layout})" for m in modules}))
        errors = [ratio(mean([getattr(m, key) for m in modules])) for key in ERRORS]
        rows.append([kind, str(len(modules)), methods, f"{count:,}", f"{8 * count / weights:.4f}", *errors])
    text = table(["binarized", "modules", "method", "bytes", "bits", *ERRORS.values()], rows)
    kept = Counter((kind_of(name), reason) for name, reason in report.kept.items())
    if kept:
        lines = [[kind, str(count), reason] for (kind, reason), count in kept.items()]
        text += "\n\n" + table(["stayed in float", "modules", "why"], lines)
    pairs = [
        ("saved", f"{model} -> {out}"),
        ("true bits per weight", f"{report.bits_per_weight:.4f} (binarized weights, every stored bit counted)"),
        ("bytes binarized", f"{report.packed_bytes:,} ({size(report.packed_bytes)})"),
        ("bytes of the model", f"{report.model_bytes:,} ({size(report.model_bytes)}), embeddings included"),
        ("mean output error", ratio(report.mean_output_error)),
        ("mean held-out error", ratio(report.mean_held_out_error)),
        ("seconds", f"{seconds:.1f}"),
        *(("LOOKS BROKEN", line) for line in warning_lines(report.warnings)),
    ]
    return text + "\n\n" + fields(pairs)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _search_or_int(text: str) -> str | int:
    return text if text == "search" else int(text)


def _value(text: str) -> Any:
    """A number, true or false where it reads as one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
