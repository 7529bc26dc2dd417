"""Memory, latency, energy, samples: that the figures are what they say."""

from __future__ import annotations

import statistics
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

from optimum_arb.evaluate import energy, latency
from optimum_arb.evaluate.energy import CpuMeter, GpuMeter, measure_energy
from optimum_arb.evaluate.generation import sample
from optimum_arb.evaluate.latency import generate, measure_latency, random_prompt
from optimum_arb.evaluate.memory import disk_bytes, measure_memory

# Memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 MB of weights, which stand out from the noise of an allocator; one layer, so that it loads fast."""
    path = tmp_path_factory.mktemp("large")
    changes = {"intermediate_size": 25000, "hidden_size": 192, "num_hidden_layers": 1}
    return save_tiny(path / "model", "LlamaForCausalLM", **changes)


def test_memory_is_that_of_the_model_alone(large):
    ballast = torch.ones(50_000_000)  # of this process, which must not count
    found = measure_memory(str(large), prompt_tokens=16, new_tokens=2, timeout=200)
    weights = disk_bytes(str(large))["weights"]
    assert found["parameters"] == pytest.approx(weights, rel=0.01)
    assert 0.9 * weights < found["resident"] < 1.6 * weights
    assert found["peak"] >= found["resident"] - 4e6
    assert found["gpu_peak"] is None or torch.cuda.is_available()
    assert ballast.nbytes > 3 * weights


def test_a_process_that_fails_is_told_in_one_line(tmp_path):
    with pytest.raises(RuntimeError, match=r"the process for it failed: .*There is no model directory"):
        measure_memory(str(tmp_path / "missing"))


def test_disk_bytes(large):
    found = disk_bytes(str(large))
    assert found["weights"] == (large / "model.safetensors").stat().st_size
    assert found["files"] > found["weights"]
    assert disk_bytes("nobody/has-this-model") is None


# Latency


class Slow(torch.nn.Module):
    """Makes each call of a model last a known time."""

    def __init__(self, seconds, clock):
        super().__init__()
        self.seconds, self.clock = seconds, clock

    def forward(self, x):
        self.clock["now"] += self.seconds
        return x


def test_latency_of_models_of_known_speed(monkeypatch):
    """On a clock that only the models' calls move on: what a machine does besides is in no figure."""
    clock = {"now": 100.0}
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    models = {name: tiny_model("LlamaForCausalLM") for name in ("slow", "fast")}
    for name, seconds in (("slow", 0.06), ("fast", 0.02)):
        models[name].model.norm = torch.nn.Sequential(models[name].model.norm, Slow(seconds, clock))
    slow, fast = measure_latency(models, "slow", (1,), prompt_tokens=4, new_tokens=4, repeats=3)
    assert (slow.model, fast.model, fast.repeats) == ("slow", "fast", 3)
    for found, seconds in ((slow, 0.06), (fast, 0.02)):
        times = (found.prefill_seconds, found.decode_seconds, found.slowest_decode_seconds)
        assert times == pytest.approx((seconds,) * 3)
        assert found.decode_tokens_per_second == 1 / found.decode_seconds
        assert found.prefill_tokens_per_second == 4 / found.prefill_seconds
    assert fast.decode_speedup == pytest.approx(3)
    assert fast.prefill_speedup == pytest.approx(3)
    assert slow.decode_speedup is None


def test_speedup_is_of_the_same_round(monkeypatch):
    """A machine that becomes ten times slower half way changes both times and not their ratio."""
    speed = {"now": 1.0, "calls": 0}

    def fake(model, prompt, new_tokens, options=None):
        speed["calls"] += 1
        if speed["calls"] > 5:
            speed["now"] = 10.0
        step = speed["now"] * (2.0 if model is models["base"] else 1.0)
        return [step * index for index in range(new_tokens + 1)]

    models = {"base": tiny_model("LlamaForCausalLM"), "model": tiny_model("LlamaForCausalLM")}
    monkeypatch.setattr(latency, "generate", fake)
    base, model = measure_latency(models, "base", (2,), 4, 4, repeats=5)
    assert model.decode_speedup == pytest.approx(2.0)
    assert model.prefill_speedup == pytest.approx(2.0)
    assert base.decode_tokens_per_second == pytest.approx(2 / 20)


def test_generate_notes_every_token_and_keeps_the_length():
    model = tiny_model("LlamaForCausalLM")
    prompt = random_prompt(model, 3, 5)
    assert prompt.shape == (3, 5)
    assert torch.equal(prompt, random_prompt(model, 3, 5))
    times = generate(model, prompt, 7)
    assert len(times) == 8
    assert times == sorted(times)


def test_latency_bad_input():
    models = {"a": tiny_model("LlamaForCausalLM")}
    with pytest.raises(ValueError, match="more than the 64 positions"):
        measure_latency(models, prompt_tokens=60, new_tokens=8)
    with pytest.raises(ValueError, match="new_tokens=1 must be a whole number of at least 2"):
        measure_latency(models, prompt_tokens=4, new_tokens=1)


