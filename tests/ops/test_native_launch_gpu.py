"""Native launches against Triton's own on a GPU, bit for bit; run with `pytest -m gpu` where `_launch` was built."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from packed_weights import random_binarized
from torch import nn

from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton.available import has_kernels

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not has_kernels(DEVICE), reason="needs a GPU with kernels"),
]
EVERY_M = (1, 2, 4, 5, 8, 16, 33, 64)


@pytest.fixture
def taken(monkeypatch):
    """The number of runs by the native launcher, a list of one; what they allocate is full of NaN before."""
    from optimum_arb.ops.backends.triton import native_launch

    if native_launch.load() is None:
        pytest.skip("needs launch.c: python setup.py build_ext --inplace, and the Triton release that it knows")
    counts = [0]
    run = native_launch.NativeLaunches.run

    def counted(self, *args):
        counts[0] += 1
        run(self, *args)

    def poisoned(shape, strides, dtype):
        made = torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
        return made.fill_(float("nan") if dtype.is_floating_point else -1 if dtype.is_signed else 255)

    monkeypatch.setattr(native_launch.NativeLaunches, "run", counted)
    monkeypatch.setattr(native_launch, "_empty", poisoned)
    return counts


def layer(planes: int, *, permuted: bool = True, bias: bool = False, dtype=torch.float16, rows: int = 160) -> ARBLinear:
    layout = planes_layout(planes, col_scale=planes < 3)
    weight = random_binarized(layout, rows, 512, permuted=permuted)
    added = torch.randn(rows, generator=torch.Generator().manual_seed(rows)).to(dtype) if bias else None
    return ARBLinear.from_binarized(weight, added).to(DEVICE)


def by_triton(module: nn.Module) -> nn.Module:
    """A copy, whose plans are its own: `without_native` makes them those of Triton."""
    copied = copy.deepcopy(module)
    share_inputs(copied)
    return copied


@pytest.fixture
def without_native(monkeypatch):
    """Calls a module so that all plans that it makes meanwhile are Triton's."""
    from optimum_arb.ops.backends.triton import native_launch

    def call(module, *args):
        with monkeypatch.context() as patched:
            patched.setattr(native_launch, "load", lambda: None)
            module(*args)
            return module(*args)

    return call


def random_input(m: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, 512, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_same_bits(taken, without_native, planes, permuted, bias, dtype):
    found = layer(planes, permuted=permuted, bias=bias, dtype=dtype)
    other = by_triton(found)
    for m in EVERY_M:
        for seed in range(4):
            x = random_input(m, dtype, seed)
            expected = without_native(other, x)
            before = taken[0]
            assert torch.equal(found(x), expected), f"{m} tokens, call {seed}"
            assert torch.equal(found(x.view(1, m, 512)), expected[None])
            assert taken[0] - before == 2 or seed == 0, f"{m} tokens: Triton launched"


class Attention(nn.Module):
    def __init__(self, planes: int, bias: bool):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (layer(planes, bias=bias, rows=rows) for rows in (160, 32, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_layers_of_one_input(taken, without_native, planes, bias):
    found = Attention(planes, bias)
    assert share_inputs(found) == 1
    other = by_triton(found)
    for m in EVERY_M:
        for seed in range(3):
            x = random_input(m, torch.float16, seed)
            before = taken[0]
            assert torch.equal(found(x), without_native(other, x)), f"{m} tokens, call {seed}"
            assert taken[0] > before or seed == 0, f"{m} tokens: Triton launched"


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 8, 64])
def test_graph(taken, m):
    found = layer(2)
    x = random_input(m, torch.float16)
    for _ in range(3):
        found(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = taken[0]
    with torch.cuda.graph(graph):
        out = found(x + found(x)[:, :1])
    assert taken[0] - before == 2
    for seed in range(3):
        x.copy_(random_input(m, torch.float16, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, found(x + found(x)[:, :1]))


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 16, 64])
def test_streams_and_threads(taken, m):
    """Threads that never used the GPU, each with a stream and an input of its own, share a layer's plan."""
    found = layer(2, rows=2048)
    inputs = [random_input(m, torch.float16, seed) for seed in range(3)]
    expected = [[found(x) for _ in range(3)][-1] for x in inputs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            results[index] += [found(inputs[index]) for _ in range(100)]
            torch.cuda.current_stream().synchronize()

    before = taken[0]
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken[0] - before >= 250  # a lost count of two threads is no fault
    for of_thread, wanted in zip(results, expected, strict=True):
        assert len(of_thread) == 100
        assert all(torch.equal(result, wanted) for result in of_thread)


@torch.no_grad()
def test_written_and_moved_tensors(taken, without_native):
    """Also the column scales, which are converted for bfloat16."""
    found = layer(2, bias=True)
    x = random_input(64, torch.bfloat16)
    other = by_triton(found)
    for _ in range(3):
        found(x)
    for name in ("weight_col_scale", "weight_row_scale"):
        for module in (found, other):
            getattr(module, name).mul_(2)
        for _ in range(3):
            assert torch.equal(found(x), without_native(other, x)), name
        for module in (found, other):
            getattr(module, name).data = getattr(module, name) * 1.5
        for _ in range(3):
            assert torch.equal(found(x), without_native(other, x)), name
    before = taken[0]
    found(x)
    assert taken[0] == before + 1


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 64])
def test_profilers_see_launches(taken, m):
    import triton

    found, seen = layer(2), []
    x = random_input(m, torch.float16)
    expected = [found(x) for _ in range(3)][-1]
    hook = seen.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        before = taken[0]
        assert torch.equal(found(x), expected)
        assert seen
        assert taken[0] == before
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    found(x)
    assert taken[0] == before + 1


@torch.no_grad()
def test_strided_rows(taken, without_native):
    """Few tokens of a wider tensor: the distance of rows is part of what is launched."""
    found = layer(2)
    other = by_triton(found)
    wide = random_input(8, torch.float16).repeat(1, 2)
    for m in (1, 2, 4):
        for x in (wide[:m, :512], wide[:m, :512].contiguous(), wide[: 2 * m : 2, :512]):
            for _ in range(2):
                assert torch.equal(found(x), without_native(other, x))
    assert taken[0]


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices(taken):
    found = layer(2)
    second = torch.device("cuda", 1)
    other = copy.deepcopy(found).to(second)
    for m in (1, 8, 64):
        x = random_input(m, torch.float16)
        for current in (0, 1, 0, 1):
            with torch.cuda.device(current):
                assert torch.equal(other(x.to(second)).to(DEVICE), found(x))
    assert taken[0]
