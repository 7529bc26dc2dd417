"""Launches that begin while the one before them runs read what it wrote; run with `pytest -m gpu` where there is a GPU.

Memory is not poisoned here: that would be a launch between any two.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_layers import DEVICE, NEEDS_KERNELS, random_input, random_weight, run
from packed_weights import random_binarized

from optimum_arb.experts.packing import stack_experts
from optimum_arb.format.layout import planes_layout
from optimum_arb.format.packing import TENSOR_NAMES, pack
from optimum_arb.ops import grouped_linear

pytestmark = NEEDS_KERNELS[:2]
WIDTH = 2048
INPUTS = 24


def writers(given: torch.Tensor) -> dict[str, Callable[[int, torch.Tensor], object]]:
    """What leaves the i-th of the given inputs in x: as late as it can, and by all that a stream is asked for."""
    side = torch.cuda.Stream(DEVICE)

    def elsewhere(i: int, x: torch.Tensor) -> None:
        side.wait_stream(torch.cuda.current_stream(DEVICE))
        with torch.cuda.stream(side):
            torch.mul(given[i], 1, out=x)
        torch.cuda.current_stream(DEVICE).wait_stream(side)

    def after_a_while(i: int, x: torch.Tensor) -> None:
        x.fill_(float("nan"))
        torch.cuda._sleep(20_000)
        torch.mul(given[i], 1, out=x)

    return {
        "kernel": lambda i, x: torch.mul(given[i], 1, out=x),
        "copy": lambda i, x: x.copy_(given[i]),
        "set and kernel": lambda i, x: torch.add(x.zero_(), given[i], out=x),
        "another stream": elsewhere,
        "after a while": after_a_while,
    }


def check(multiply: Callable[[torch.Tensor], torch.Tensor], write: Callable[[int, torch.Tensor], object], x) -> None:
    """The same bits as with a wait between any two, one after another and in a CUDA graph."""

    def all_of_them() -> list[torch.Tensor]:
        found = []
        for i in range(INPUTS):
            write(i, x)
            found.append(multiply(x))
        return found

    expected = []
    for i in range(INPUTS):
        write(i, x)
        torch.cuda.synchronize()
        expected.append(multiply(x))
        torch.cuda.synchronize()
    assert not any(result.isnan().any() for result in expected)
    assert not torch.equal(expected[0], expected[1])
    for _ in range(5):
        assert all(map(torch.equal, all_of_them(), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = all_of_them()
    for _ in range(5):
        for result in found:
            result.zero_()
        graph.replay()
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("what", ["kernel", "copy", "set and kernel", "another stream", "after a while"])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 64])
def test_input(tokens, what):
    """A product of a product of a product, each launched right behind the one before."""
    weights = [random_weight(f"planes-{planes}-col", WIDTH, WIDTH, seed=planes) for planes in (1, 2, 1)]

    def multiply(x: torch.Tensor) -> torch.Tensor:
        for packed in weights:
            x = run(x, packed)
        return x

    given = torch.stack([random_input(tokens, WIDTH, torch.bfloat16, seed) for seed in range(INPUTS)])
    check(multiply, writers(given)[what], torch.empty_like(given[0]))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
def test_transformed_input(tokens, permuted):
    from optimum_arb.ops.backends.triton.few_tokens import prepare, run_prepared

    packed = random_weight("planes-1-col", WIDTH, WIDTH)
    ready = prepare([packed])
    if ready is None:
        pytest.skip("not a GPU with products of one bit")
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int16)[None]
    sign = (torch.arange(WIDTH, device=DEVICE) % 3 % 2 * 2 - 1).to(torch.int8)
    change = (order if permuted else None, sign, 128)
    given = torch.stack([random_input(tokens, WIDTH, torch.float16, seed) for seed in range(INPUTS)])
    check(
        lambda x: run_prepared(x, ready, None, (WIDTH,), change=change),
        writers(given)["kernel"],
        torch.empty_like(given[0]),
    )


def test_which_expert():
    """The numbers of the experts are written right before the product as well."""
    layout, count, rows = planes_layout(2, col_scale=True), 4, 8
    tensors = stack_experts([[pack(random_binarized(layout, 512, WIDTH, seed=seed))] for seed in range(count)])
    tensors = {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in tensors.items()}
    assert set(tensors) <= set(TENSOR_NAMES)
    given = torch.stack([random_input(rows, WIDTH, torch.float16, seed) for seed in range(INPUTS)])
    ends = torch.randint(0, rows + 1, (INPUTS, count), generator=torch.Generator().manual_seed(2)).sort().values
    ends[:, -1] = rows
    ends = ends.to(DEVICE)
    offsets = torch.empty_like(ends[0])

    def write(i: int, x: torch.Tensor) -> None:
        torch.mul(given[i], 1, out=x)
        torch.mul(ends[i], 1, out=offsets)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return grouped_linear(
            x, offsets, **tensors, layout=layout.name, block_size=128, parts=1, backend="triton"
        )  # fmt: skip

    check(multiply, write, torch.empty_like(given[0]))
