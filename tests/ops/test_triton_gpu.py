"""The GPU kernels through the operator, the module and a model; run with `pytest -m gpu` where there is a GPU.

Most of the time is compilation, a second a kernel: with pytest-xdist `-n 8` it is shared among processes.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch
from layer_checks import dense
from packed_weights import random_binarized, random_packed
from tiny_models import save_tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.layout import all_layouts
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops import linear
from optimum_arb.ops.backends.packed import PackedWeight
from optimum_arb.ops.backends.triton.available import has_kernels, has_one_bit_kernel
from optimum_arb.packing import TENSOR_NAMES

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not has_kernels(DEVICE), reason="needs a GPU with kernels"),
]
LAYOUTS = {layout.name: layout for layout in all_layouts()}
EVERY_M = (1, 2, 3, 4, 5, 16, 33)
# bfloat16 rounds each scale product, their sum over the planes and the result, by 2^-9 at most each; measured: 3.8e-3
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def poisoned():
    """Fills every new tensor with NaN, so that what is not written shows."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def moved(packed: PackedWeight, device: torch.device = DEVICE) -> PackedWeight:
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    return replace(packed, **{name: t.to(device) for name, t in tensors.items() if t is not None})


def random_weight(name: str, *shape: int, prepared: bool = True, **choices) -> PackedWeight:
    packed = moved(random_packed(LAYOUTS[name], *shape, **choices))
    if prepared:
        from optimum_arb.ops.backends.triton import dispatch

        assert (dispatch.prepare([packed]) is not None) == has_one_bit_kernel(DEVICE)
    return packed


