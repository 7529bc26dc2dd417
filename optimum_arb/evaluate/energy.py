"""The energy of a generated token, from the counters of the hardware; where there is none, none is told."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from .latency import generate, random_prompt, vocabulary

POWERCAP = Path("/sys/class/powercap")
# Seconds without work, in which the power at rest is measured.
IDLE_SECONDS = 1.0
# How often the models take turns.
TURNS = 4


class Meter(Protocol):
    """A counter of energy."""

    name: str

    def joules(self) -> float:
        """Energy since any fixed moment."""


class GpuMeter:
    """The counter of one NVIDIA GPU, through NVML (Volta and later; it moves about every 100 ms)."""

    def __init__(self, device: torch.device):
        import pynvml

        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(device)
        # by its UUID, since CUDA_VISIBLE_DEVICES renumbers what torch sees and NVML does not
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self.name = f"{properties.name} ({device}), NVML"
        self.joules()  # raises where the GPU has no counter

    def joules(self) -> float:
        return self._read(self._handle) / 1e3  # of millijoules


class CpuMeter:
    """The counter of one CPU package, through RAPL (Linux), which begins anew at its range."""

    def __init__(self, directory: Path):
        self._counter = directory / "energy_uj"
        self._range = int((directory / "max_energy_range_uj").read_text())
        self.name = f"{(directory / 'name').read_text().strip()}, RAPL"
        self._last = self._microjoules()
        self._turns = 0

    def joules(self) -> float:
        now = self._microjoules()
        self._turns += now < self._last
        self._last = now
        return (now + self._turns * self._range) / 1e6

    def _microjoules(self) -> int:
        return int(self._counter.read_text())


def find_meters(models: Sequence[torch.nn.Module], powercap: Path = POWERCAP) -> tuple[list[Meter], list[str]]:
    """The counters of the hardware that some models run on, and why there are no others.

    Args:
        models: those of them on GPUs ask for the counters of these; the CPU's is always looked for.
        powercap: where Linux keeps those of the CPU.
    """
    meters: list[Meter] = []
    missing: list[str] = []
    devices = {parameter.device for model in models for parameter in model.parameters()}
    for device in sorted((device for device in devices if device.type == "cuda"), key=str):
        try:
            meters.append(GpuMeter(device))
        except ImportError:
            missing.append(f"{device}: NVML is read through nvidia-ml-py: pip install 'optimum-arb[energy]'")
        except Exception as error:  # NVML's own errors share no base class that is there without it
            missing.append(f"{device}: NVML tells no energy ({error})")
    # "intel-rapl:0" is a package, "intel-rapl:0:1" a part of it; the whole board, "psys", holds both
    every = (directory for directory in sorted(powercap.glob("intel-rapl:*")) if directory.name.count(":") == 1)
    packages = [directory for directory in every if _name(directory).startswith("package")]
    for directory in packages:
        try:
            meters.append(CpuMeter(directory))
        except PermissionError:
            missing.append(f"{directory / 'energy_uj'} is not readable: only root may read it on most systems")
        except (OSError, ValueError) as error:
            missing.append(f"{directory}: no counter ({error})")
    if not packages:
        missing.append(f"the CPU has no counter in {powercap}")
    return meters, missing


def measure_energy(
    models: Mapping[str, PreTrainedModel],
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    seconds: float = 5.0,
    generate_options: Mapping[str, Any] | None = None,
    powercap: Path = POWERCAP,
    idle_seconds: float = IDLE_SECONDS,
) -> dict[str, dict[str, Any]]:
    """Generates again and again, the models in turn, while the counters run.

    The counters are of whole GPUs and CPU packages: what else runs on the machine counts too. The power at rest is
    given beside, not taken off.

    Args:
        models: name -> model.
        batch_size, prompt_tokens, new_tokens: of each call of `generate`; its prompt's energy counts.
        seconds: for each model, at least; counters that move seldom need some.
        generate_options: more options of `generate`.
        powercap: where Linux keeps the CPU's counters.
        idle_seconds: measured before, without work.

    Returns:
        Name -> `available`; if True: `joules_per_token`, `joules` (meter -> joules), `watts`, `idle_watts`, `tokens`,
        `seconds`; and always `missing`: the counters that could not be read, and why.
    """
    meters, missing = find_meters(list(models.values()), powercap)
    if not meters:
        return {name: {"available": False, "missing": missing} for name in models}
    prompt = random_prompt(min(models.values(), key=vocabulary), batch_size, prompt_tokens)
    for model in models.values():
        generate(model, prompt, new_tokens, generate_options)
    start, before = time.perf_counter(), _read(meters)
    time.sleep(idle_seconds)
    idle = sum(_since(meters, before).values()) / (time.perf_counter() - start)
    joules = {name: {meter.name: 0.0 for meter in meters} for name in models}
    spent, tokens = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    for _ in range(TURNS):
        for name, model in models.items():
            start, before, elapsed = time.perf_counter(), _read(meters), 0.0
            while elapsed < seconds / TURNS:
                generate(model, prompt, new_tokens, generate_options)
                tokens[name] += batch_size * new_tokens
                elapsed = time.perf_counter() - start
            for meter, value in _since(meters, before).items():
                joules[name][meter] += value
            spent[name] += elapsed
    return {
        name: {
            "available": True,
            "joules_per_token": sum(joules[name].values()) / tokens[name],
            "joules": joules[name],
            "watts": sum(joules[name].values()) / spent[name],
            "idle_watts": idle,
            "tokens": tokens[name],
            "seconds": spent[name],
            "batch_size": batch_size,
            "missing": missing,
        }
        for name in models
    }


def _read(meters: Sequence[Meter]) -> dict[str, float]:
    return {meter.name: meter.joules() for meter in meters}


def _since(meters: Sequence[Meter], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in _read(meters).items()}


def _name(directory: Path) -> str:
    try:
        return (directory / "name").read_text()
    except OSError:
        return ""
