"""Whether bits divided by the model's own sensitivity make a better model than the same bits everywhere.

    python benchmarks/allocation_study.py MODEL --device cuda --processes 3 \\
        --runs arb-dbf:1.18:uniform,arb-dbf:1.18:0.5,arb-dbf:1.18:1
    python benchmarks/allocation_study.py MODEL --device cuda --processes 3 \\
        --runs arb-hrc:2.34:uniform,arb-hrc:2.34:0.5,arb-hrc:2.34:1

MODEL is the directory of the float model. Calibration is the first 32 x 1024 tokens of WikiText-2's validation split;
perplexity is that of the second half of the same file, in windows of 2048 tokens, so that settings can be chosen by it:
the test split is not looked at. The sensitivity of every linear is measured once; then every run has a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measured import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer
from walked import binarizer, make_dense

from optimum_arb import ARBConfig
from optimum_arb.budget.trials import SPREAD, chosen, divided
from optimum_arb.calibration import CalibrationWalk, token_batches
from optimum_arb.data import bundled_text
from optimum_arb.evaluate import perplexity
from optimum_arb.modules import select_modules


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare bits divided by sensitivity with uniform bits.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", default="arb-dbf:1.18:0,arb-dbf:1.18:0.5", help="METHOD:TARGET:TEMPER[:SPREAD],...")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--bytes", action="store_true", help="a model of bytes, without a tokenizer")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    parser.add_argument("--config", type=json.loads, default={}, help="further choices of ARBConfig, as JSON")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # one run: a JSON file of its configuration
    args = parser.parse_args()
    if args.run:
        print("RESULT", json.dumps(one_run(args, json.loads(args.run.read_text()))))
        return
    start = time.perf_counter()
    ids = model_tokens(args)
    tokens = ids[: args.samples * args.length].view(args.samples, args.length)
    if tokens.numel() > len(ids) // 2:
        parser.error("the calibration tokens reach into the second half of the text, on which perplexity is measured")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    runs = [run.split(":") for run in args.runs.split(",")]
    known: dict[tuple[str, float], Any] = {}
    jobs = []
    for method, wanted, temper, *more in runs:
        target = float(wanted)
        base: dict[str, Any] = {"num_samples": args.samples, "sequence_length": args.length, **args.config}
        base["method"] = method if method != "auto" else "arb-hrc"
        kinds = ["arb-hrc", "arb-dbf"] if method == "auto" else [method]
        if temper == "uniform":
            choice = {"planes": round(target)} if method == "arb-hrc" else {"factor_bits": target}
            jobs.append({"run": [method, wanted, temper], **base, **choice})
            continue
        if (method, target) not in known:
            begin = time.perf_counter()
            selection = select_modules(model, ARBConfig(**base))
            known[method, target] = chosen(
                model, selection.convert, token_batches(tokens), args.device, target, kinds, seed=0
            )
            print(f"{method} at {target}: sensitivities in {time.perf_counter() - begin:.1f} s", flush=True)
        forms, damages, weights = known[method, target]
        budget = int(target * sum(weights.values()))
        spread = dict.fromkeys(SPREAD, float(more[0])) if more else SPREAD
        found = divided(forms, damages, weights, budget, float(temper), spread)
        overrides = {name: dict(choice.settings) for name, choice in found.items()}
        bits = {name: choice.bits / weights[name] for name, choice in found.items()}
        kinds_of = sorted({name.rpartition(".")[2] for name in bits})
        mean = {k: [b for n, b in bits.items() if n.endswith(k)] for k in kinds_of}
        print(method, wanted, temper, *more, {k: round(sum(v) / len(v), 2) for k, v in mean.items()}, flush=True)
        jobs.append({"run": [method, wanted, temper, *more], **base, "overrides": overrides})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(args.model), "--device", args.device]
        command += ["--samples", str(args.samples), "--length", str(args.length), "--window", str(args.window)]
        command += ["--bytes"] if args.bytes else []
        command += ["--windows", str(args.windows)] if args.windows else []

        def work(index: int) -> dict[str, Any]:
            path = Path(folder) / f"{index}.json"
            path.write_text(json.dumps(jobs[index]))
            done = subprocess.run([*command, "--run", str(path)], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise RuntimeError(done.stderr[-2000:])
            result = json.loads(lines[0].removeprefix("RESULT "))
            print(
                f"{':'.join(result['run']):28} {result['bits_per_weight']:.4f} true bits, perplexity "
                f"{result['perplexity']:.2f}, {result['seconds']:.0f} s",
                flush=True,
            )
            return result

        with ThreadPoolExecutor(args.processes) as pool:
            results = list(pool.map(work, range(len(jobs))))
    print(f"{time.perf_counter() - start:.0f} s altogether")
    if args.out is not None:
        details = {":".join(map(str, key)): {"damages": value[1]} for key, value in known.items()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"results": results, "sensitivity": details, "jobs": jobs}, indent=1))


def model_tokens(args: argparse.Namespace) -> torch.Tensor:
    text = bundled_text("wikitext-2")
    if args.bytes:
        return torch.tensor(list(text.encode()), dtype=torch.int64)
    return token_ids(AutoTokenizer.from_pretrained(args.model), text)


def one_run(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """Binarizes with a configuration and measures."""
    start = time.perf_counter()
    ids = model_tokens(args)
    tokens = ids[: args.samples * args.length].view(args.samples, args.length)
    run = job.pop("run")
    config = ARBConfig(**job)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    selection = select_modules(model, config)

    strength = config.resolved_error_correction
    walk = CalibrationWalk(
        model, selection.modules(), binarizer(selection), token_batches(tokens), args.device, error_correction=strength
    )
    walk.run()
    bits_per_weight = make_dense(model)
    model.to(args.device)
    half = len(ids) // 2
    found = perplexity(model, ids[half:], context_length=args.window, max_windows=args.windows).perplexity
    seconds = time.perf_counter() - start
    return {"run": run, "bits_per_weight": bits_per_weight, "perplexity": found, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
