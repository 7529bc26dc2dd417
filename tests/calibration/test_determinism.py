"""The same bytes from the same seed, whatever the threads and the batch size."""

from __future__ import annotations

import hashlib

import pytest
import torch
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.calibration.workers import in_order, one_thread
from optimum_arb.config import METHODS
from optimum_arb.spare_threads import spare_now

CPU = torch.device("cpu")


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of each tensor."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", hidden_size=64, intermediate_size=320)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("mixture"), "MixtralForCausalLM")


def binarize(path, threads: int = 1, dtype: torch.dtype = torch.float32, **choices):
    choices = {"dataset": tokens(4, 48), "num_samples": 4, "num_iterations": 2, "block_size": 64, **choices}
    if choices.get("method") == "arb-dbf":
        choices.pop("block_size")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        config = ARBConfig(**choices)
        found = digests(AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype))
        assert torch.get_num_threads() == threads
        return found
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_threads_of_calibration(llama, method):
    assert binarize(llama, 1, method=method) == binarize(llama, 2, method=method)


def test_threads_and_the_models_dtype(llama):
    once = binarize(llama, 1, torch.bfloat16)
    assert once == binarize(llama, 2, torch.bfloat16)
    assert once == binarize(llama, 3, torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_threads_without_calibration(llama, method):
    assert binarize(llama, 1, method=method, dataset=None) == binarize(llama, 2, method=method, dataset=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_sizes(llama, dtype):
    found = [binarize(llama, dtype=dtype, batch_size=size) for size in (None, 1, 3, 4)]
    assert found == [found[0]] * 4


def test_runs(llama):
    assert binarize(llama, planes=2) == binarize(llama, planes=2)
    other = binarize(llama, planes=2, dataset=tokens(4, 48, seed=1))
    assert other != binarize(llama, planes=2)


def test_experts(mixture):
    choices = {"dataset": tokens(4, 32), "num_samples": 4}
    assert binarize(mixture, 1, **choices) == binarize(mixture, 2, batch_size=2, **choices)


def test_layers_that_do_not_form_a_chain(tmp_path):
    """Whose statistics come from runs of the whole model."""
    source = save_tiny(tmp_path, "Gemma3ForCausalLM")
    choices = {"dataset": tokens(4, 32), "num_samples": 4}
    assert binarize(source, 1, **choices) == binarize(source, 2, batch_size=2, **choices)


# The workers


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_of_one_thread_each(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = list(in_order(lambda i: (i, torch.get_num_threads(), torch.is_grad_enabled()), range(20), CPU))
        assert found == [(i, 1, False) for i in range(20)]
        assert torch.get_num_threads() == threads
        assert list(in_order(lambda i: torch.get_num_threads(), range(3), CPU, most=1)) == [1] * 3
        with one_thread(CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_first_error_is_raised():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    done = []

    def task(i: int) -> int:
        if i == 3:
            raise ValueError("the third")
        return i

    try:
        with pytest.raises(ValueError, match="the third"):
            done.extend(in_order(task, range(10), CPU))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "tasks", "spare"), [(1, 1, 0), (2, 1, 1), (4, 1, 3), (4, 2, 1), (4, 3, 0), (2, 5, 0)]
)
def test_threads_that_too_few_tasks_leave_idle(threads, tasks, spare):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert list(in_order(lambda _: spare_now(), list(range(tasks)), CPU)) == [spare] * tasks
        assert list(in_order(lambda _: spare_now(), iter(range(tasks)), CPU)) == [0] * tasks  # how many is not known
        assert spare_now() == 0
    finally:
        torch.set_num_threads(before)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("planes", [1, 2])
def test_cpu_against_gpu(llama, planes):
    """Products round otherwise there, and a sign at its threshold turns: the outputs of both differ by less than
    either's error against the float model."""
    device = torch.accelerator.current_accelerator()
    config = {"dataset": tokens(16, 64), "num_samples": 16, "block_size": 64, "planes": planes}
    on_cpu, on_gpu = (
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=ARBConfig(**config), device_map=where)
        for where in ("cpu", device.type)
    )
    again = AutoModelForCausalLM.from_pretrained(llama, quantization_config=ARBConfig(**config), device_map=device.type)
    assert digests(again.cpu()) == digests(on_gpu.cpu())
    ids = tokens(4, 32, seed=2)
    plain = outputs(AutoModelForCausalLM.from_pretrained(llama), ids)
    first, second = outputs(on_cpu, ids), outputs(on_gpu, ids)
    assert (first - second).norm() < 0.5 * (first - plain).norm()
    packed = [(a, b) for a, b in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True) if a.dtype == torch.uint8]
    bits = sum(a.numel() * 8 for a, _ in packed)
    turned = sum(int(sum(((a ^ b) >> shift & 1).sum() for shift in range(8))) for a, b in packed)
    assert turned < 0.05 * bits
