"""The GPU kernels in modules and in a model; run with `pytest -m gpu` where there is a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_layers import DEVICE, NEEDS_KERNELS, TOLERANCE, error, module, random_input
from layer_checks import dense
from tiny_models import save_tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.ops.backends.triton.available import has_one_bit_kernel

pytestmark = NEEDS_KERNELS


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
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(generate(llama, cache_implementation="static"), expected)


def test_sharing_on_and_off(llama):
    layers = [layer for layer in llama.modules() if isinstance(layer, ARBLinear)]
    together = {id(layer.shared_input): layer.shared_input for layer in layers if layer.shared_input is not None}
    assert len(together) == 4
    expected = generate(llama)
    if has_one_bit_kernel(DEVICE):
        assert all(each.enabled and each._prepared is not None for each in together.values())
        assert all(not each._waiting for each in together.values())
    for layer in layers:
        layer.share(None)
        layer._looked = False
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
