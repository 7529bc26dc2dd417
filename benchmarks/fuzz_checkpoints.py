"""Saved models are changed in thousands of ways, and every one is loaded.

    python benchmarks/fuzz_checkpoints.py                     # 2,500 changes, some minutes
    python benchmarks/fuzz_checkpoints.py --mutations 200 --seed 1
    python benchmarks/fuzz_checkpoints.py --only 12 34        # some of them again, with their tracebacks

Seven tiny models (one, several files; permutations; salient columns; experts; products of two sign matrices; scales of
8 bits with a Hadamard transform; transposed linears) are changed as
`checkpoint_mutations.py` says, and loaded by `AutoModelForCausalLM.from_pretrained` in worker processes. A load may
end in an error, or in a model. Then, unless the change made the checksums anew or took them out, every packed tensor
must be bit for bit one that was saved under that name. Failures are: a model without any packed tensor; a worker that
dies; a load of more than 20 seconds; an error that only a mistake of this package raises (an AttributeError in its own
code, ...) or none (MemoryError, an empty message); a process that is started, a connection that is opened, code that
runs; memory of more than twice the model's files and `FIXED_BYTES`, by the kernel's count of the largest resident set
and as a limit of the address space. What transformers does with config.json alone, of any model and before it looks
for a quantization, is counted by itself: `"num_labels": 9007199254740992` takes all memory there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoint_mutations import mutate
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

import optimum_arb
from optimum_arb import ARBConfig
from optimum_arb.checksums import verify

# Beside the files: the objects of a model of the most layers that are allowed, and what an intact model takes.
FIXED_BYTES = 96 << 20
SECONDS = 20
# Errors that count as failures where the last frame is of this package and raises nothing on purpose: mistakes in code.
MISTAKES = (
    *(AttributeError, AssertionError, IndexError, KeyError, NameError, TypeError, ZeroDivisionError, OverflowError),
    *(UnicodeError, RecursionError, StopIteration, struct.error),
)
# Audit events of what no load may do.
FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo"),
    *("pty.spawn", "ftplib.connect", "webbrowser.open"),
)
PACKAGE = str(Path(optimum_arb.__file__).parent) + os.sep
_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Result:
    """What one change led to.

    Attributes:
        number: of the change; with the seed it decides everything.
        model: which model was changed.
        kind: how, the name of a function in checkpoint_mutations.py.
        what: what was changed.
        outcome: "refused", "loaded" or "failure".
        detail: the error, or what is wrong.
        seconds: of the load.
        grown: bytes by which the largest resident set of the process exceeded what it had before.
        files: bytes of the model's files.
    """

    number: int
    model: str
    kind: str
    what: str
    outcome: str
    detail: str
    seconds: float
    grown: int
    files: int


def make_models(folder: Path) -> None:
    """The intact models, each in a directory of its own."""
    ids = torch.randint(5, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    gpt2 = {"vocab_size": 96, "n_embd": 96, "n_inner": 160, "n_layer": 2, "n_head": 4, "n_positions": 64}
    llama, mixtral = LlamaConfig(**_SMALL), MixtralConfig(**_SMALL, num_local_experts=4)
    made: tuple[tuple[str, Any, dict[str, Any], dict[str, Any]], ...] = (
        ("one-file", llama, {"dataset": ids, "num_samples": 4}, {}),
        ("shards", llama, {"dataset": ids, "num_samples": 4, "planes": 2, "seed": 1}, {"max_shard_size": "60KB"}),
        ("salient", llama, {"dataset": None, "method": "arb-rc", "num_iterations": 1}, {}),
        ("experts", mixtral, {"dataset": None}, {"max_shard_size": "200KB"}),
        # k_proj: one plane in the place of factors that are worse
        ("factors", llama, {"dataset": None, "method": "arb-dbf", "overrides": {"k_proj": {"factor_bits": 1.5}}}, {}),
        ("grids", llama, {"dataset": ids, "num_samples": 4, "hadamard": 64, "scale_bits": 8, "block_size": -1}, {}),
        ("transposed", GPT2Config(**gpt2), {"dataset": None, "method": "rtn"}, {}),
    )
    for name, config, choices, options in made:
        torch.manual_seed(0)
        source = folder.parent / "float"
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
        quantization = ARBConfig(**{"block_size": 64, **choices})
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization)
        model.save_pretrained(folder / name, **options)
        shutil.rmtree(source)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Name of each packed tensor of a loaded model -> its digest."""
    packed = (optimum_arb.ARBLinear, optimum_arb.ARBExperts)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, packed):
            for key, tensor in module.named_parameters(recurse=False):
                if "bias" not in key:
                    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + content)
                    found[f"{name}.{key}"] = digest.hexdigest()
    return found


