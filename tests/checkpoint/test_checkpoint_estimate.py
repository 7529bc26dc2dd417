import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf_models import save_model
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.checkpoint import estimate_memory
from optimum_arb.checkpoint import probe as probing
from optimum_arb.checkpoint.estimate import estimate
from optimum_arb.checkpoint.estimate_fit import fit_memory
from optimum_arb.checkpoint.probe import probe
from optimum_arb.nn import ARBLinear
from optimum_arb.report import model_report

TOKENS = torch.randint(5, 96, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"planes": 2, "block_size": 64, "modules_to_not_convert": ["up_proj"]}),
        ("Qwen2ForCausalLM", {"method": "rtn", "dataset": None, "block_size": -1}),
        ("OPTForCausalLM", {"method": "arb-rc", "salient_columns": 5, "dataset": None}),
        ("GPT2LMHeadModel", {"method": "billm", "salient_columns": 3, "dataset": None}),
        ("LlamaForCausalLM", {"col_scale": False, "overrides": {"down_proj": {"planes": 3}}}),
    ],
)
def test_bits_and_bytes_are_those_of_the_saved_model(tmp_path, family, choices):
    save_tiny(tmp_path / "float", family)
    config = ARBConfig(**{"dataset": TOKENS, **choices})
    expected = estimate(str(tmp_path / "float"), config, budget=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    packed = [tensor for m in model.modules() if isinstance(m, ARBLinear) for tensor in m.packed().values()]
    # scales too small for float16 are stored as float32, which only the weights themselves tell
    wide = sum(2 * tensor.numel() for tensor in packed if tensor.dtype == torch.float32)
    assert expected.packed_bytes == sum(tensor.numel() * tensor.element_size() for tensor in packed) - wide
    assert expected.bits_per_weight == pytest.approx(8 * expected.packed_bytes / expected.weights)
    assert expected.bits_range is None
    size = os.path.getsize(tmp_path / "packed" / "model.safetensors")
    # of the header: offsets have more or fewer digits, and what the run records beside its checksums is not known
    assert abs(expected.file_bytes + wide - size) <= 700
    assert expected.seconds is None
    assert expected.probe is None
    assert expected.packed_bytes + expected.float_bytes < expected.file_bytes


def test_searched_salient_columns_are_a_range(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(method="arb-rc", dataset=TOKENS)
    expected = estimate(str(tmp_path / "float"), config, budget=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    low, high = expected.bits_range
    assert low <= model.config.quantization_config.bits_per_weight <= high
    assert low < expected.bits_per_weight < high
    assert any("searched salient columns" in text for text in expected.assumptions)


def test_memory_grows_with_what_is_held(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    small, large = (
        estimate(str(tmp_path / "float"), ARBConfig(num_samples=count, sequence_length=64), budget=None)
        for count in (1, 10**6)
    )
    assert large.peak_ram_bytes - small.peak_ram_bytes > (10**6 - 1) * 64 * 96 * 4 * 0.99
    assert small.calibration_tokens == 64
    assert small.peak_gpu_bytes is None
    gpu = estimate(str(tmp_path / "float"), ARBConfig(num_samples=1), device="cuda", budget=None)
    assert 0 < gpu.peak_gpu_bytes < gpu.peak_ram_bytes


def test_the_time_is_the_sum_of_what_was_measured(tmp_path, monkeypatch):
    save_model(tmp_path / "float")
    result = estimate(str(tmp_path / "float"), ARBConfig(num_samples=4, sequence_length=64), budget=2.0)
    assert result.probe is not None
    assert result.seconds == pytest.approx(result.probe.fit_seconds + result.probe.forward_seconds)
    assert result.probe.fit_seconds > 0
    assert result.probe.forward_seconds > 0
    # a run of so small a layer is a few milliseconds: with one of a second, what else the machine does is no part of it
    monkeypatch.setattr(probing, "_timed", lambda run, device: 1.0)
    few, many = (
        estimate(str(tmp_path / "float"), ARBConfig(num_samples=count, sequence_length=64), budget=2.0)
        for count in (4, 400)
    )
    assert many.probe.forward_seconds == pytest.approx(100 * few.probe.forward_seconds)
    without = estimate(str(tmp_path / "float"), ARBConfig(dataset=None), budget=1.0)
    assert without.probe.forward_seconds == 0


@pytest.mark.parametrize(("kept", "runs"), [(True, 2.0), (False, 2.44)])
def test_how_often_a_layer_runs(tmp_path, monkeypatch, kept, runs):
    """With error correction once in each form; where the inputs of `down_proj` are not kept, what makes them again."""
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    monkeypatch.setattr(probing, "_timed", lambda run, device: 1.0)
    monkeypatch.setattr(probing, "LARGEST", 4 * 64 * 160 * 4 if kept else 4 * 64 * 160 * 4 - 1)
    config = ARBConfig(num_samples=4, sequence_length=64)
    found = estimate(str(tmp_path / "float"), config, budget=2.0).probe
    without = ARBConfig(num_samples=4, sequence_length=64, error_correction=0)
    plain = estimate(str(tmp_path / "float"), without, budget=2.0).probe
    assert found.forward_seconds / plain.forward_seconds == pytest.approx(runs / 2)


def test_a_small_budget_extrapolates_and_says_so():
    config = ARBConfig(method="rtn", dataset=None)
    result = probe(None, [], [(4096, 4096, config, 1)] * 2, (0, 0), "cpu", 0.02)
    assert any("4096 columns is extrapolated" in text for text in result.assumptions)
    assert result.seconds > 0


def test_bad_input(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    with pytest.raises(ValueError, match="dtype='float9' is unknown"):
        estimate(str(tmp_path / "float"), ARBConfig(), dtype="float9", budget=None)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=ARBConfig(method="rtn", dataset=None)
    )
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is already quantized"):
        estimate(str(tmp_path / "packed"), ARBConfig(), budget=None)


def test_experts_count_as_often_as_there_are(tmp_path):
    save_tiny(tmp_path / "float", "MixtralForCausalLM")
    config = ARBConfig(dataset=None)
    expected = estimate(str(tmp_path / "float"), config, budget=0.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    report = model_report(model)
    assert (expected.modules, expected.packed_bytes) == (len(report.modules), report.packed_bytes)
    assert expected.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert expected.seconds > 0


def test_memory_does_not_grow_with_layers(tmp_path, monkeypatch):
    # what the process holds already grows between two calls, by what the first one imports among other things
    held = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9))
    monkeypatch.setattr(estimate_memory, "psutil", SimpleNamespace(Process=lambda: held))
    for layers in (2, 16):
        save_tiny(tmp_path / str(layers), "LlamaForCausalLM", num_hidden_layers=layers)
    few, many = (
        estimate(str(tmp_path / str(layers)), ARBConfig(num_samples=4, sequence_length=64), budget=None)
        for layers in (2, 16)
    )
    assert few.peak_ram_bytes > 10**9
    assert many.peak_ram_bytes == few.peak_ram_bytes
    on_disk, in_memory = (
        estimate(
            str(tmp_path / "2"),
            ARBConfig(num_samples=10**6, sequence_length=64),
            budget=None,
            activations_on_disk=on_disk,
        )
        for on_disk in (True, False)
    )
    # the hidden states of both models, and what attention puts out in both; the input of down would be 41 GB
    expected = 4 * 10**6 * 64 * 96 * 4
    assert abs(in_memory.peak_ram_bytes - on_disk.peak_ram_bytes - expected) < 0.01 * expected


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_that_of_the_run(tmp_path, threads):
    """Of a process of its own, within 15 %: with two threads, two fits run at once."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak memory from /proc")
    sizes = {"vocab_size": 256, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).save_pretrained(
        tmp_path / "float"
    )
    code = f"""
import json, torch
from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.checkpoint.estimate import estimate
from optimum_arb.checkpoint.estimate_fit import fit_memory
path = {str(tmp_path)!r}
tokens = torch.randint(5, 256, (8, 64), generator=torch.Generator().manual_seed(0))
choices = ARBConfig(dataset=tokens, num_samples=8, sequence_length=64, admm_iterations=5)
expected = estimate(path + "/float", choices, budget=None).peak_ram_bytes
quantize_checkpoint(path + "/float", path + "/out", choices)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(json.dumps([expected, int(peak.split()[1]) * 1024]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    expected, measured = json.loads(run.stdout.strip().splitlines()[-1])
    assert abs(expected - measured) < 0.15 * measured


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_counts_the_fits_that_run_at_once(monkeypatch, device):
    """On a CPU as many as there are threads; on a GPU four of so small matrices, whatever the threads."""
    found = []
    for threads in (1, 2, 4, 8):
        monkeypatch.setattr(estimate_memory.torch, "get_num_threads", lambda threads=threads: threads)
        linears = [SimpleNamespace(rows=64, columns=96, config=ARBConfig(), experts=False)] * 7
        found.append(estimate_memory._fits(linears, device, True))
    one = fit_memory(64, 96, ARBConfig(), True, torch.device("cpu"))
    if device == "cuda":
        assert found == [4 * one] * 4
    else:
        alone, heap = (int(one * pieces) for pieces in estimate_memory.IN_PIECES), estimate_memory.HEAP
        first, several = alone
        assert found == [first, 2 * several + heap, 4 * several + heap, 4 * several + heap]


def test_refinement_is_said_not_to_be_counted(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(num_samples=4, sequence_length=64, refine="block")
    assert any("refine='block'" in text for text in estimate(str(tmp_path / "float"), config, budget=None).assumptions)
