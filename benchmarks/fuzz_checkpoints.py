"""Saved models are changed in thousands of ways, and every one is loaded.

    python benchmarks/fuzz_checkpoints.py                     # 2,500 changes, some minutes
    python benchmarks/fuzz_checkpoints.py --mutations 200 --seed 1
    python benchmarks/fuzz_checkpoints.py --only 12 34        # some of them again, with their tracebacks

Seven tiny models (one, several files; permutations; salient columns; experts; products of two sign matrices; scales of
8 bits with a Hadamard transform; transposed linears) are changed as the modules of `fuzzing/` say, and loaded by
`AutoModelForCausalLM.from_pretrained` in worker processes. A load may end in an error, or in a model. Then, unless the
change made the checksums anew or took them out, every packed tensor must be bit for bit one that was saved under that
name. Failures are: a model without any packed tensor; a worker that dies; a load of more than 20 seconds; an error
that only a mistake of this package raises (an AttributeError in its own code, ...) or none (MemoryError, an empty
message); a process that is started, a connection that is opened, code that runs; memory of more than twice the model's
files and `FIXED_BYTES`, by the kernel's count of the largest resident set and as a limit of the address space. What
transformers does with config.json alone, of any model and before it looks for a quantization, is counted by itself:
`"num_labels": 9007199254740992` takes all memory there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from fuzzing.models import make_models
from fuzzing.worker import SECONDS, Result, Worker, on_alarm, work


def run(mutations: int, seed: int, folder: Path, processes: int = 2) -> Iterator[Result]:
    """Makes the models, and changes and loads them in worker processes; one that dies is replaced."""
    models = folder / "models"
    make_models(models)
    context = multiprocessing.get_context("fork")
    active: dict[int, tuple[Any, Any, range, int]] = {}

    def start(slot: int, numbers: range) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(models, folder / f"scratch-{slot}", seed, numbers, sender))
        process.start()
        sender.close()
        active[slot] = (process, receiver, numbers, -1)

    for slot in range(processes):
        start(slot, range(slot, mutations, processes))
    while active:
        for slot, (process, receiver, numbers, current) in list(active.items()):
            try:
                if receiver.poll(3 * SECONDS if len(active) == 1 else 0.05):
                    message = receiver.recv()
                    if isinstance(message, Result):
                        yield message
                    elif message is None:
                        process.join()
                        del active[slot]
                    else:
                        active[slot] = (process, receiver, numbers, message)
                    continue
                if len(active) > 1:
                    continue
                process.kill()
                reason = "a hang"
            except EOFError:
                process.join()
                reason = f"the process died ({process.exitcode})"
            process.join()
            yield Result(current, "", "", "", "failure", reason, 0.0, 0, 0)
            start(slot, numbers[numbers.index(current) + 1 :])


def table(results: list[Result]) -> str:
    """What the changes of each kind led to."""
    lines = [
        "| change | loads | refused by optimum_arb | refused by a library | refused or failed as config.json | loaded "
        "| failures |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in [*sorted({result.kind for result in results}), None]:
        some = [result for result in results if kind in (None, result.kind)]
        counts = Counter(
            result.detail.partition(":")[0] if result.outcome == "refused" else result.outcome for result in some
        )
        cells = [
            len(some),
            counts["ours"],
            counts["a library's"],
            counts["config.json alone"],
            counts["loaded"],
            counts["failure"],
        ]
        lines.append(f"| {(kind or '**all**').replace('_', ' ')} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the changes to make, with their tracebacks")
    parser.add_argument("--json", type=Path, help="a file for all results")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        if args.only is not None:
            make_models(folder / "models")
            signal.signal(signal.SIGALRM, on_alarm)
            worker = Worker(folder / "models", folder / "scratch", args.seed)
            some = [worker.one(number, verbose=True) for number in args.only]
            print(*some, sep="\n")
            return int(any(result.outcome == "failure" for result in some))
        began = time.monotonic()
        results = []
        for result in run(args.mutations, args.seed, folder, args.processes):
            results.append(result)
            if result.outcome == "failure":
                print(f"{result}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(results))
    own = [result for result in results if not result.detail.startswith("config.json alone")]
    most = max(own, key=lambda result: result.grown)
    print(
        f"\n{len(results):,} changes in {time.monotonic() - began:.0f} s. The slowest load took "
        f"{max(result.seconds for result in results):.1f} s; the most memory was {most.grown / 2**20:.1f} MiB more "
        f"than before, for files of {most.files / 2**20:.2f} MiB ({most.kind}: {most.what[:100]})."
    )
    return int(any(result.outcome == "failure" for result in results))


if __name__ == "__main__":
    sys.exit(main())
