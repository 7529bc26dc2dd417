"""Binarize a model and save it packed, with its tokenizer, a decoder layer in memory at a time.

Calibrates on a text unless --no-calibration is given. Options that are left out have the defaults of `ARBConfig`. A run
that was interrupted or killed goes on with --resume behind the last layer that it finished.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from .method_options import add_method_arguments, build_config
from .printing import fields, json_text, ratio, size, table

if TYPE_CHECKING:
    from ..calibration.ranks import Ranks
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


def run(args: argparse.Namespace) -> None:
    from ..calibration.distributed import distributed

    with distributed(args.rank_timeout) as ranks:
        _run(args, ranks)


def _run(args: argparse.Namespace, ranks: Ranks) -> None:
    from ..checkpoint.quantize import quantize_checkpoint
    from ..hub import check_access, push_directory
    from ..saving import check_not_source, check_output_directory
    from .loading import check_loading, check_model, load_processor, quantization_method

    check_not_source(args.out, args.model)  # before it is told that --overwrite replaces a model
    if not args.resume:  # of a run that was interrupted at its very end, the model may be there already
        check_output_directory(args.out, overwrite=args.overwrite)
    config = build_config(args)
    check_model(args.model)
    check_loading(args.dtype, args.device_map)
    if args.base_model == "":
        raise ValueError("--base-model has an empty name.")
    if args.push_to_hub == "":  # a shell's unset variable: not uploading would look like success
        raise ValueError("--push-to-hub has an empty name.")
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
        print(json_text(result))
    else:
        print(describe(args.model, args.out, report, seconds))
        if args.push_to_hub:
            print(f"uploaded to {args.push_to_hub}")


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
