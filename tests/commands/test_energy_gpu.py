"""Energy on an NVIDIA GPU, from NVML's real counter."""

from __future__ import annotations

import statistics
import threading
import time

import pytest
import torch

from optimum_arb.commands.main import main
from optimum_arb.evaluate.energy import GpuMeter

pynvml = pytest.importorskip("pynvml", reason="NVML is read through nvidia-ml-py: pip install nvidia-ml-py")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda:0")
SECONDS = 3.0


def work(seconds: float) -> None:
    """Products that keep the whole GPU busy."""
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            x @ x
        torch.cuda.synchronize(DEVICE)


def watts(meter: GpuMeter, seconds: float, busy: bool) -> float:
    start, before = time.perf_counter(), meter.joules()
    work(seconds) if busy else time.sleep(seconds)
    return (meter.joules() - before) / (time.perf_counter() - start)


def test_the_counter_agrees_with_the_power_that_nvml_tells():
    """Joules over seconds against samples of the momentary power, and below the limit of the board."""
    meter = GpuMeter(DEVICE)
    assert meter.name.startswith(torch.cuda.get_device_name(DEVICE))
    work(1.0)  # the power rises over some hundred milliseconds
    samples: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            samples.append(pynvml.nvmlDeviceGetPowerUsage(meter._handle) / 1e3)  # of milliwatts

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        busy = watts(meter, SECONDS, busy=True)
    finally:
        done.set()
        watcher.join()
    print(f"\n{meter.name}: {busy:.0f} W busy, {statistics.mean(samples):.0f} W of {len(samples)} samples", end="")
    assert busy == pytest.approx(statistics.mean(samples), rel=0.15)
    assert busy < 1.05 * pynvml.nvmlDeviceGetEnforcedPowerLimit(meter._handle) / 1e3
    time.sleep(2.0)
    idle = watts(meter, SECONDS, busy=False)
    print(f", {idle:.0f} W idle")
    assert 0 < idle < 0.7 * busy


def test_evaluate_and_verify_tell_joules_a_token(call, float_model, binarized_model, tmp_path):
    fast = ("--prompt-tokens", 8, "--new-tokens", 8, "--batch-sizes", "1", "--repeats", 1, "--energy-seconds", 2)
    models = (binarized_model, "--baseline", float_model, "--device-map", "cuda")
    report = call("evaluate", *models, "--measure", "energy", *fast, "--json")
    for model in report["models"]:
        energy = model["energy"]
        assert energy["available"]
        (name,) = [name for name in energy["joules"] if name.endswith("(cuda:0), NVML")]
        assert energy["joules"][name] > 0
        assert energy["seconds"] >= 2
        assert energy["joules_per_token"] == pytest.approx(sum(energy["joules"].values()) / energy["tokens"])
        assert energy["watts"] == pytest.approx(sum(energy["joules"].values()) / energy["seconds"])
        assert energy["idle_watts"] > 0
        print(f"\n{model['role']}: {energy['joules_per_token']:.3f} J a token at {energy['watts']:.0f} W", end="")
    thresholds = tmp_path / "verify.toml"
    for bound, code in (("1000.0", 0), ("1e-9", 1)):
        thresholds.write_text(f"max_joules_per_token = {bound}\n[measure]\nprompt_tokens = 8\nnew_tokens = 8\n")
        arguments = ["verify", *models, "--thresholds", thresholds]
        assert main([str(argument) for argument in arguments]) == code
