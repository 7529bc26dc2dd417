"""Several models, threads and processes at once, and what is left of a model that was let go of."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest
import torch
from fresh_process import python
from packed_weights import random_packed
from tiny_models import outputs, save_tiny, tokens
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear
from optimum_arb.ops.backends import cpu
from optimum_arb.ops.backends.cpu import native
from optimum_arb.ops.backends.packed import PackedWeight

BACKENDS = ["auto", "reference", "dequantize"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A binarized Llama."""
    directory = tmp_path_factory.mktemp("saved")
    source = save_tiny(directory / "float", "LlamaForCausalLM")
    config = ARBConfig(planes=2, dataset=tokens(), num_samples=4, block_size=64)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(directory / "packed")
    return directory / "packed"


def load(path: Path, backend: str = "auto"):
    chosen = {} if backend == "auto" else {"quantization_config": ARBConfig(backend=backend)}
    return AutoModelForCausalLM.from_pretrained(path, **chosen)


def answer(model, seed: int) -> list[list[int]]:
    return model.generate(tokens(1, 6, seed), max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()


# Threads


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_generate_with_one_model(saved, backend):
    alone = load(saved, backend)
    expected = [answer(alone, seed) for seed in range(6)]
    model = load(saved, backend)  # whose first call, too, several threads make
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda seed: answer(model, seed), range(6))) == expected


def test_threads_load_and_generate_with_models_of_their_own(saved):
    expected = [answer(load(saved), seed) for seed in range(2)]

    one_at_a_time = Lock()  # transformers' loading replaces a method of all its models for as long as it takes

    def run(seed: int) -> list[list[int]]:
        with one_at_a_time:
            model = AutoModelForCausalLM.from_pretrained(saved)
        return answer(model, seed)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [0, 1, 0, 1])) == expected * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_threads_generate_with_one_model_on_a_gpu(saved, dtype):
    """The layers of one input are computed together there, and copied for their kernel at the first call."""

    def moved():
        return AutoModelForCausalLM.from_pretrained(saved, dtype=dtype).to("cuda")

    def answer_on_gpu(model, seed: int) -> list[list[int]]:
        ids = tokens(1, 6, seed).to("cuda")
        return model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False).tolist()

    alone = moved()
    expected = [answer_on_gpu(alone, seed) for seed in range(8)]
    model = moved()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: answer_on_gpu(model, seed), range(8))) == expected
    groups = {m.shared_input for m in model.modules() if isinstance(m, ARBLinear)} - {None}
    assert groups
    assert all(group.enabled and not group._waiting for group in groups)


# One process, two models


def test_two_models_in_turn(saved, tmp_path):
    """Of the same shapes and other values, so that what is kept by shape or by address would show."""
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM", seed=1)
    other = AutoModelForCausalLM.from_pretrained(source, quantization_config=ARBConfig(dataset=None, block_size=64))
    first = load(saved)
    wanted = answer(first, 0), answer(other, 0)
    assert wanted[0] != wanted[1]
    for _ in range(2):
        assert answer(first, 0) == wanted[0]
        assert answer(other, 0) == wanted[1]
    del first
    again = load(saved)  # where the first one was, perhaps
    assert (answer(again, 0), answer(other, 0)) == wanted


# Processes


_LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps(model.generate(torch.tensor(json.loads(sys.argv[2])), max_new_tokens=8, do_sample=False).tolist()))
"""


def test_processes_load_the_same_model(saved):
    prompt = tokens(1, 6)
    expected = load(saved).generate(prompt, max_new_tokens=8, do_sample=False).tolist()

    def run(_: int) -> list[list[int]]:
        found = python(_LOAD, saved, json.dumps(prompt.tolist()))
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [expected] * 2


@pytest.fixture
def two_threads():
    """Two threads for torch, used once, so that OpenMP has started them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2**20).exp_()
    yield
    torch.set_num_threads(before)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_native = pytest.mark.skipif(native.load() is None, reason="the native extension was not built")


@needs_fork
@needs_native
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_forked_process_computes(two_threads, tokens):
    """OpenMP's threads do not survive a fork: a child that waits for them hangs."""
    packed = random_packed(planes_layout(2, col_scale=True), 1024, 1024, permuted=True)
    x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(0))
    expected = native.linear(x, packed, None)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends the child, which is a failure
        same = torch.equal(native.linear(x, packed, None), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class _Encoded(Dataset):
    """Inputs that a packed model turns into features, as a data set of embeddings does."""

    def __init__(self, model):
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return outputs(self.model, tokens(1, 6, index))[0]


@needs_fork
def test_forked_data_loaders(saved, two_threads):
    model = load(saved)
    data = _Encoded(model)
    torch.set_num_threads(1)  # as in the processes of a loader; two sum in another order on a CPU without AVX-512
    expected = torch.stack([data[index] for index in range(4)])
    torch.set_num_threads(2)
    found = torch.cat(list(DataLoader(data, 2, num_workers=2, multiprocessing_context="fork", timeout=100)))
    assert torch.equal(found, expected)


# What is left


@pytest.fixture
def no_collector():
    """Without Python's collector of cycles: what goes, goes with its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("how", ["calibrated", "data-free", *BACKENDS])
def test_a_model_is_freed_with_its_last_reference(saved, tmp_path, no_collector, how):
    if how in BACKENDS:
        model = load(saved, how)
    else:
        source = save_tiny(tmp_path, "LlamaForCausalLM")
        dataset = tokens() if how == "calibrated" else None
        config = ARBConfig(dataset=dataset, num_samples=4, block_size=64)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    answer(model, 0)
    left = [weakref.ref(module) for module in model.modules()]
    left += [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    left += [weakref.ref(m._dequantized) for m in model.modules() if getattr(m, "_dequantized", None) is not None]
    assert (how == "dequantize") == (len(left) > len([*model.modules()]) + len([*model.parameters()]))
    del model
    assert not [reference() for reference in left if reference() is not None]


def test_the_memory_of_a_model_goes_with_it(no_collector):
    """Measured: the resident set of the process."""
    cycles = benchmark("cycles")
    layout, rows, columns = planes_layout(2), 8192, 16384
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        bits = torch.randint(256, (rows, columns // 4), dtype=torch.uint8, generator=generator)  # 34 MB
        scales = torch.ones(rows, columns // 128 * 2, dtype=torch.float16)
        cpu.linear(torch.ones(1, columns), PackedWeight(layout, 128, columns, bits, scales), None)

    run()
    before = cycles.resident()
    for _ in range(3):
        run()
    assert cycles.resident() - before < 16e6


def benchmark(name: str):
    folder = str(Path(__file__).resolve().parents[1] / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)  # last: a module of the tests has the same name as one there
    return importlib.import_module(name)


def test_cycles_of_loading_and_generating(saved):
    """A few of `benchmarks/cycles.py`."""
    samples = benchmark("cycles").run_cycles(saved, cycles=12, every=6)
    assert [sample.modules for sample in samples] == [0, 0, 0]
    assert samples[-1].resident - samples[1].resident < 4e6
