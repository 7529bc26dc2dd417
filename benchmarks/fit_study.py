"""Fits of a few linears under other options: held-out output error, true bits, seconds. Also the time of large shapes.

    python benchmarks/fit_study.py MODEL --device cuda --page docs/method.md
    python benchmarks/fit_study.py MODEL --device cuda --rows loop-1,admm-1,hadamard-1
    python benchmarks/fit_study.py --shapes --device cuda --rows time-hrc,time-hrc-loop,time-rc,time-dbf

MODEL is a directory with a float model and its tokenizer. Linears are fitted under `X^T X` of the float model on the
first 32 x 1024 tokens of WikiText-2's validation split; the error is `tr(E H E^T) / tr(W H W^T)`, E the error of the
stored weight and H that of the first 32 x 1024 tokens of the split's second half; the mean over the linears. The test
split is never looked at. Bits count every stored tensor. With `--linears` other linears are taken. `--page` fits every
row that the tables of a page name, and writes the figures into them.

`--shapes` fits random weights under random calibration matrices and gives the seconds of a model of the shape of
Llama-2-7B, from those of one linear of each shape; on a GPU also the highest allocation.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from measured import token_ids
from page_tables import filled, names
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb import ARBConfig
from optimum_arb.algorithms import admm, binarize, dbf, output_error
from optimum_arb.calibration.statistics import Statistic
from optimum_arb.data import bundled_text
from optimum_arb.format.packing import stored_bytes
from optimum_arb.modules import is_linear
from optimum_arb.nn import packed_linear
from optimum_arb.patterns import check_pattern, matches

# Five kinds of matrices from the first to the last third of SmolLM2-135M.
LINEARS = (
    "layers.2.self_attn.q_proj",
    "layers.8.mlp.up_proj",
    "layers.14.self_attn.o_proj",
    "layers.20.mlp.gate_proj",
    "layers.26.mlp.down_proj",
)
# Rows x columns -> how many a decoder layer of Llama-2-7B has.
SHAPES = {"4096x4096": 4, "11008x4096": 2, "4096x11008": 1}


class Row(NamedTuple):
    """Choices of `ARBConfig`, and module constants that are no choice, by their names as "module.NAME"."""

    choices: dict[str, Any]
    constants: Mapping[str, float] = MappingProxyType({})


def rows() -> dict[str, Row]:
    """The rows, by name."""
    found: dict[str, Row] = {}
    for planes in (1, 2, 3):
        rotated = {"planes": planes, "hadamard": 128}
        searched = {**rotated, "admm_iterations": 20}
        found |= {
            f"loop-{planes}": Row({"planes": planes, "admm_iterations": 0}),
            f"admm-{planes}": Row({"planes": planes, "admm_iterations": 20}),
            f"loop-hadamard-{planes}": Row(
                {**rotated, "admm_iterations": 0, "act_order": False, "refinement_sweeps": 1}
            ),
            f"hadamard-{planes}": Row(searched),
            f"hadamard-{planes}-block-256": Row({**searched, "block_size": 256}),
            f"hadamard-{planes}-rows": Row({**searched, "block_size": -1}),
            f"scales-8-{planes}": Row({**searched, "scale_bits": 8}),
            f"scales-8-{planes}-block-256": Row({**searched, "scale_bits": 8, "block_size": 256}),
            f"scales-8-{planes}-rows": Row({**searched, "scale_bits": 8, "block_size": -1}),
        }
    found |= {
        "loop-1-no-order": Row({"admm_iterations": 0, "act_order": False}),
        "admm-1-order": Row({"admm_iterations": 20, "act_order": True}),
    }
    one = {"hadamard": 128, "admm_iterations": 20}
    whole = {**one, "block_size": -1}
    found |= {f"iterations-{count}": Row({**whole, "admm_iterations": count}) for count in (10, 20, 40)}
    found["iterations-60-block-128"] = Row({**one, "admm_iterations": 60})
    found |= {f"shrinkage-{value:g}": Row({**one, "shrinkage": value}) for value in (0.0, 0.05, 0.1)}
    found |= {f"damping-{value:g}": Row({**one, "damp_percent": value}) for value in (0.01, 0.02, 0.05)}
    found |= {f"sweeps-{count}": Row({**whole, "refinement_sweeps": count}) for count in (1, 2, 4)}
    found |= {
        f"rho-{value:g}": Row({**one, "admm_iterations": 16}, {"admm.HIGHEST_RHO": value})
        for value in (0.3, 0.5, 0.6, 0.8, 1.2)
    }
    found |= {
        f"stages-{stages}-iterations-{count}": Row({**one, "admm_iterations": count}, {"admm.STAGES": stages})
        for count, stages in ((20, 5), (20, 10), (25, 5))
    }
    factors = {"method": "arb-dbf", "factor_bits": 1.18, "damp_percent": 0.02}
    found |= {f"factors-rounds-{count}": Row({**factors, "num_iterations": count}) for count in (40, 60, 100)}
    found["factors-damping-0.05"] = Row({**factors, "num_iterations": 100, "damp_percent": 0.05})
    found |= {
        f"factors-rho-{value:g}": Row({**factors, "num_iterations": 100}, {"dbf.RHO": value}) for value in (1.0, 1.5)
    }
    found |= {
        "time-hrc": Row({}),
        "time-hrc-loop": Row({"admm_iterations": 0}),
        "time-hrc-2": Row({"planes": 2}),
        "time-rc": Row({"method": "arb-rc"}),
        "time-dbf": Row({"method": "arb-dbf"}),
    }
    return found


@contextmanager
def constants(values: Mapping[str, float]) -> Iterator[None]:
    """Module constants have other values inside this context."""
    modules = {"admm": admm, "dbf": dbf}
    before = {}
    for key in values:
        module, name = key.split(".")
        before[key] = getattr(modules[module], name)
    try:
        for key, value in values.items():
            module, name = key.split(".")
            setattr(modules[module], name, value)
        yield
    finally:
        for key, value in before.items():
            module, name = key.split(".")
            setattr(modules[module], name, value)


class Problem(NamedTuple):
    """A weight float32 `[N, K]` and its calibration matrices `[K, K]`, the second of text that nothing is fitted to."""

    weight: torch.Tensor
    hessian: torch.Tensor
    held_out: torch.Tensor


@torch.no_grad()
def problems(source: Path, patterns: list[str], samples: int, length: int, device: str) -> dict[str, Problem]:
    """The linears of a float model that match, by name.

    Raises:
        ValueError: a pattern that matches no linear, or a text that is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    every = token_ids(tokenizer, bundled_text("wikitext-2"))
    halves = (every[: len(every) // 2], every[len(every) // 2 :])
    if len(halves[0]) < samples * length:
        raise ValueError(f"half of the text has {len(halves[0]):,} tokens, not the {samples} x {length} asked for.")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map=device).eval()
    linears = {name: module for name, module in model.base_model.named_modules() if is_linear(module)}
    for pattern in patterns:
        check_pattern(pattern)
        if not any(matches(pattern, name) for name in linears):
            raise ValueError(f"{pattern!r} matches no linear, such as {next(iter(linears))!r}.")
    chosen = {n: m for n, m in linears.items() if any(matches(pattern, n) for pattern in patterns)}
    statistics: list[dict[str, Statistic]] = []
    for half in halves:
        seen = {name: Statistic(module.weight.shape[1], module.weight.device) for name, module in chosen.items()}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, to=seen[name]: to.add(args[0]))
            for name, module in chosen.items()
        ]
        for sequence in half[: samples * length].view(samples, length):
            model.base_model(input_ids=sequence[None].to(device), use_cache=False)
        for hook in hooks:
            hook.remove()
        statistics.append(seen)
    fit, held_out = statistics
    return {name: Problem(m.weight.detach(), fit[name].hessian, held_out[name].hessian) for name, m in chosen.items()}


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def fit(weight: torch.Tensor, hessian: torch.Tensor, row: Row, device: str) -> tuple[Any, int, float]:
    """A packed linear, its bytes, and the seconds of the fit."""
    config = ARBConfig(**row.choices)
    synchronize(device)
    start = time.perf_counter()
    with constants(row.constants):
        found = binarize(weight, hessian, config)
    synchronize(device)
    seconds = time.perf_counter() - start
    packed = packed_linear(found, None, "reference", config.resolved_scale_bits)
    return packed, stored_bytes(packed.packed()), seconds


