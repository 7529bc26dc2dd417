"""A process that changes models, loads them, and judges what happens."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import optimum_arb
from optimum_arb.stored.checksums import verify

from .models import digests
from .mutate import mutate

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


@dataclass(frozen=True)
class Result:
    """What one change led to.

    Attributes:
        number: of the change; with the seed it decides everything.
        model: which model was changed.
        kind: how, the name of a function of `mutate.KINDS`.
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


def on_alarm(*_: Any) -> None:
    raise Slow(f"the load took more than {SECONDS} seconds")


def work(models: Path, scratch: Path, seed: int, numbers: range, pipe: Any) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGALRM, on_alarm)
    sys.stdin = open(os.devnull)  # noqa: SIM115 (until the process ends)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    worker = Worker(models, scratch, seed)
    for number in numbers:
        pipe.send(number)
        pipe.send(worker.one(number))
    pipe.send(None)
