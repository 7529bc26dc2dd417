"""Seconds by phase and peak memory of `quantize_checkpoint` on a model of the shape of Llama-2-7B, or -70B.

    python benchmarks/large_shapes.py --out /dev/shm/seven --layers 2 --method arb-hrc
    python benchmarks/large_shapes.py --out /dev/shm/seven --layers 2 --method arb-hrc --processes 1 2   # by torchrun
    python benchmarks/large_shapes.py --out /dev/shm/seventy --shape 70B --layers 2 --processes 1 2   # 4.5 GB in OUT
    python benchmarks/large_shapes.py --out runs/tiny --shape tiny --device cpu                     # seconds, on a CPU

The checkpoint is made once in OUT: bfloat16, a file for each layer, random weights with a few large input columns, and
norms that make a hundredth of the channels 20 times as large. One layer's tensors serve all layers, whose time does not
depend on the values. Token ids follow Zipf's law. Every run prints one JSON line.

`seconds` is all of `quantize_checkpoint`, `phases` where it went (time of a phase within another counts for the inner
one alone, and what threads do beside counts where it is waited for), `layers` the seconds of each layer,
`phases_of_a_layer_ms` the phases of a layer behind the first, of each process. The first
layer pays for what is compiled and loaded once: so `seconds_of_32` (`_80` of a 70B) is what is outside the layers, plus
the first layer, plus 31 times the median of the others. To tell phases apart the GPU is waited for wherever one begins
or ends, also where processes send to each other while they compute: `--no-phases` leaves that out. `--cold` first drops
the checkpoint from the page cache, which a disk allows and /dev/shm does not. `--profile` also prints, of the last
layer, the kernels that took the GPU longest, how long it was busy, and the time in each phase, and slows it down.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from load_times import evict
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from optimum_arb.calibration.progress import Progress

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4},
}
LAYERS = {"7B": 32, "70B": 80, "tiny": 32}  # of the models of these shapes
VOCABULARY = 32000
# What is timed: phase -> functions, as "module:Class.method" or "module:function", of `optimum_arb` or torch.
PHASES = {
    "reading": ["checkpoint.source:CheckpointSource.load"],  # the files are mapped: moving reads what is not cached
    "moving": ["torch.nn.modules.module:Module.to"],  # a layer to the device and back
    "recording": ["calibration.chain:ChainWalk._record"],
    "propagate": ["calibration.chain:ChainWalk._turn"],  # a layer's time that no other phase takes
    "summing ranks": ["calibration.fitting:sum_statistics"],
    "fit": ["calibration.fitting:Fitting.binarize"],
    "dividing": ["calibration.division:Division.work"],  # what several processes make for each other's fits
    "ahead": ["calibration.ahead:Ahead.run"],  # the float model's next layer, by processes that wait for a fit
    "handing over": ["calibration.ahead:Ahead.hand_over", "calibration.ahead:Ahead.collect"],
    "waiting for ranks": ["calibration.ranks:Ranks.exchange"],
    "writing": ["checkpoint.streamed:StreamedWeights._write", "checkpoint.streamed:StreamedWeights.finish_all"],
    "hashing the float files": ["loading.run_record:model_facts"],  # what was not hashed along the walk
    "assembling": ["checkpoint.finished:assemble"],
    "publishing": ["checkpoint.quantize:write_finished", "checkpoint.quantize:publish"],
}


class Phases:
    """Exclusive seconds of each phase.

    Args:
        device: is waited for wherever a phase begins or ends.
    """

    def __init__(self, device: str):
        self.seconds: dict[str, float] = {}
        self._cuda = device.startswith("cuda")
        self._open = ["other"]
        self._since = time.perf_counter()

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts for a phase where the main thread calls it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self.begin(phase)
            try:
                with record_function(f"phase: {phase}"):
                    return function(*args, **kwargs)
            finally:
                self.end()

        return timed

    def begin(self, phase: str) -> None:
        """From here on time counts for `phase`."""
        self._close()
        self._open.append(phase)

    def end(self) -> None:
        """From here on time counts for the phase around this one."""
        self._close()
        self._open.pop()

    def _close(self) -> None:
        if self._cuda and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def install(self, phases: dict[str, list[str]]) -> None:
        """Times functions of the package, wherever they are called by these names."""
        for phase, places in phases.items():
            for place in places:
                module, _, path = place.partition(":")
                name = module if module.startswith("torch") else f"optimum_arb.{module}"
                owner: Any = importlib.import_module(name)
                *outer, name = path.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                setattr(owner, name, self.wrap(phase, getattr(owner, name)))

    def install_statistics(self) -> None:
        """The runs of the float layer in which its inputs' products are summed."""
        from optimum_arb.calibration.experts import LayerStatistics

        enter, leave = LayerStatistics.__enter__, LayerStatistics.__exit__

        def entered(statistics: LayerStatistics) -> LayerStatistics:
            self.begin("statistics")
            return enter(statistics)

        def left(statistics: LayerStatistics, *exception: Any) -> None:
            leave(statistics, *exception)
            self.end()

        LayerStatistics.__enter__, LayerStatistics.__exit__ = entered, left  # type: ignore[method-assign]


