"""Native launches against Triton's own on a GPU, bit for bit; run with `pytest -m gpu` where `_launch` was built."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from attention_layers import Attention
from packed_weights import random_binarized
from torch import nn

from optimum_arb.format.hadamard import random_signs
from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton.available import has_kernels

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not has_kernels(DEVICE), reason="needs a GPU with kernels"),
]
EVERY_M = (1, 2, 4, 5, 8, 16, 33, 64)
PROMPTS = (17, 64, 512, 2048)


@pytest.fixture
def taken(monkeypatch):
    """The number of runs by the native launcher, first of a list; what they allocate is full of NaN before."""
    from optimum_arb.ops.backends.triton import calls, native_launch, outputs

    if native_launch.load() is None:
        pytest.skip("needs launch.c: python setup.py build_ext --inplace, and a Triton release that it knows")
    counts = [0]

    def count(name: str) -> None:
        run = getattr(native_launch.NativeLaunches, name)

        def counted(self, *args):
            counts[0] += 1
            run(self, *args)

        monkeypatch.setattr(native_launch.NativeLaunches, name, counted)

    count("run")
    count("run_group")
    make = calls.make_calls

    class Calls:
        """Those that need no step of Python's interpreter."""

        def __init__(self, watched):
            self.made = make(watched)
            assert self.made is not None, "needs calls.c: python setup.py build_ext --inplace"
            self.add = self.made.add

        def __call__(self, x):
            found = self.made(x)
            if found is not None:
                counts[0] += 1
                counts.append(1)  # one more of these
            return found

    monkeypatch.setattr(calls, "make_calls", Calls)

    def poisoned(shape, strides, dtype):
        made = torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
        return made.fill_(float("nan") if dtype.is_floating_point else -1 if dtype.is_signed else 255)

    monkeypatch.setattr(outputs, "_empty", poisoned)
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
    assert len(taken) > 5 or not hopper()  # calls without a step of the interpreter


@pytest.fixture
def scales_input(monkeypatch):
    """Every product by "hopper" reads x multiplied by its column scales."""
    from optimum_arb.ops.backends.triton import dispatch

    if not hopper():
        pytest.skip("not a GPU of compute capability 9.0")
    chosen = dispatch._config
    monkeypatch.setattr(dispatch, "_config", lambda *of: replace(chosen(*of), scale_input=True))


@torch.no_grad()
@pytest.mark.usefixtures("scales_input")
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_same_bits_of_scaled_inputs(taken, without_native, planes, permuted):
    found = layer(planes, permuted=permuted, bias=True)
    other = by_triton(found)
    for m in (17, 64, 128):
        for seed in range(3):
            x = random_input(m, torch.float16, seed)
            expected = without_native(other, x)
            before = taken[0]
            assert torch.equal(found(x), expected), f"{m} tokens, call {seed}"
            assert torch.equal(found(x.view(1, m, 512)), expected[None])
            assert taken[0] - before == 2 or seed == 0, f"{m} tokens: Triton launched"


@torch.no_grad()
@pytest.mark.usefixtures("scales_input")
@pytest.mark.parametrize("choices", [{}, {"permuted": True, "one_order": True}, {"hadamard": 128}], ids=str)
@pytest.mark.parametrize("planes", [1, 2])
def test_prompts_of_scaled_inputs(taken, planes, choices):
    """One native call for all layers, and the bits that each computes alone."""
    found = prompt_layers(planes, (160, 32, 7), 512, bias=True, dtype=torch.bfloat16, **choices)
    other = alone(found)
    for m in (17, 64, 128):
        for seed in range(3):
            x = random_input(m, torch.bfloat16, seed)
            expected = other(x)
            before = taken[0]
            assert torch.equal(found(x), expected), f"{m} tokens, call {seed}"
            assert taken[0] - before == 1 or seed == 0, f"{m} tokens, call {seed}: {taken[0] - before} native runs"
            assert torch.equal(found(x[None]), expected[None])


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_layers_of_one_input(taken, without_native, planes, bias):
    found = Attention([layer(planes, bias=bias, rows=rows) for rows in (160, 32, 7)])
    assert share_inputs(found) == 1
    other = by_triton(found)
    for m in EVERY_M:
        for seed in range(3):
            x = random_input(m, torch.float16, seed)
            before = taken[0]
            assert torch.equal(found(x), without_native(other, x)), f"{m} tokens, call {seed}"
            assert taken[0] > before or seed == 0, f"{m} tokens: Triton launched"


def prompt_layers(
    planes: int, rows: tuple[int, ...], columns: int, *, one_order: bool = False, hadamard: int = 0, **choices
) -> Attention | GatedMLP:
    """Layers of one input, with orders of columns of their own (if any) unless told otherwise."""
    layout, found = planes_layout(planes, col_scale=planes < 3), []
    bias, dtype = choices.pop("bias", False), choices.pop("dtype", torch.float16)
    for seed, count in enumerate(rows):
        weight = random_binarized(layout, count, columns, seed=seed, **choices)
        if hadamard:
            weight.hadamard, weight.input_signs = hadamard, random_signs(columns, 3)
        if found and (one_order or hadamard):
            weight.permutation = found[0].permutation
        found.append(weight)
    generator = torch.Generator().manual_seed(5)
    made = [
        ARBLinear.from_binarized(w, torch.randn(w.shape[0], generator=generator).to(dtype) if bias else None)
        for w in found
    ]
    module = Attention(made) if len(made) == 3 else GatedMLP(made)
    module.to(DEVICE)
    assert share_inputs(module) == 1
    return module


