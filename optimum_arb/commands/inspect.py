"""Show what a binarized model holds: true bits, bytes, what stayed in float. No weights are loaded."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .printing import fields, size, table

if TYPE_CHECKING:
    from ..inspection import Inspection, StoredModule


EXAMPLES = """\
  %(prog)s smollm2-arb
  %(prog)s smollm2-arb --modules"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of a binarized model")
    parser.add_argument("--modules", action="store_true", help="one line for each module instead of each kind")


def run(args: argparse.Namespace) -> None:
    from ..inspection import inspect_model
    from .loading import check_model

    check_model(args.model)
    result = inspect_model(args.model)
    print(json.dumps(result.to_dict()) if args.json else describe(args.model, result, args.modules))


def describe(model: str, result: Inspection, every_module: bool = False) -> str:
    """The readable form."""
    from .evaluate import describe_calibration

    config = result.config
    packed = sum(module.stored_bytes for module in result.modules)
    text = fields(
        [
            ("model", model),
            ("method", f"{config.method}, format version {config.format_version}"),
            ("written by", f"optimum_arb {config.optimum_arb_version or 'unknown'}"),
            ("calibrated on", describe_calibration(config.calibration)),
            ("true bits per weight", f"{result.bits_per_weight:.4f} over {result.weights:,} binarized weights"),
            ("bytes binarized", f"{packed:,} ({size(packed)})"),
            ("bytes in float", f"{result.stored_bytes - packed:,} ({size(result.stored_bytes - packed)})"),
            ("bytes of all tensors", f"{result.stored_bytes:,} ({size(result.stored_bytes)})"),
            ("bytes of the files", f"{result.file_bytes:,} ({size(result.file_bytes)})"),
        ]
    )
    headers = ["binarized", "modules", "layout", "weights", "bytes", "bits"]
    if every_module:
        rows = [_row(module.name, [module]) for module in result.modules]
    else:
        rows = [_row(kind, modules) for kind, modules in by_kind(result.modules).items()]
    text += "\n\n" + table(headers, rows)
    return text + "\n\n" + table(["stayed in float", "bytes", "why"], _float_rows(result))


def by_kind(modules: Iterable[StoredModule]) -> dict[str, list[StoredModule]]:
    """Modules of the same role, layer numbers apart: "model.layers.*.mlp.up_proj"."""
    kinds: dict[str, list[StoredModule]] = defaultdict(list)
    for module in modules:
        kinds[kind_of(module.name)].append(module)
    return dict(kinds)


def kind_of(name: str) -> str:
    """A module's name with its numbers replaced by a star."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _row(name: str, modules: list[StoredModule]) -> list[str]:
    weights = sum(math.prod(module.shape) for module in modules)
    count = sum(module.stored_bytes for module in modules)
    layouts = ", ".join(sorted({module.layout for module in modules}))
    return [name, str(len(modules)), layouts, f"{weights:,}", f"{count:,}", f"{8 * count / weights:.4f}"]


def _float_rows(result: Inspection) -> list[list[str]]:
    """Linears that stayed in float with their reason, then everything else that was never a linear's weight."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    binarized = {module.name for module in result.modules}
    for name, count in result.float_tensors.items():
        module = name.rpartition(".")[0]
        is_bias = module in binarized or name.removesuffix("_bias") in binarized
        no_weight = "bias of a binarized linear" if is_bias else "no linear layer"
        reason = result.kept.get(module) or result.kept.get(name) or no_weight
        sums[kind_of(name), reason] += count
    for name, reason in result.kept.items():
        if not any(tensor == name or tensor.startswith(f"{name}.") for tensor in result.float_tensors):
            sums[kind_of(name), f"{reason} (stored with the tensor it is tied to)"] += 0
    return [[kind, f"{count:,}", reason] for (kind, reason), count in sorted(sums.items(), key=lambda item: -item[1])]