class Layers(Progress):
    """Remembers when each layer was finished.

    Args:
        phases: what is read when one begins and ends.
        profiled: the number of the layer to profile, or None.
    """

    def __init__(self, phases: Phases, profiled: int | None = None) -> None:
        super().__init__()
        self.finished: list[float] = []
        self.profile: profile | None = None
        self.phases: list[dict[str, float]] = []  # of each layer
        self._phases = phases
        self._profiled = profiled

    def layer(self, name: str, targets: Any) -> Any:
        if not self.finished:
            self.finished.append(time.perf_counter())
        inner = super().layer(name, targets)
        if len(self.finished) - 1 == self._profiled:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self.profile = profile(activities=activities)
        return self._timed(inner, self.profile or nullcontext())

    @contextmanager
    def _timed(self, inner: Any, profiled: Any) -> Iterator[None]:
        before = dict(self._phases.seconds)
        with profiled, inner:
            yield
        after = self._phases.seconds
        self.phases.append({phase: seconds - before.get(phase, 0.0) for phase, seconds in after.items()})
        self.finished.append(time.perf_counter())

    def usual_phases(self) -> dict[str, float]:
        """Milliseconds of a layer behind the first one, the medians."""
        some = self.phases[1:] or self.phases
        names = {phase for found in some for phase in found}
        usual = {phase: statistics.median(found.get(phase, 0.0) for found in some) for phase in names}
        return {phase: round(1e3 * x, 1) for phase, x in sorted(usual.items(), key=lambda y: -y[1]) if x >= 1e-4}

    @property
    def seconds(self) -> list[float]:
        """Of each layer."""
        return [after - before for before, after in zip(self.finished, self.finished[1:], strict=False)]


def make_checkpoint(path: Path, shape: str, layers: int, device: str) -> None:
    """A Llama as a sharded safetensors checkpoint."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=4096)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    temporary = path.with_name(path.name + ".making")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config.save_pretrained(temporary)
    generator = torch.Generator(device).manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, device=device, generator=generator).mul_(0.02)
        large = torch.randint(0, columns, (max(1, columns // 200),), device=device, generator=generator)
        values[:, large] *= 4
        return values.to(device="cpu", dtype=torch.bfloat16)

    def norm() -> torch.Tensor:
        values = torch.ones(config.hidden_size, dtype=torch.bfloat16)
        values[torch.arange(0, config.hidden_size, 100)] = 20.0
        return values

    hidden, middle = config.hidden_size, config.intermediate_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    rows = {"q": hidden, "k": narrow, "v": narrow, "o": hidden}
    shapes = {f"self_attn.{name}_proj": (count, hidden) for name, count in rows.items()}
    shapes |= {"mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}
    layer = {f"{name}.weight": weight(*size) for name, size in shapes.items()}
    layer |= {"input_layernorm.weight": norm(), "post_attention_layernorm.weight": norm()}
    outside = {
        "model.embed_tokens.weight": weight(VOCABULARY, hidden),
        "model.norm.weight": norm(),
        "lm_head.weight": weight(VOCABULARY, hidden),
    }
    files = [{f"model.layers.{index}.{key}": value for key, value in layer.items()} for index in range(layers)]
    places = {}
    total = 0
    for index, tensors in enumerate([*files, outside]):
        name = f"model-{index + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, temporary / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = temporary / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    temporary.rename(path)


def tokens(samples: int, length: int) -> torch.Tensor:
    """Token ids int64 `[samples, length]`, the r-th most frequent one with a probability as 1 / (r + 3)."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1.0 / (torch.arange(VOCABULARY) + 3.0)
    drawn = torch.multinomial(frequency, samples * length, replacement=True, generator=generator)
    return torch.randperm(VOCABULARY, generator=generator)[drawn].view(samples, length)


