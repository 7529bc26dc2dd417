"""Runs of `quantize_checkpoint` killed at random instants, and what resuming them gives.

    python benchmarks/kill_resume.py                 # 20 kills, a table
    python benchmarks/kill_resume.py --kills 3 --json

Each trial binarizes a small random Llama in a process of its own, kills that with SIGKILL at a random instant between
its start and its end, looks at what it left, runs it again with `resume=True`, and compares every file with those of a
run that nobody killed. Every second trial keeps the hidden states on disk, and every second pair replaces a model that
is already there. Exits with 1 if any file differs or anything looked finished that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_llama import random_llama
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from optimum_arb import ARBConfig, quantize_checkpoint


def make_model(path: Path, layers: int, seed: int) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": layers}
    model = random_llama(seed, **sizes, tie_word_embeddings=True)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.6 / parameter.shape[1] ** 0.5)
    model.save_pretrained(path)


def in_a_process(work: Callable[[], None], kill_after: float | None = None) -> tuple[int, float]:
    """Runs something in a copy of this process, which may be killed; its exit status and its seconds."""
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, time.perf_counter() - began


def digests(path: Path) -> dict[str, str]:
    if not path.is_dir():
        return {}
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def finished_layers(output: Path) -> int:
    manifest = output.parent / f".{output.name}.partial" / "manifest.json"
    return len(json.loads(manifest.read_text())["pieces"]) if manifest.is_file() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    logging.disable_progress_bar()
    random.seed(args.seed)
    tokens = torch.randint(5, 96, (8, 32), generator=torch.Generator().manual_seed(args.seed))
    config = ARBConfig(dataset=tokens, block_size=64)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "float", args.layers, args.seed)
        make_model(root / "other", 1, args.seed + 1)

        def run(output: Path, source: str = "float", **options: bool) -> Callable[[], None]:
            return lambda: quantize_checkpoint(root / source, output, config, **options) and None

        status, seconds = in_a_process(run(root / "reference" / "model"))
        assert status == 0
        expected = digests(root / "reference" / "model")
        assert in_a_process(run(root / "old" / "model", "other"))[0] == 0
        old = digests(root / "old" / "model")
        for trial in range(args.kills):
            output = root / f"trial-{trial}" / "model"
            options = {"activations_on_disk": trial % 2 == 1, "overwrite": trial % 4 >= 2}
            if options["overwrite"]:
                shutil.copytree(root / "old" / "model", output)
            instant = random.uniform(0.0, seconds)
            killed, _ = in_a_process(run(output, **options), instant)
            left = digests(output)
            if left == expected:
                state = "the new model"
            elif options["overwrite"] and left == old:
                state = "the old model"
            else:
                state = "LOOKS FINISHED" if "config.json" in left else "no model"
            layers = finished_layers(output)
            again, _ = in_a_process(run(output, resume=True, **options))
            found = digests(output)
            loads = in_a_process(lambda output=output: AutoModelForCausalLM.from_pretrained(output) and None)[0] == 0
            rows.append(
                {
                    "killed_after": round(instant, 3),
                    "killed": os.WIFSIGNALED(killed),
                    "left": state,
                    "finished_layers": layers,
                    "activations_on_disk": options["activations_on_disk"],
                    "resumed": again == 0,
                    "identical": found == expected and loads,
                    "leftovers": sorted(p.name for p in output.parent.iterdir() if p != output),
                }
            )
            shutil.rmtree(output.parent)
    bad = [row for row in rows if not row["identical"] or row["left"] == "LOOKS FINISHED" or row["leftovers"]]
    if args.json:
        print(json.dumps({"seconds": seconds, "files": len(expected), "trials": rows}))
    else:
        print(f"{args.layers} layers, {len(expected)} files, {seconds:.2f} s when nobody kills it\n")
        print("killed after  of them finished  left in OUT     hidden states  resumed: all files identical")
        for row in rows:
            where = "on disk" if row["activations_on_disk"] else "in memory"
            same = "yes" if row["identical"] and row["resumed"] else "NO"
            print(
                f"{row['killed_after']:9.3f} s  {row['finished_layers']:9} layers  {row['left']:14}  {where:13}  {same}"
            )
        print(f"\n{len(rows) - len(bad)} of {len(rows)} kills gave the same bits.")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
