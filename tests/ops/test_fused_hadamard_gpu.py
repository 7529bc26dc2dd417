"""Few tokens of layers with a Hadamard transform on a GPU: it takes no launch, and the product is as exact as without.

Run with `pytest -m gpu` where there is a GPU. Most of the time is compilation.
"""

from __future__ import annotations

import copy

import pytest
import torch
from attention_layers import Attention
from gpu_layers import DEVICE, NEEDS_KERNELS, TOLERANCE, error, random_input
from packed_weights import random_binarized

from optimum_arb.format.hadamard import random_signs
from optimum_arb.format.layout import planes_layout
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton import available

pytestmark = NEEDS_KERNELS
BLOCKS = (64, 128, 256)


def layer(
    columns: int, block: int, *, planes: int = 2, rows: int = 160, permuted: bool = True, bias: bool = False, **choices
) -> ARBLinear:
    weight = random_binarized(planes_layout(planes, col_scale=planes < 3), rows, columns, **choices)
    if permuted:
        weight.permutation = torch.randperm(columns, generator=torch.Generator().manual_seed(9))
    weight.hadamard, weight.input_signs = block, random_signs(columns, 1)
    added = torch.randn(rows, generator=torch.Generator().manual_seed(rows)).half() if bias else None
    return ARBLinear.from_binarized(weight, added).to(DEVICE)


def exact(module: ARBLinear, x: torch.Tensor) -> torch.Tensor:
    out = x.double() @ module.dequantize(torch.float64).T
    return out if module.bias is None else out + module.bias.double()


@pytest.fixture
def fused(monkeypatch):
    """A launch of the transform is an error."""
    from optimum_arb.nn.input_transform import InputTransform
    from optimum_arb.ops.backends.triton import few_tokens

    if not available.has_one_bit_kernel(DEVICE):
        pytest.skip("no one-bit kernel on this device")
    assert available.fuses_hadamard(DEVICE), "the transform in the preparation of inputs is wrong here"

    def refuse(*args):
        raise AssertionError("the transform was launched by itself")

    monkeypatch.setattr(few_tokens, "transform", refuse)
    monkeypatch.setattr(InputTransform, "apply", refuse)


def multiply(module: ARBLinear, x: torch.Tensor) -> torch.Tensor:
    """By the one-bit kernel or the half-bits kernel, whichever takes so many tokens, whatever the table says."""
    from optimum_arb.ops.backends.triton import half_bits, one_bit, prepack

    ready, change = prepack.make([module.packed_weight()]), module.input_transform()
    assert ready is not None
    assert change is not None
    if len(x) <= one_bit.MAX_TOKENS:
        return one_bit.decode(x, ready, module.bias, one_bit.DecodeConfig(), change=change[:3]).view(len(x), -1)
    return half_bits.multiply(x, ready, module.bias, half_bits.HalfConfig(), change=change[:3]).view(len(x), -1)


@torch.no_grad()
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("block", [16, *BLOCKS])
@pytest.mark.parametrize("columns", [64, 192, 576, 4304, 4096])
def test_shapes(fused, columns, block, permuted):
    planes = 1 + (columns // 16 + block // 64 + permuted) % 3
    module = layer(columns, block, planes=planes, permuted=permuted, bias=block == 64)
    for m, dtype in ((1, torch.float16), (3, torch.bfloat16), (5, torch.float16), (16, torch.bfloat16)):
        x = random_input(m, columns, dtype)
        module.to(dtype)
        result = multiply(module, x)
        assert error(result, exact(module, x)) < TOLERANCE[dtype], f"{m} tokens of {dtype}"
        assert torch.equal(multiply(module, x), result)
        assert torch.equal(multiply(module, x.clone()), result)


@torch.no_grad()
@pytest.mark.parametrize("block_size", [64, 256, -1])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_every_number_of_tokens(fused, planes, block_size):
    """Of blocks of 64 columns a tile holds half as many; the rows of wider tensors are further apart."""
    module = layer(320, 256, planes=planes, block_size=block_size)
    for m in range(1, 17):
        x = random_input(m, 336, torch.float16, seed=m)[:, :320]
        result = multiply(module, x)
        assert error(result, exact(module, x)) < TOLERANCE[torch.float16], f"{m} tokens"
        assert torch.equal(multiply(module, x.contiguous()), result)


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_more_exact_than_a_launch_of_its_own(fused, monkeypatch, block):
    """Which rounds what it transformed to the dtype of x."""
    from optimum_arb.ops.backends.triton import few_tokens
    from optimum_arb.ops.backends.triton.hadamard import transform

    module = layer(4096, block, planes=1, rows=1024)
    separate = copy.deepcopy(module)
    x = random_input(2, 4096, torch.bfloat16)
    module(x)
    monkeypatch.setattr(few_tokens, "transform", transform)
    monkeypatch.setattr(few_tokens, "fuses_hadamard", lambda device: False)
    by_itself = error(separate(x).float(), exact(separate, x))
    monkeypatch.setattr(few_tokens, "fuses_hadamard", available.fuses_hadamard)
    assert error(module(x).float(), exact(module, x)) < by_itself


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 4, 7, 16])
def test_not_a_number_stays_in_its_row(fused, m):
    module = layer(576, 128)
    x = random_input(m, 576, torch.float16)
    for bad in (float("nan"), float("inf")):
        x[m - 1, 100] = bad
        result = multiply(module, x)
        assert not torch.isfinite(result[m - 1]).any()
        assert torch.isfinite(result[: m - 1]).all()


