"""Tell what binarizing a model will take, from its config.json: time, memory, bytes, true bits."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from .method_options import add_method_arguments, build_config
from .printing import fields, json_text, size

if TYPE_CHECKING:
    from ..checkpoint.estimate import Estimate

EXAMPLES = """\
  %(prog)s meta-llama/Llama-2-7b-hf --planes 2 --memory-limit 64GB
  %(prog)s my-model --method arb-rc --num-samples 32 --no-probe

It takes quantize's options of the method and the calibration. Up to 20 seconds go into timing this machine on random
weights of the model's shapes; other load on the machine shows in the result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of the model to binarize")
    add_method_arguments(parser)
    other = parser.add_argument_group("machine")
    other.add_argument("--dtype", default="auto", help="auto (the checkpoint's own, default), float32, bfloat16, ...")
    other.add_argument("--device-map", default="cpu", metavar="MAP", help="cpu (default) or cuda")
    other.add_argument("--activations-on-disk", action="store_true", help="as quantize would be told")
    other.add_argument("--no-probe", action="store_true", help="no timing of this machine, and no time")
    other.add_argument("--memory-limit", metavar="SIZE", help="exit with 1 where more memory is needed, e.g. 64GB")
    other.add_argument("--gpu-memory", metavar="SIZE", help="the same for the GPU's memory, e.g. 24GiB")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.estimate import estimate
    from .loading import check_model, naming

    limits = {
        key: parse_size(getattr(args, key)) for key in ("memory_limit", "gpu_memory") if getattr(args, key) is not None
    }
    if args.device_map not in ("cpu", "cuda"):
        raise ValueError(f"--device-map {args.device_map!r} cannot be estimated: use cpu or cuda.")
    if args.gpu_memory is not None and args.device_map == "cpu":
        raise ValueError("--gpu-memory does nothing with --device-map cpu: give --device-map cuda.")
    config = build_config(args)
    check_model(args.model)
    budget = None if args.no_probe else 20.0
    with naming(args.model):
        result = estimate(args.model, config, args.dtype, args.device_map, budget, args.activations_on_disk)
    over = []
    if "memory_limit" in limits and result.peak_ram_bytes > limits["memory_limit"]:
        over.append("memory_limit")
    if "gpu_memory" in limits and (result.peak_gpu_bytes or 0) > limits["gpu_memory"]:
        over.append("gpu_memory")
    print(json_text({**result.to_dict(), "over_limits": over}) if args.json else describe(result, over))
    return int(bool(over))


def describe(result: Estimate, over: list[str]) -> str:
    """The readable form."""
    bits = f"{result.bits_per_weight:.4f}"
    if result.bits_range is not None:
        bits += f" ({result.bits_range[0]:.2f} to {result.bits_range[1]:.2f})"
    pairs = [
        ("model", result.model),
        ("method", f"{result.method}, {result.modules} linears, {result.weights:,} weights"),
        ("true bits per weight", bits),
        ("bytes binarized", f"{result.packed_bytes:,} ({size(result.packed_bytes)})"),
        ("bytes in float", f"{result.float_bytes:,} ({size(result.float_bytes)})"),
        ("bytes of the files", f"{result.file_bytes:,} ({size(result.file_bytes)})"),
        ("peak memory", size(result.peak_ram_bytes)),
    ]
    if result.peak_gpu_bytes is not None:
        pairs.append(("peak GPU memory", size(result.peak_gpu_bytes)))
    if result.probe is not None:
        measured = result.probe
        if result.seconds is not None and measured.forward_seconds is not None:
            parts = f"fits {duration(measured.fit_seconds)}, calibration {duration(measured.forward_seconds)}"
            pairs.append(("time", f"{duration(result.seconds)} ({parts}; {measured.threads} threads)"))
        pairs.append(("probe", duration(measured.probe_seconds)))
    pairs += [("assumes", text) for text in result.assumptions]
    pairs += [("in float", f"{count} linears: {reason}") for reason, count in result.kept.items()]
    pairs += [("TOO MUCH", f"more than --{key.replace('_', '-')}") for key in over]
    return fields(pairs)


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "64GB", "500MB" or a plain number.

    Raises:
        ValueError: none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kKMGT]?)(i?)B?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is no size: write 24GiB, 64GB or a number of bytes.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
