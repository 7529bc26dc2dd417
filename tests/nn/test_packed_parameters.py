"""The packed tensors of a layer as parameters of a module: their names, shapes and dtypes, filled and saved."""

import pytest
import torch
from packed_weights import random_binarized, relative_error
from torch import nn
from transformers import initialization

from optimum_arb.format.layout import all_layouts, bitmap_layout, planes_layout
from optimum_arb.format.packing import pack, stored_bytes
from optimum_arb.nn import ARBLinear

LAYOUTS = {layout.name: layout for layout in all_layouts()}


def layer(name="planes-2-col", **choices) -> ARBLinear:
    return ARBLinear.from_binarized(random_binarized(LAYOUTS[name], 42, 300, **choices), torch.randn(42))


def test_is_a_linear_with_packed_parameters():
    module = layer("groups-all-salient-col", permuted=True)
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features, module.block_size) == (300, 42, 128)
    expected = pack(random_binarized(LAYOUTS["groups-all-salient-col"], 42, 300, permuted=True))
    names = {"weight" if name == "weight" else f"weight_{name}": tensor for name, tensor in expected.items()}
    assert set(dict(module.named_parameters())) == {*names, "bias"}
    for name, tensor in names.items():
        parameter = getattr(module, name)
        assert torch.equal(parameter, tensor)
        assert parameter.dtype == tensor.dtype
        assert parameter.dim() == 2
        assert not parameter.requires_grad
    assert not list(module.buffers())
    assert module.bits_per_weight() == stored_bytes(expected) * 8 / (42 * 300)
    weight = random_binarized(LAYOUTS["groups-all-salient-col"], 42, 300, permuted=True)
    assert relative_error(module.dequantize(), weight.dequantize()) < 2e-3  # scales rounded to float16
    assert torch.equal(module.binarized().dequantize(), module.dequantize())


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_round_trip(name):
    module = layer(name, permuted=True)
    salient = 0 if not module.layout.salient else module.weight_salient_columns.shape[1]
    for device in ("cpu", "meta"):
        empty = ARBLinear(
            300, 42, module.layout, 128, bias=True, permuted=True, salient=salient, dtype=torch.float32, device=device
        )
        for key, tensor in empty.state_dict().items():
            assert tensor.shape == module.state_dict()[key].shape
            assert tensor.dtype == module.state_dict()[key].dtype
        empty.load_state_dict(module.state_dict(), assign=device == "meta")
        for key, tensor in empty.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[key])
        x = torch.randn(3, 300)
        assert torch.equal(empty(x), module(x))


def test_scale_dtypes_and_wide_indices():
    dtypes = {"row_scale": torch.float32}
    wide = ARBLinear(
        2**15 + 1, 2, bitmap_layout("all", True, True), -1, bias=False, permuted=True, salient=3, scale_dtypes=dtypes
    )
    assert wide.weight_permutation.dtype == wide.weight_salient_columns.dtype == torch.int32
    assert wide.weight_row_scale.dtype == torch.float32
    assert wide.weight_col_scale.dtype == torch.float16
    assert wide.bias is None
    with pytest.raises(ValueError, match="block_size=100 cannot be packed"):
        ARBLinear(128, 2, planes_layout(1), 100, bias=False, permuted=False)


def test_initialization_leaves_it_alone():
    """What transformers and torch do to every linear of a model before or after loading."""
    module = layer()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.reset_parameters()
    initialization.normal_(module.weight, mean=0.0, std=0.02)
    assert module._is_hf_initialized
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_empty_layer_does_not_claim_to_be_loaded():
    """transformers would not tell that a checkpoint lacks a parameter that is marked as initialized."""
    empty = ARBLinear(128, 4, planes_layout(1), 128, bias=False, permuted=False, device="meta")
    assert not any(getattr(parameter, "_is_hf_initialized", False) for parameter in empty.parameters())
