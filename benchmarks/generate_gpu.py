"""`generate` of Llama-shaped models in bfloat16 and packed, with random weights, in one run on one GPU.

    python benchmarks/generate_gpu.py --shape 7b --planes 1,2 --disk models --json 7b.json
    python benchmarks/generate_gpu.py --shape tiny --device cpu --prompts 8,16 --batch 1,2 --new-tokens 8    # seconds

Packed weights are random bits and scales of the right shapes (`arb-hrc`: row and column scales, no permutation of
columns without --permuted), so nothing is calibrated: speed and memory do not depend on the values. What is measured:

eager     tokens per second of `generate` from the shortest prompt, a quarter of --new-tokens new ones, prompt included
prompt    milliseconds of a prompt of each length of --prompts, eager, as `generate` runs it (logits of the last token)
step      milliseconds of one decoding step, replayed as one CUDA graph: what the GPU alone takes (on a CPU: eager)
compiled step   the same of a step compiled by torch, which makes one kernel of several operations between linears
compiled  tokens per second of `generate` with a static cache, which transformers compiles on a GPU, prompt included
memory    peak of GPU memory in each of them but the step: of this model, without the others
load      with --disk DIR: seconds of `from_pretrained` from files in the page cache, with and without comparing
          checksums, and from files that are not ("cold", where the system can drop them); gigabytes in the directory

All models are on the device at once, and their eager calls take turns, since a host's speed changes from one minute to
the next. Values are medians of warm calls. With --disk each model is written, let go of and loaded, what was loaded
must have the logits of what was written, and is measured then; its directory is removed before the next one is written.
Behind each figure stands how many times as good as bfloat16's of the same run it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from load_times import cached_share, evict, free_memory, load, write
from random_packed import SHAPES, build, without_end
from speed_figures import Figures, model_name
from transformers import StaticCache

Call = Callable[[], object]


@dataclass
class Candidate:
    """A model that is measured. `nbytes` is what it holds on the device, with what its calls left there."""

    planes: int | None
    model: Any
    nbytes: int


class Run:
    """All that is measured in one run, by the options of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device: str = args.device
        self.cuda = self.device.startswith("cuda")
        self.started = time.perf_counter()
        self.candidates: list[Candidate] = []
        self.figures = Figures()
        self.disk: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []

    # Models

    def add(self, planes: int | None) -> None:
        """Makes a model, with --disk by way of its directory, and calls it for the first time."""
        args = self.args
        before = self.allocated()
        if args.disk is None:
            model: Any = build(args.shape, planes, self.device, args.permuted)
        else:
            directory = args.disk / f"{args.shape}-{model_name(planes).replace(' ', '-')}"
            try:
                model = self._through_disk(planes, directory)
            finally:
                shutil.rmtree(directory, ignore_errors=True)
        free_memory()
        # what is kept beside the parameters, for few tokens say, is the model's too
        candidate = Candidate(planes, model, self.allocated() - before)
        self.candidates.append(candidate)
        for batch in {*args.batch, *args.compiled_batch}:  # what the first calls leave on the device is the model's
            self.warm(candidate, lambda batch=batch: model(self.ids(batch, 1, model)))

    def _through_disk(self, planes: int | None, directory: Path) -> Any:
        written = build(self.args.shape, planes, self.device, self.args.permuted)
        ids = self.ids(1, 16, written)
        before = written(ids).logits
        nbytes, seconds = write(written, directory)
        del written
        share = cached_share(directory)
        taken: dict[str, list[float]] = {}
        names = ["cached", "cached, not verified"][: 1 if planes is None else 2]
        for name in names * self.args.loads:
            model = None  # the last one goes before the next one comes
            model, once = load(directory, self.device, verified="not" not in name)
            taken.setdefault(name, []).append(once)
        model = None
        free_memory()
        cold = evict(directory)
        model, once = load(directory, self.device)
        if cold:
            taken["cold"] = [once]
        else:
            self.left_out.append(f"cold load, {model_name(planes)}: its files are in the page cache, or nobody knows")
        without_end(model)
        after = model(ids).logits
        facts = {"bytes": nbytes, "write_seconds": seconds, "cached_share": share, "loads": taken}
        facts["same_logits"] = torch.equal(before, after)
        facts["largest_difference"] = (before.float() - after.float()).abs().max().item()
        self.disk.append({"planes": planes, **facts})
        if not facts["same_logits"]:
            self.fail(f"loading, {model_name(planes)}", ValueError(f"other logits than were saved: {facts}"))
        for name, found in taken.items():
            self.record(f"load, {name}, s", planes, None, None, found, base=f"load, {name.split(',')[0]}, s")
        self.record("on disk, GB", planes, None, None, [nbytes / 1e9])
        return model

    def ids(self, batch: int, length: int, model: Any) -> torch.Tensor:
        """Token ids `[batch, length]`, none of which is the padding."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(self.device)

    # Measuring

    def record(self, *figure: Any, **options: Any) -> None:
        """Keeps and prints a figure, and writes all there are: a run may be ended at any time."""
        added = self.figures.add(*figure, **options)
        print(f"{time.perf_counter() - self.started:6.1f} s  {added.line()}", flush=True)
        self.save()

    def save(self) -> None:
        if self.args.json is None:
            return
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        content = {
            "device": torch.cuda.get_device_name(self.device) if self.cuda else self.device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "options": options,
            "seconds": time.perf_counter() - self.started,
            **self.figures.content(),
            "disk": self.disk,
            "failed": self.failed,
            "left_out": self.left_out,
        }
        self.args.json.write_text(json.dumps(content, indent=1))

    def fail(self, what: str, error: Exception) -> None:
        self.failed.append(f"{what}: {type(error).__name__}: {str(error)[:500]}")
        print(f"failed: {self.failed[-1]}", file=sys.stderr, flush=True)
        free_memory()

    def within_time(self, part: str) -> bool:
        """Whether there is time left for a part; says so where there is not."""
        if self.args.seconds is None or time.perf_counter() - self.started < self.args.seconds:
            return True
        self.left_out.append(f"{part}: the {self.args.seconds:g} s were over")
        return False

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes of tensors on the GPU."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def clock(self, call: Call) -> float:
        """Seconds of a call that ends with the device's work done."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def warm(self, candidate: Candidate, call: Call) -> float | None:
        """Calls once, and returns the peak gigabytes of its model meanwhile; None on a CPU."""
        if not self.cuda:
            call()
            return None
        self.wait()
        before = self.allocated()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        peak = candidate.nbytes + torch.cuda.max_memory_allocated(self.device) - before
        candidate.nbytes += self.allocated() - before
        return peak / 1e9

    def take_turns(
        self,
        part: str,
        batch: int,
        prompt: int,
        calls: Callable[[Candidate], Call],
        value: tuple[str, Callable[[float], float]],
        least: float,
    ) -> None:
        """Times the same call of every model, in turns.

        Args:
            part: its name.
            batch, prompt: where it is measured.
            calls: makes the call of a model.
            value: unit of the figure, and what makes it of seconds.
            least: seconds of timed calls for each model, in 3 to 15 calls.
        """
        if not self.within_time(f"{part}, batch {batch}, prompt {prompt}"):
            return
        free_memory()  # nothing of the part before may go while memory is counted
        ready: list[tuple[Candidate, Call, list[float], float | None]] = []
        for candidate in self.candidates:
            try:
                call = calls(candidate)
                ready.append((candidate, call, [], self.warm(candidate, call)))
            except Exception as error:  # no memory, or whatever the compiler raises; the other figures stand
                self.fail(f"{part}, {model_name(candidate.planes)}, batch {batch}, prompt {prompt}", error)
        for _ in range(15):
            for _, call, found, _ in ready:
                found.append(self.clock(call))
            if all(len(found) >= 3 and sum(found) >= least for _, _, found, _ in ready):
                break
        unit, convert = value
        for candidate, _, found, peak in ready:
            where = candidate.planes, batch, prompt
            self.record(f"{part}, {unit}", *where, [convert(seconds) for seconds in found], speed=True)
            if peak is not None and "step" not in part:
                self.record(f"{part}, peak GB", *where, [peak])

    def eager(self, batch: int, length: int, new: int) -> None:
        """`generate`, not compiled."""

        def calls(candidate: Candidate) -> Call:
            ids = self.ids(batch, length, candidate.model)
            options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
            return lambda: candidate.model.generate(ids, **options)

        self.take_turns("eager", batch, length, calls, ("tokens/s", lambda seconds: batch * new / seconds), 2.0)

    def prompt(self, batch: int, length: int) -> None:
        """A prompt alone."""

        def calls(candidate: Candidate) -> Call:
            ids = self.ids(batch, length, candidate.model)
            return lambda: candidate.model(ids, logits_to_keep=1)

        self.take_turns("prompt", batch, length, calls, ("ms", lambda seconds: seconds * 1e3), 0.5)

    def step(self, batch: int, length: int, compiled: bool = False) -> None:
        """One decoding step, on a GPU as one CUDA graph; compiled, if asked for, before it is recorded."""

        def calls(candidate: Candidate) -> Call:
            model = candidate.model
            call = torch.compile(model.__call__, fullgraph=True, dynamic=False) if compiled else model
            cache = StaticCache(config=model.config, max_cache_len=length + 64)
            ids = self.ids(batch, length, model)
            model(ids, past_key_values=cache, logits_to_keep=1)
            token = ids[:, :1].clone()
            position = torch.full((batch, 1), length, device=self.device)

            def forward() -> None:
                call(token, past_key_values=cache, position_ids=position, cache_position=position[0])

            if not self.cuda:
                return forward
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    forward()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            if compiled:
                torch.compiler.reset()  # as `compiled` does

            def replay(_: Call = forward) -> None:  # the graph reads tensors that `forward` keeps
                graph.replay()

            return replay

        part = "compiled step" if compiled else "step"
        self.take_turns(part, batch, length, calls, ("ms", lambda seconds: seconds * 1e3), 0.2)

    def compiled(self, candidate: Candidate, batch: int, length: int, new: int) -> None:
        """`generate` with a static cache. One model at a time is compiled, and forgotten then: sizes that differ from
        those of a model before it would be taken for variables."""
        where = candidate.planes, batch, length
        name = f"compiled, {model_name(candidate.planes)}, batch {batch}"
        if not self.within_time(name):
            return
        ids = self.ids(batch, length, candidate.model)
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "cache_implementation": "static"}

        def call() -> object:
            return candidate.model.generate(ids, **options)

        held, allocated = candidate.nbytes, self.allocated()
        try:
            start = time.perf_counter()
            peak = self.warm(candidate, call)
            first = time.perf_counter() - start
            call()
            found = [batch * new / self.clock(call) for _ in range(3)]
            self.record("compiled, tokens/s", *where, found, speed=True)
            self.record("compiled, first call, s", *where, [first])
            self.record("compiled, peak GB", *where, [peak])
        except Exception as error:  # whatever the compiler raises; the other figures stand
            self.fail(name, error)
        torch.compiler.reset()
        free_memory()
        candidate.nbytes = held + torch.cuda.memory_allocated(self.device) - allocated