def random_input(m: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, backend: str = "triton"):
    tensors = {name: getattr(packed, name) for name in TENSOR_NAMES}
    return linear(x, **tensors, bias=bias, layout=packed.layout.name, block_size=packed.block_size, backend=backend)


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm; NaN where there is one."""
    return float((value.double() - expected).norm() / expected.norm())


def check(x: torch.Tensor, packed: PackedWeight, backend: str = "triton") -> torch.Tensor:
    bias = random_input(1, packed.out_features, x.dtype, seed=9)[0]
    expected = nn.functional.linear(x.double(), packed.unpack().dequantize(torch.float64), bias.double())
    result = run(x, packed, bias, backend)
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    assert error(result, expected) < TOLERANCE[x.dtype]
    assert torch.equal(run(x, packed, bias, backend), result)  # the same bits again
    return result


def module(name: str = "planes-2-col", rows: int = 160, columns: int = 512, **choices) -> ARBLinear:
    weight = random_binarized(LAYOUTS[name], rows, columns, **choices)
    bias = nn.Parameter(torch.randn(rows, generator=torch.Generator().manual_seed(8)), requires_grad=False)
    return ARBLinear.from_binarized(weight, bias).to(DEVICE).half()


# Products


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    packed = random_weight(name, 123, 300, permuted=True)
    for m, dtype in ((1, torch.float16), (4, torch.bfloat16), (16, torch.bfloat16), (5, torch.float32)):
        check(random_input(m, 300, dtype), packed)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-col"])
def test_every_number_of_tokens(name, dtype):
    packed = random_weight(name, 160, 512)
    for m in EVERY_M:
        check(random_input(m, 512, dtype), packed)


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "permuted"),
    [(6, 64, 64, False), (42, 192, 64, True), (123, 576, 256, False), (9, 4304, -1, True), (2, 3, 128, True)],
)
def test_shapes(rows, columns, block_size, permuted):
    packed = random_weight("planes-2-col", rows, columns, block_size=block_size, permuted=permuted)
    for m in (1, 3, 5):
        check(random_input(m, columns, torch.float16), packed)


@pytest.mark.parametrize("m", [1, 2, 33])
def test_without_a_prepared_copy(m):
    check(random_input(m, 512, torch.float16), random_weight("planes-1", 160, 512, prepared=False))


@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 1, 512), (2, 3, 512), (0, 512), (2, 0, 512)])
def test_batch_shapes(shape):
    packed = random_weight("planes-2-col", 160, 512)
    x = torch.randn(shape, device=DEVICE).half()
    result = run(x, packed)
    assert result.shape == (*shape[:-1], 160)
    if result.numel():
        assert error(result, x.double() @ packed.unpack().dequantize(torch.float64).T) < 1e-3


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("m", [2, 5])
def test_strided_input(m, permuted):
    packed = random_weight("planes-2-col", 160, 512, permuted=permuted)
    base = random_input(512, m, torch.float16)
    wide = random_input(m, 1024, torch.float16)
    for x in (base.T, wide[:, ::2], wide[:, :512], wide[:, 3:515], wide[:1, :512].expand(m, 512)):
        check(x, packed)


def test_not_a_number_reaches_the_result():
    packed = random_weight("planes-2-col", 160, 512)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for m in (1, 4, 16):
            x = random_input(m, 512, torch.float16)
            x[m - 1, 100] = bad
            result = run(x, packed)
            assert not torch.isfinite(result[m - 1]).any()
            assert torch.isfinite(result[: m - 1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["planes-1", "groups-non-salient-salient-mean"])
def test_a_row_does_not_depend_on_the_others(name, dtype):
    """With one way of cutting the work; the table may have several for several numbers of tokens."""
    from optimum_arb.ops.backends.triton import one_bit, prepack

    if not has_one_bit_kernel(DEVICE):
        pytest.skip("no one-bit kernel on this device")
    weight = prepack.prepack(random_weight(name, 160, 512, prepared=False))
    x = random_input(4, 512, dtype)
    for config in (one_bit.DecodeConfig(), one_bit.DecodeConfig(groups=2, warps=4, prefetch=False)):
        whole = one_bit.decode(x, weight, None, config).view(4, 160)
        for m in (1, 2, 3):
            for start in range(5 - m):
                some = one_bit.decode(x[start : start + m], weight, None, config).view(m, 160)
                assert torch.equal(some, whole[start : start + m])


@pytest.mark.parametrize(
    ("name", "columns", "dtype"),
    [
        ("planes-2-col", 512, torch.bfloat16),
        ("planes-1", 300, torch.float16),
        ("groups-all-salient-col", 512, torch.bfloat16),
        ("planes-1", 512, torch.float32),
    ],
    ids=str,
)
def test_batch_invariant(name, columns, dtype):
    packed = random_weight(name, 160, columns, permuted=True)
    x = random_input(64, columns, dtype)
    whole = check(x, packed, "triton:batch-invariant")
    bias = random_input(1, 160, dtype, seed=9)[0]
    for m in range(1, 65):
        assert torch.equal(run(x[:m], packed, bias, "triton:batch-invariant"), whole[:m]), m
    assert torch.equal(run(x[13:20], packed, bias, "auto:batch-invariant"), whole[13:20])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["planes-2-col", "groups-all-salient-mean"])
def test_gradients(name, dtype):
    packed = random_weight(name, 160, 512, permuted=True)
    weight = packed.unpack().dequantize(torch.float64)
    for m in (1, 33):
        x = random_input(m, 512, dtype).requires_grad_()
        bias = torch.zeros(160, device=DEVICE, dtype=dtype, requires_grad=True)
        upstream = random_input(m, 160, dtype, seed=1)
        x_grad, bias_grad = torch.autograd.grad(run(x, packed, bias), (x, bias), upstream)
        assert x_grad.dtype == dtype
        assert error(x_grad, upstream.double() @ weight) < TOLERANCE[dtype]
        assert error(bias_grad, upstream.double().sum(0)) < TOLERANCE[dtype]


# Streams, graphs, devices


@torch.no_grad()
def test_graph():
    layer = module()
    x = random_input(1, 512, torch.float16)
    layer(x)  # prepares, compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(layer(x)[:, :1].expand(1, 512) + x)
    for seed in range(3):
        x.copy_(random_input(1, 512, torch.float16, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, layer(layer(x)[:, :1].expand(1, 512) + x))


@torch.no_grad()
@pytest.mark.parametrize("m", [1, 16])
def test_two_streams(m):
    """The same layer at the same time, with inputs of their own."""
    layer = module(rows=2048, columns=2048)
    inputs = [random_input(m, 2048, torch.float16, seed) for seed in range(2)]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(DEVICE) for _ in inputs]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for x, stream, found in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(layer(x))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(result, wanted) for result in found)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    """Whichever is the current one."""
    layer = module()
    second = torch.device("cuda", 1)
    other = copy.deepcopy(layer).to(second)
    for m in (1, 5, 33):
        x = random_input(m, 512, torch.float16)
        expected = layer(x)
        for current in (0, 1):
            with torch.cuda.device(current):
                result = other(x.to(second))
                assert result.device == second
                assert torch.equal(result.to(DEVICE), expected)
                assert torch.equal(layer(x), expected)


# The module


@torch.no_grad()
def test_copies_of_a_module():
    layer = module()
    x = random_input(1, 512, torch.float16)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), expected)
    copied.load_state_dict(module(seed=1).state_dict())
    assert error(copied(x), dense(copied, x)) < 1e-3
    assert not torch.equal(copied(x), expected)
    assert torch.equal(layer(x), expected)
    del copied
    again = layer.cpu().to(DEVICE)
    assert torch.equal(again(x), expected)


@torch.no_grad()
def test_changed_tensors():
    """Loaded, replaced, moved and cast: what was prepared before does not compute after."""
    layer = module(permuted=True)
    x = random_input(1, 512, torch.float16)
    layer(x)
    layer.load_state_dict(module(permuted=True, seed=1).state_dict())
    assert error(layer(x), dense(layer, x)) < 1e-3
    layer.weight_row_scale = nn.Parameter(layer.weight_row_scale * 2, requires_grad=False)
    assert error(layer(x), dense(layer, x)) < 1e-3
    layer.to(torch.bfloat16)
    assert error(layer(x.bfloat16()), dense(layer, x.bfloat16())) < TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_memory_of_a_model_that_is_gone():
    """The next model's weights may lie where the last one's were."""
    x = random_input(1, 512, torch.float16)
    first = module()
    first(x)
    first.cpu()
    for seed in range(1, 4):
        layer = module(seed=seed)
        assert error(layer(x), dense(layer, x)) < 1e-3
        del layer


@torch.no_grad()
def test_compiles_as_one_graph():
    torch.compiler.reset()
    layer = module()
    layer(random_input(1, 512, torch.float16))
    compiled = torch.compile(layer, fullgraph=True)
    for m in (1, 4):
        compiled(random_input(m, 512, torch.float16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m, seed in ((1, 1), (4, 2), (1, 3)):
            x = random_input(m, 512, torch.float16, seed)
            assert torch.equal(compiled(x), layer(x))


class Attention(nn.Module):
    def __init__(self, **choices):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            module(rows=rows, seed=seed, **choices) for seed, rows in enumerate((160, 32, 7))
        )

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        memory = x if memory is None else memory
        return self.q_proj(x), self.k_proj(memory), self.v_proj(memory)


@torch.no_grad()
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", ["planes-1", "planes-2-col"])
def test_layers_of_one_input(name, permuted):
    model = Attention(name=name, permuted=permuted)
    assert share_inputs(model) == 1
    for shape in ((1, 512), (2, 2, 512), (3, 512), (5, 512), (0, 512)):
        x = torch.randn(shape, device=DEVICE).half()
        for layer, result in zip(model.children(), model(x), strict=True):
            assert result.shape == (*shape[:-1], layer.out_features)
            if result.numel():
                assert error(result, dense(layer, x)) < 1e-3
    together = model.q_proj.shared_input
    assert together.enabled
    model.k_proj.load_state_dict(module(rows=32, seed=5, name=name, permuted=permuted).state_dict())
    x = random_input(1, 512, torch.float16)
    for layer, result in zip(model.children(), model(x), strict=True):
        assert error(result, dense(layer, x)) < 1e-3
    memory = random_input(2, 512, torch.float16, seed=1)
    for _ in range(3):
        for layer, given, result in zip(model.children(), (x, memory, memory), model(x, memory), strict=True):
            assert error(result, dense(layer, given)) < 1e-3
    assert not together.enabled


@torch.no_grad()
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", ["planes-1-col", "planes-2-col", "planes-3"])
def test_the_same_launches_again(name, permuted):
    """Those that a layer keeps ready, for inputs at other places, and the operator's own give the same bits."""
    layer = module(name=name, permuted=permuted)
    for m in (8, 16, 33, 64, 130):
        for seed in range(3):
            x = random_input(m, 512, torch.float16, seed=seed)
            found = layer(x)
            assert error(found, dense(layer, x)) < 1e-3
            assert torch.equal(found, layer(x.clone().view(1, m, 512))[0])
            if m > 16:
                tensors = layer._operands()
                assert torch.equal(
                    found, torch.ops.optimum_arb.linear(x, *tensors, layer.bias, name, layer.block_size, "auto")
                )
    layer.weight_row_scale.mul_(2)
    assert error(layer(x), dense(layer, x)) < 1e-3