# Energy


@pytest.fixture
def powercap(tmp_path):
    """Two packages, a part of one, and the whole board; their counters stand at 1 J below their range of 100 J."""
    for name, kind in (("0", "package-0"), ("1", "package-1"), ("0:0", "core"), ("2", "psys")):
        directory = tmp_path / f"intel-rapl:{name}"
        directory.mkdir()
        (directory / "name").write_text(kind + "\n")
        (directory / "max_energy_range_uj").write_text("100000000\n")
        (directory / "energy_uj").write_text("99000000\n")
    return tmp_path


def test_counter_of_the_cpu_that_begins_anew(powercap):
    meter = CpuMeter(powercap / "intel-rapl:0")
    start = meter.joules()
    (powercap / "intel-rapl:0" / "energy_uj").write_text("2000000")
    assert meter.joules() - start == pytest.approx(3.0)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("1000000")
    assert meter.joules() - start == pytest.approx(102.0)


def test_energy_per_token(powercap, monkeypatch):
    """Each call of the model spends 4 J on one package and 2 on the other: of 10 tokens each, 0.6 J a token."""

    def spend(model, prompt, new_tokens, options=None):
        for name, joules in (("0", 4), ("1", 2)):
            file = powercap / f"intel-rapl:{name}" / "energy_uj"
            file.write_text(str((int(file.read_text()) + joules * 1_000_000) % 100_000_000))
        time.sleep(0.01)
        return []

    monkeypatch.setattr(energy, "generate", spend)
    models = {"a": tiny_model("LlamaForCausalLM"), "b": tiny_model("LlamaForCausalLM")}
    found = measure_energy(models, 2, 4, 5, seconds=0.1, powercap=powercap, idle_seconds=0.01)
    for result in found.values():
        assert result["available"]
        assert result["joules_per_token"] == pytest.approx(0.6)
        assert set(result["joules"]) == {"package-0, RAPL", "package-1, RAPL"}
        assert result["watts"] == pytest.approx(sum(result["joules"].values()) / result["seconds"])
        assert result["idle_watts"] == 0


def test_no_counter_is_told_and_nothing_guessed(tmp_path, powercap, monkeypatch):
    models = {"a": tiny_model("LlamaForCausalLM")}
    found = measure_energy(models, powercap=tmp_path / "none")["a"]
    assert found == {"available": False, "missing": [f"the CPU has no counter in {tmp_path / 'none'}"]}

    def refuse(self, directory):
        raise PermissionError

    monkeypatch.setattr(CpuMeter, "__init__", refuse)
    found = measure_energy(models, powercap=powercap)["a"]
    assert not found["available"]
    assert len(found["missing"]) == 2
    assert "only root may read it" in found["missing"][0]


def test_counter_of_a_gpu_is_found_by_its_uuid(monkeypatch):
    """NVML's own numbers are not torch's where some GPUs are hidden."""
    asked = []
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 7500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid="12-34", name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    meter = GpuMeter(torch.device("cuda:1"))
    assert asked == ["GPU-12-34"]
    assert meter.joules() == 7.5
    assert meter.name == "a GPU (cuda:1), NVML"


# Samples


def test_samples_are_greedy_and_told_without_the_prompt():
    model, tokenizer = tiny_model("LlamaForCausalLM"), tiny_tokenizer()
    (first, second) = sample(model, tokenizer, ["w5 w6 w7", "w9"], new_tokens=4)
    assert first["prompt"] == "w5 w6 w7"
    ids = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    expected = []
    with torch.no_grad():
        for _ in range(4):
            token = model(torch.cat([ids, torch.tensor([expected], dtype=torch.long)], 1)).logits[0, -1].argmax().item()
            expected.append(token)
            if token == model.config.eos_token_id:
                break
    assert first["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert second["prompt"] == "w9"
    with pytest.raises(ValueError, match="no chat template"):
        sample(model, tokenizer, ["w5"], chat=True)
    tokenizer.chat_template = "w8 {{ messages[0].content }} w9"
    (chatted,) = sample(model, tokenizer, ["w5"], new_tokens=3, chat=True)
    (plain,) = sample(model, tokenizer, ["w8 w5 w9"], new_tokens=3)
    assert chatted["text"] == plain["text"]


def test_medians_and_not_means(monkeypatch):
    times = iter([[0, 1, 2, 3], [0, 1, 2, 3], [0, 9, 19, 29], [0, 2, 4, 6]])
    monkeypatch.setattr(latency, "generate", lambda *_: next(times))
    (found,) = measure_latency({"a": tiny_model("LlamaForCausalLM")}, None, (1,), 4, 3, repeats=3)
    assert (found.prefill_seconds, found.decode_seconds) == (statistics.median([1, 9, 2]), 2)