class GatedMLP(nn.Module):
    def __init__(self, layers: list[ARBLinear]):
        super().__init__()
        self.gate_proj, self.up_proj = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.up_proj(x), self.gate_proj(x)], -1)


def alone(module: nn.Module) -> nn.Module:
    """A copy whose layers each compute their own result."""
    return copy.deepcopy(module)  # a copy shares nothing until it is told to


def group_plans(module: nn.Module) -> dict:
    shared = next(layer.shared_input for layer in module.modules() if isinstance(layer, ARBLinear))
    return shared._prompts._plans or {}


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "columns", "choices"),
    [
        ((512, 128, 128), 512, {}),
        ((160, 32, 7), 512, {"permuted": True}),
        ((160, 32, 7), 512, {"permuted": True, "one_order": True}),
        ((1024, 96, 96), 2048, {"hadamard": 128}),
        ((160, 32, 7), 384, {"hadamard": 256, "permuted": True}),
        ((431, 123), 4224, {"permuted": True, "one_order": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("planes", "bias", "dtype"),
    [(1, False, torch.bfloat16), (1, True, torch.float16), (2, True, torch.bfloat16)],
    ids=str,
)
def test_prompts_of_layers_of_one_input(taken, monkeypatch, planes, rows, columns, choices, bias, dtype):
    """One native call for all layers, and the bits that each computes alone."""
    from optimum_arb.ops.backends.triton import dispatch

    # for more tokens the table may say to unpack the weight first, when each layer is by itself
    tuned = dispatch._tuned
    monkeypatch.setattr(dispatch, "_tuned", lambda *of: tuned(*of[:-1], min(of[-1], 512)))
    found = prompt_layers(planes, rows, columns, bias=bias, dtype=dtype, **choices)
    other = alone(found)
    assert all(layer.shared_input is None for layer in other.children())
    for m in PROMPTS:
        for seed in range(3):
            x = torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
            expected = other(x)
            before = taken[0]
            assert torch.equal(found(x), expected), f"{m} tokens, call {seed}"
            if (x.numel(), dtype) in group_plans(found):
                assert taken[0] - before == 1 or seed == 0, f"{m} tokens, call {seed}: {taken[0] - before} native runs"
            assert torch.equal(found(x[None]), expected[None])
    if hopper():
        assert len(taken) > 2 * len(PROMPTS), "calls that were ready were not taken"
        assert all((m * columns, dtype) in group_plans(found) for m in PROMPTS)


def hopper() -> bool:
    return torch.cuda.get_device_capability(DEVICE)[0] == 9


@torch.no_grad()
def test_prompts_of_a_group_in_a_graph(taken):
    """Captured after the launches were made ready, and before."""
    for warm in (3, 0):
        found = prompt_layers(2, (160, 32, 7), 512, bias=True)
        other = alone(found)
        x = random_input(64, torch.float16)
        for module in (found, other):
            for _ in range(warm or 1):
                module(x if warm else x[:60])  # compiled, for other numbers of tokens
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = found(x)
        for seed in range(3):
            x.copy_(random_input(64, torch.float16, seed))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, other(x))


@torch.no_grad()
def test_prompts_of_a_group_of_written_tensors(taken):
    """Column scales, which are converted for bfloat16, and orders of columns, which are compared once."""
    found = prompt_layers(2, (160, 32, 7), 512, permuted=True, one_order=True)
    other = alone(found)
    x = random_input(64, torch.bfloat16)
    for name in (None, "weight_col_scale", "weight_permutation", "weight_row_scale"):
        for module in (found, other):
            if name is not None:
                written = getattr(module.k_proj, name)
                written.copy_(written.flip(-1))
        for _ in range(3):
            before = taken[0]
            expected = other(x)
            alone_took = taken[0] - before
            assert torch.equal(found(x), expected), name
        assert not hopper() or taken[0] - before - alone_took == 1


@torch.no_grad()
def test_prompts_of_a_group_on_streams_and_threads(taken):
    found = prompt_layers(2, (2048, 256, 256), 512, bias=True)
    inputs = [random_input(64, torch.float16, seed) for seed in range(3)]
    expected = [[found(x) for _ in range(3)][-1] for x in inputs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            results[index] += [found(inputs[index]) for _ in range(100)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_thread, wanted in zip(results, expected, strict=True):
        assert len(of_thread) == 100
        assert all(torch.equal(result, wanted) for result in of_thread)


def test_prompts_of_a_group_leave_no_memory(taken):
    """Each result has memory of its own, and nothing holds it, or the input, when all were taken."""
    found = prompt_layers(2, (1376, 1376), 640)
    with torch.no_grad():
        for _ in range(3):
            found(random_input(512, torch.float16).repeat(1, 2)[:, :640].contiguous())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(DEVICE)
        x = random_input(512, torch.float16).repeat(1, 2)[:, :640].contiguous()
        gate, up = found.gate_proj(x), found.up_proj(x)
        one = gate.untyped_storage().nbytes()
        assert one == up.untyped_storage().nbytes() == 512 * 1376 * 2
        held = torch.cuda.memory_allocated(DEVICE)
        del gate
        assert torch.cuda.memory_allocated(DEVICE) == held - one
        del up, x
        assert torch.cuda.memory_allocated(DEVICE) == before
    # with gradients each computes its own
    x = torch.randn(64, 640, device=DEVICE, dtype=torch.float16, requires_grad=True)
    found(x).sum().backward()
    assert x.grad is not None


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
