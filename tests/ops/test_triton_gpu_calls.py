"""What a call of a packed layer costs a GPU beside its result; run with `pytest -m gpu` where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import (
    DEVICE,
    NEEDS_KERNELS,
    TOLERANCE,
    check,
    error,
    module,
    random_input,
    random_weight,
    run,
)

pytestmark = NEEDS_KERNELS
NAMES = ["planes-1", "planes-2-col"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_prompts(name, dtype):
    """As long as they come."""
    packed = random_weight(name, 160, 512, permuted=True)
    for m in (512, 4096, 16384):
        check(random_input(m, 512, dtype), packed)


@torch.no_grad()
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait(name, permuted):
    layer = module(name=name, permuted=permuted)
    inputs = [random_input(m, 512, torch.float16) for m in (1, 4, 8, 16, 64, 600)]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [layer(x) for x in inputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-col"])
def test_autocast_as_of_a_linear(name, dtype):
    layer = module(name=name)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for m in (1, 16, 128, 4096):
        x = random_input(m, 512, dtype)
        with torch.autocast("cuda", other):
            found = [layer(x) for _ in range(3)]
        assert all(each.dtype == other and torch.equal(each, found[0]) for each in found)
        assert error(found[0], reference(x, layer)) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_dense_weight_for_each_call(dtype, permuted):
    """By the plan that is kept: as exact as the operator, the same bits twice, of the weight as it is then."""
    layer = module(name="groups-all-salient-col", permuted=permuted)
    packed = layer.packed_weight()
    for m in (128, 600):
        x = random_input(m, 512, dtype)
        found = [layer(x) for _ in range(3)]
        assert all(torch.equal(each, found[0]) for each in found)
        assert torch.equal(found[0], run(x, packed, layer.bias))
        assert error(found[0], reference(x, layer)) < TOLERANCE[dtype]
    layer.weight_row_scale.mul_(2)
    twice = layer(x)
    assert not torch.equal(twice, found[0])
    assert error(twice, reference(x, layer)) < TOLERANCE[dtype]


def reference(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """The product in float64, without the layer's own calls."""
    packed, bias = layer.packed_weight(), layer.bias
    product = x.double() @ packed.unpack().dequantize(torch.float64).T
    return product if bias is None else product + bias.double()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_dense_weight_is_nowhere(name):
    """Beside its result a call takes less memory than the weight has in 16 bits, and gives it back."""
    size = 4096
    layer = module(name=name, rows=size, columns=size)
    for m in (1, 8, 64):
        x = random_input(m, size, torch.float16)
        for _ in range(2):
            layer(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        out = layer(x)
        assert torch.cuda.max_memory_allocated(DEVICE) - before < 2 * size * size
        assert torch.cuda.memory_allocated(DEVICE) - before <= 2 * out.nbytes + 1024