def numbers(text: str) -> list[int]:
    """Of an option as 1,4,16."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 on, with commas")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--planes", type=numbers, default=[1, 2], help="models to compare with bfloat16 (default: 1,2)")
    parser.add_argument("--permuted", action="store_true", help="columns of packed weights are permuted")
    parser.add_argument("--batch", type=numbers, default=[1, 4, 16], help="default: 1,4,16")
    parser.add_argument("--prompts", type=numbers, default=[64, 512, 2048], help="default: 64,512,2048")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--compiled-batch", type=numbers, default=[1, 16], help="default: 1,16")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="measure loading, by way of this directory")
    parser.add_argument("--loads", type=int, default=3, help="loads of each kind from the page cache (default: 3)")
    parser.add_argument("--device", default="cuda")
    for option in ("--no-eager", "--no-prompts", "--no-step", "--no-compiled-step", "--no-compiled"):
        parser.add_argument(option, action="store_true", help="leave it out")
    parser.add_argument("--seconds", type=float, help="begin no part after this time; what is left out is said")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.new_tokens < 4 or args.loads < 1:
        parser.error("--new-tokens of at least 4, --loads of at least 1")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    run = Run(args)
    if args.disk is not None:  # what the first load of a process imports is no part of any other
        for planes in (None, 1):
            write(build("tiny", planes, args.device), args.disk / "first")
            load(args.disk / "first", args.device)
            shutil.rmtree(args.disk / "first")
    for planes in (None, *args.planes):
        run.add(planes)
    shortest = min(args.prompts)
    for batch in args.batch:
        if not args.no_eager:
            run.eager(batch, shortest, args.new_tokens // 4)
        for length in args.prompts * (not args.no_prompts):
            run.prompt(batch, length)
        if not args.no_step:
            run.step(batch, shortest)
        if run.cuda and not args.no_compiled_step:
            run.step(batch, shortest, compiled=True)
    if not args.no_compiled and not run.cuda:
        run.left_out.append("compiled: transformers compiles on a GPU alone")
    for batch in args.compiled_batch * (run.cuda and not args.no_compiled):
        for candidate in run.candidates:
            run.compiled(candidate, batch, shortest, args.new_tokens)
    run.save()
    print(f"\n{run.figures.table([candidate.planes for candidate in run.candidates])}\n\n{run.figures.verdict()}")
    for line in (*(f"Left out: {part}." for part in run.left_out), *(f"Failed: {part}" for part in run.failed)):
        print(line)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