class Worker:
    """What a worker process does: it changes models and loads them, one after the other."""

    def __init__(self, models: Path, scratch: Path, seed: int):
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        self.models = models
        self.scratch = scratch
        self.seed = seed
        self.names = sorted(path.name for path in models.iterdir())
        self.forbidden: list[str] = []
        self.watching = False
        sys.addaudithook(self._audit)
        self.intact = {name: digests(self._load(models / name)) for name in self.names}
        gc.collect()
        gc.freeze()  # what the libraries made is not looked through again after every load

    def _audit(self, event: str, arguments: tuple) -> None:
        if self.watching and event in FORBIDDEN:
            self.forbidden.append(f"{event} {str(arguments)[:100]}")

    @staticmethod
    def _load(path: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)

    def one(self, number: int, verbose: bool = False) -> Result:
        """Change `number`: what it is and what it led to."""
        rng = random.Random(f"{self.seed}-{number}")
        name = rng.choice(self.names)
        path = self.scratch / "model"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        shutil.copytree(self.models, self.scratch / "others")
        shutil.copytree(self.models / name, path)
        mutation = mutate(path, self.scratch / "others", rng)
        files = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
        limit = 2 * files + FIXED_BYTES
        outcome, detail = "loaded", ""
        gc.collect()
        before = self._reset_memory()
        self.forbidden.clear()
        started = time.monotonic()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (before[1] + limit, resource.RLIM_INFINITY))
            signal.alarm(SECONDS)
            self.watching = True
            model = self._load(path)
        except BaseException as error:
            self._unlimit()
            outcome, detail = self._judge(error, _says_quantized(path))
            if verbose:
                traceback.print_exc()
        else:
            self._unlimit()
            wrong = self._wrong(name, model, path, mutation.sealed)
            if wrong:
                outcome, detail = "failure", wrong
        seconds = time.monotonic() - started
        model = None
        grown = max(0, _status("VmHWM") - before[0])
        if grown > limit and not detail.startswith("config.json alone"):
            outcome, detail = "failure", f"{grown:,} bytes more were used for files of {files:,}"
        if self.forbidden:
            outcome, detail = "failure", f"the load did {self.forbidden[0]}"
        if (path / "executed").exists():
            outcome, detail = "failure", "code of the checkpoint was executed"
        return Result(number, name, mutation.kind, mutation.what, outcome, detail, seconds, grown, files)

    def _unlimit(self) -> None:
        self.watching = False
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _judge(self, error: BaseException, quantized: bool) -> tuple[str, str]:
        """What an error counts as, and what to write of it.

        Args:
            error: of a load.
            quantized: whether the config.json still speaks of a quantization; else it is any float model's.
        """
        frames = traceback.extract_tb(error.__traceback__)
        where = frames[-1].filename
        text = f"{type(error).__name__}: {str(error)[:300]}"
        ours = any(frame.filename.startswith(PACKAGE) for frame in frames)
        alone = not quantized or any(frame.filename.endswith("configuration_utils.py") for frame in frames[-6:])
        if not ours and alone and not isinstance(error, Slow):
            return "refused", f"config.json alone: {text}"
        if isinstance(error, (MemoryError, Slow)) or not isinstance(error, Exception):
            return "failure", text
        if ours and isinstance(error, NotImplementedError):  # what torch says of a tensor that was left without data
            return "failure", text
        if "allocate" in str(error) and "memory" in str(error):
            return "failure", text
        if where.startswith(PACKAGE) and isinstance(error, MISTAKES) and not _raised(frames[-1]):
            return "failure", f"{text} ({Path(where).name}:{frames[-1].lineno})"
        if not str(error):
            return "failure", f"{text} without a message"
        kind = "ours" if ours else "a library's"
        return "refused", f"{kind}: {text}"

    def _wrong(self, name: str, model: torch.nn.Module, path: Path, sealed: bool) -> str:
        """What is wrong with a model that loaded although its files were changed; empty if nothing is."""
        found, intact = digests(model), self.intact[name]
        if not found:
            return "nothing is packed"
        for key, digest in found.items() if sealed else ():
            if digest not in (intact.get(key), intact.get(f"model.{key}"), intact.get(f"transformer.{key}")):
                return f"{key} is not what was saved"
        try:
            if verify(sorted(path.glob("*.safetensors"))) is None and sealed:
                return "the checksums are gone"
        except ValueError as error:
            return f"it loaded, but {error}"
        return ""

    def _reset_memory(self) -> tuple[int, int]:
        """Forgets the largest resident set so far; the present one and the address space, in bytes."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status("VmRSS"), _status("VmSize")


class Slow(BaseException):
    """A load that takes too long."""


def _says_quantized(path: Path) -> bool:
    """Whether a config.json has a `quantization_config`, or cannot be read: /dev/zero and a pipe never end."""
    file = path / "config.json"
    try:
        return not file.is_file() or "quantization_config" in json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return True


def _raised(frame: traceback.FrameSummary) -> bool:
    """Whether a line of code raises an error on purpose."""
    with open(frame.filename, encoding="utf-8") as file:
        lines = file.read().splitlines()
    return lines[(frame.lineno or 1) - 1].lstrip().startswith("raise ")


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def _on_alarm(*_: Any) -> None:
    raise Slow(f"the load took more than {SECONDS} seconds")


def _work(models: Path, scratch: Path, seed: int, numbers: range, pipe: Any) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGALRM, _on_alarm)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (until the process ends)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    worker = Worker(models, scratch, seed)
    for number in numbers:
        pipe.send(number)
        pipe.send(worker.one(number))
    pipe.send(None)


def run(mutations: int, seed: int, folder: Path, processes: int = 2) -> Iterator[Result]:
    """Makes the models, and changes and loads them in worker processes; one that dies is replaced."""
    models = folder / "models"
    make_models(models)
    context = multiprocessing.get_context("fork")
    active: dict[int, tuple[Any, Any, range, int]] = {}

    def start(slot: int, numbers: range) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(models, folder / f"scratch-{slot}", seed, numbers, sender))
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
            signal.signal(signal.SIGALRM, _on_alarm)
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