def study(linears: dict[str, Problem], row: Row, device: str) -> dict[str, Any]:
    """Error of every linear, their mean, bits of all of them, and seconds."""
    errors: dict[str, float] = {}
    total = weights = 0
    spent = 0.0
    for name, (weight, hessian, held_out) in linears.items():
        packed, size, seconds = fit(weight, hessian, row, device)
        errors[name] = output_error(weight, packed.dequantize(torch.float32), held_out)
        total, weights, spent = total + 8 * size, weights + weight.numel(), spent + seconds
    mean = sum(errors.values()) / len(errors)
    return {"held_out_error": mean, "bits_per_weight": total / weights, "seconds": spent, "errors": errors}


def time_shapes(shapes: dict[str, int], layers: int, row: Row, device: str) -> dict[str, Any]:
    """Seconds of a fit of each shape, and of a model of `layers` such layers."""
    generator = torch.Generator(device).manual_seed(0)
    seconds: dict[str, float] = {}
    highest = 0
    for shape in shapes:
        n, k = map(int, shape.split("x"))
        weight = torch.randn(n, k, device=device, generator=generator) * k**-0.5
        sizes = torch.randn(k, device=device, generator=generator).exp()
        statistic = Statistic(k, weight.device)
        for _ in range(8):
            statistic.add(torch.randn(-(-k // 4), k, device=device, generator=generator) * sizes)
        hessian = statistic.hessian
        fit(weight[:64], hessian, row, device)  # kernels are compiled and libraries loaded before the clock runs
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        seconds[shape] = fit(weight, hessian, row, device)[2]
        if device.startswith("cuda"):
            highest = max(highest, torch.cuda.max_memory_allocated(device))
    model = layers * sum(count * seconds[shape] for shape, count in shapes.items())
    return {"seconds_of_shapes": seconds, "seconds_of_model": model, "gpu_bytes": highest or None}


def main(argv: list[str] | None = None) -> None:
    known = rows()
    parser = argparse.ArgumentParser(description="Fit a few linears under other options.")
    parser.add_argument("model", type=Path, nargs="?", help="directory of a float model with its tokenizer")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--rows", default="loop-1,admm-1,hadamard-1", help=f"all (of a MODEL or of --shapes), or of {', '.join(known)}"
    )
    parser.add_argument(
        "--config", type=json.loads, help="another row, named 'config': choices of ARBConfig as JSON, {} for defaults"
    )
    parser.add_argument("--linears", default=",".join(LINEARS), help="suffixes of names, or one pattern re:...")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables name the rows, and are filled")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--shapes",
        nargs="?",
        const=",".join(f"{shape}*{count}" for shape, count in SHAPES.items()),
        help="time random weights in place of a model's: ROWSxCOLUMNS*HOW_MANY,... (default: those of Llama-2-7B)",
    )
    parser.add_argument("--layers", type=int, default=32, help="decoder layers of the timed model")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args(argv)
    chosen = {} if args.config is None else {"config": Row(args.config)}
    page = None if args.page is None else args.page.read_text(encoding="utf-8")
    wanted = [name for name in args.rows.split(",") if name] if page is None else names(page)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: the rows are {', '.join(known)}")
    if (args.model is None) == (args.shapes is None):
        parser.error("give a MODEL, or --shapes")
    if page is not None and (args.shapes is not None or not wanted):
        parser.error(f"{args.page} has no rows of a MODEL to fill")
    chosen |= {name: known[name] for name in wanted}
    figures: dict[str, dict[str, Any]] = {}
    if args.shapes is None:
        patterns = [args.linears] if args.linears.startswith("re:") else args.linears.split(",")
        try:
            linears = problems(args.model, patterns, args.samples, args.length, args.device)
        except ValueError as error:
            parser.error(str(error))
        print(f"{len(linears)} linears\n\n| row | held-out output error | true bits | seconds |\n|---|---|---|---|")
        for name, row in chosen.items():
            found = figures[name] = study(linears, row, args.device)
            values = f"{found['held_out_error']:.4f} | {found['bits_per_weight']:.3f} | {found['seconds']:.1f}"
            print(f"| {name} | {values} |", flush=True)
    else:
        shapes = {
            shape: int(count or 1) for shape, _, count in (part.partition("*") for part in args.shapes.split(","))
        }
        print(f"| row | {' | '.join(shapes)} | {args.layers} layers | peak GB |\n|---{'|---' * (len(shapes) + 2)}|")
        for name, row in chosen.items():
            found = figures[name] = time_shapes(shapes, args.layers, row, args.device)
            each = " | ".join(f"{value:.2f} s" for value in found["seconds_of_shapes"].values())
            peak = f"{found['gpu_bytes'] / 1e9:.1f}" if found["gpu_bytes"] else "-"
            print(f"| {name} | {each} | {found['seconds_of_model']:.0f} s | {peak} |", flush=True)
    if page is not None:
        device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "a CPU"
        note = (
            f"Printed {time.strftime('%Y-%m-%d')} on {device}, torch {torch.__version__}, by `python "
            f"benchmarks/fit_study.py MODEL --page docs/{args.page.name}` with {len(linears)} matrices, "
            f"{args.samples} x {args.length} tokens: {', '.join(f'`{name}`' for name in linears)}."
        )
        args.page.write_text(filled(page, figures, textwrap.fill(note, 120)), encoding="utf-8")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": args.device, "rows": figures}, indent=1))


if __name__ == "__main__":
    main()