def test_bias_gradient_of_few_tokens():
    """Of an input that needs none: the copies' short way has no gradient."""
    layer = module()
    layer.bias.requires_grad_()
    layer(random_input(1, 512, torch.float16)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones_like(layer.bias))


# A model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")
    config = ARBConfig(dataset=None, block_size=64)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float16, device_map=DEVICE.type
    )


def generate(model, **choices) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens `[12]` and their logits `[12, vocabulary]`."""
    ids = tokens(1, 6, seed=3).to(DEVICE)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **choices,
    )
    return out.sequences[0, 6:], torch.cat(out.logits)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert error(found[1], expected[1].double()) < 1e-2


def test_generate_compiled(llama):
    """A static cache lets transformers compile a step; it is compiled once for all tokens, and for the next prompt."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    expected = generate(llama, disable_compile=True)
    assert_same(generate(llama, cache_implementation="static", disable_compile=True), expected)
    assert_same(generate(llama, cache_implementation="static"), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(generate(llama, cache_implementation="static"), expected)


def test_sharing_on_and_off(llama):
    layers = [layer for layer in llama.modules() if isinstance(layer, ARBLinear)]
    together = {id(layer.shared_input): layer.shared_input for layer in layers if layer.shared_input is not None}
    assert len(together) == 4
    expected = generate(llama)
    if has_one_bit_kernel(DEVICE):
        assert all(each.enabled and each._prepared is not None for each in together.values())
        assert all(not each._waiting and each._traced is None for each in together.values())
    for layer in layers:
        layer.shared_input, layer._looked = None, False
    assert_same(generate(llama), expected)
    if has_one_bit_kernel(DEVICE):
        assert all(layer._prepared is not None for layer in layers)
    assert share_inputs(llama) == 4
    for layer in layers:
        layer._looked = False
    assert_same(generate(llama), expected)


def test_kernels_against_the_reference_in_a_model(llama):
    ids = tokens(1, 3, seed=4).to(DEVICE)
    with torch.no_grad():
        result = llama(ids).logits
        for layer in llama.modules():
            if isinstance(layer, ARBLinear):
                layer.backend = "reference"
        expected = llama(ids).logits
        for layer in llama.modules():
            if isinstance(layer, ARBLinear):
                layer.backend = "auto"
    assert error(result, expected.double()) < 1e-2