# Layers


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_layer(fused, block):
    """A call compiles, the next ones launch natively where that was built; other signs are seen."""
    module = layer(4096, block, bias=True)
    for m in range(1, module_tokens(module) + 1):
        for seed in range(3):
            x = random_input(m, 4096, torch.float16, seed)
            result = module(x)
            assert error(result, exact(module, x)) < TOLERANCE[torch.float16], f"{m} tokens, call {seed}"
            assert torch.equal(module(x[None])[0], result)
    x = random_input(1, 4096, torch.float16)
    module.weight_input_signs.data = ~module.weight_input_signs.data
    module.weight_permutation.data = module.weight_permutation.data.flip(1)
    module.decode_stored()
    module.forget()
    assert error(module(x), exact(module, x)) < TOLERANCE[torch.float16]


def module_tokens(module: ARBLinear) -> int:
    """Up to how many tokens the kernels for few of them are used."""
    module.prepare()
    return module._most_tokens


@torch.no_grad()
@pytest.mark.parametrize(("columns", "block"), [(576, 128), (1024, 256), (512, 64)])
def test_layers_of_one_input(fused, columns, block):
    module = Attention([layer(columns, block, rows=rows, seed=rows) for rows in (256, 64, 96)])
    alone = copy.deepcopy(module)
    assert share_inputs(module) == 1
    expected = list(alone.children())
    for m in (1, 2, 4):
        for seed in range(3):
            x = random_input(m, columns, torch.float16, seed)
            result = module(x)
            wanted = torch.cat([exact(each, x) for each in expected], -1)
            assert error(result, wanted) < TOLERANCE[torch.float16]
            assert torch.equal(module(x.clone()), result)
    assert module.q_proj.shared_input._prepared is not None


@torch.no_grad()
@pytest.mark.parametrize("m", [5, 16])
def test_joined_weights_of_more_tokens(fused, m):
    from optimum_arb.ops.backends.triton import half_bits, prepack

    layers = [layer(576, 256, rows=rows, seed=rows) for rows in (64, 7, 128)]
    joined = prepack.make([each.packed_weight() for each in layers])
    change = layers[0].input_transform()
    x = random_input(m, 576, torch.float16)
    rows = (64, 7, 128)
    out = half_bits.multiply(x, joined, None, half_bits.HalfConfig(), rows, change[:3])
    for each, found in zip(layers, out.split([m * count for count in rows]), strict=True):
        assert error(found.view(m, -1), exact(each, x)) < TOLERANCE[torch.float16]


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 4])
def test_graph(fused, m):
    module = layer(512, 128, rows=512)
    x = random_input(m, 512, torch.float16)
    for _ in range(3):
        module(module(x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(module(x))
    for seed in range(3):
        x.copy_(random_input(m, 512, torch.float16, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, module(module(x)))


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 4])
def test_compiled(fused, m):
    """The same bits as by plain calls, of a layer and of several of one input."""
    torch.compiler.reset()
    module = Attention([layer(576, 128, rows=rows, seed=rows) for rows in (256, 64, 96)])
    share_inputs(module)
    alone = layer(576, 256, rows=64, bias=True)
    x = random_input(m, 576, torch.float16)
    for each in (module, alone):
        expected = each(x)
        compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), each(x))
    torch.compiler.reset()