def work(args: argparse.Namespace, source: Path, target: Path) -> None:
    """One process of a run; the first one prints what was measured."""
    from optimum_arb import ARBConfig
    from optimum_arb.calibration.distributed import distributed
    from optimum_arb.checkpoint.quantize import quantize_checkpoint

    ids = tokens(args.samples, args.length)
    config = ARBConfig(
        method=args.method, dataset=ids, num_samples=args.samples, sequence_length=args.length, **args.config
    )
    phases = Phases(args.device)
    layers = Layers(phases, args.layers - 1 if args.profile else None)
    if not args.no_phases:
        phases.install(PHASES)
        phases.install_statistics()
    cuda = args.device.startswith("cuda")
    with distributed() as ranks:
        if cuda:
            torch.zeros(1, device=args.device)  # the driver starts before the clock does
        start = time.perf_counter()
        phases.begin("rest")
        done = quantize_checkpoint(source, target, config, device=args.device, overwrite=True, progress=layers)
        phases.end()
        seconds = time.perf_counter() - start
        gpu = torch.cuda.max_memory_allocated() if cuda else None
        reserved = torch.cuda.max_memory_reserved() if cuda else None
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        everyone = ranks.exchange((gpu, reserved, resident, layers.usual_phases()), "measuring")
        if not ranks.is_first:
            return
    each = layers.seconds
    usual = statistics.median(each[1:] or each)
    outside = seconds - sum(each)
    phases.seconds.pop("other", None)
    figures = {
        "method": args.method,
        "config": args.config,
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": len(everyone),
        "num_layers": args.layers,
        "samples": args.samples,
        "length": args.length,
        "seconds": round(seconds, 2),
        f"seconds_of_{LAYERS[args.shape]}": round(outside + each[0] + (LAYERS[args.shape] - 1) * usual, 1),
        "layers": [round(value, 2) for value in each],
        "phases": {name: round(value, 2) for name, value in sorted(phases.seconds.items(), key=lambda x: -x[1])},
        "phases_of_a_layer_ms": [one[3] for one in everyone],
        "gpu_bytes": max(one[0] for one in everyone) if cuda else None,
        "gpu_bytes_reserved": max(one[1] for one in everyone) if cuda else None,
        "resident_bytes": max(one[2] for one in everyone),
        "bits_per_weight": round(done.report.bits_per_weight, 4),
        "output_error": done.report.mean_output_error,
    }
    print(json.dumps(figures), flush=True)
    if layers.profile is not None:
        print_profile(layers.profile, each[-1], cuda)


def print_profile(profiled: profile, seconds: float, cuda: bool) -> None:
    """Kernels (or operators) by their own time, and how long the GPU was busy."""
    if cuda:
        kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((e.time_range.start, e.time_range.end) for e in kernels if not e.name.startswith("phase: "))
        busy, reached = 0.0, 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        print(f"The last layer took {seconds:.2f} s, of which the GPU was busy {busy / 1e6:.2f} s.")
    table = profiled.key_averages().table(
        sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=45, max_name_column_width=90
    )
    print(table, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the float and the binarized model")
    parser.add_argument("--method", default="arb-hrc")
    parser.add_argument("--config", type=json.loads, default={}, help="more choices of ARBConfig, as JSON")
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers; of several, one run each (default: all)")
    parser.add_argument("--samples", type=int, help="calibration sequences (default: 128; tiny: 8)")
    parser.add_argument("--length", type=int, help="tokens of each (default: 2048; tiny: 256)")
    parser.add_argument("--processes", type=int, nargs="+", help="by torchrun; of several numbers, one run each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--no-phases", action="store_true", help="time layers and the whole alone")
    parser.add_argument("--profile", action="store_true", help="profile the last layer")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    parser.add_argument("--keep", action="store_true", help="keep the binarized models")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    tiny = args.shape == "tiny"
    args.samples = args.samples or (8 if tiny else 128)
    args.length = args.length or (256 if tiny else 2048)
    wanted, processes = args.layers or [LAYERS[args.shape]], args.processes
    for args.layers in wanted:
        source = args.out / f"float-{args.shape}-{args.layers}"
        if not source.exists():
            make_checkpoint(source, args.shape, args.layers, args.device)
        if args.worker:
            work(args, source, args.out / f"{args.method}-{os.environ.get('WORLD_SIZE', 1)}")
            continue
        for count in processes or [1]:
            command = [sys.executable]
            if processes:
                command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
            command += [__file__, "--worker", "--out", args.out, "--method", args.method, "--layers", args.layers]
            command += ["--config", json.dumps(args.config), "--samples", args.samples, "--length", args.length]
            command += ["--device", args.device, "--shape", args.shape]
            command += ["--profile"] * args.profile + ["--no-phases"] * args.no_phases
            if args.cold and not evict(source):
                parser.error(f"{source} stays in the page cache: choose a directory on a disk.")
            subprocess.run(list(map(str, command)), check=True)
            if not args.keep:
                shutil.rmtree(args.out / f"{args.method}-{count}", ignore_errors=True)


if __name__ == "__main__":
    main()
