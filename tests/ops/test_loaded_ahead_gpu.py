"""Kernels for few tokens on a GPU: what is loaded ahead, and how the work is cut, changes times and not a bit.

Run with `pytest -m gpu` where there is a GPU. Most of the time is compilation.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_layers import DEVICE, NEEDS_KERNELS, TOLERANCE, error, random_input, random_weight

from optimum_arb.ops.backends.triton import half_bits, one_bit, prepack
from optimum_arb.ops.backends.triton.available import has_half_bits_kernel, has_one_bit_kernel

pytestmark = NEEDS_KERNELS


@pytest.fixture(autouse=True)
def kernels():
    if not (has_one_bit_kernel(DEVICE) and has_half_bits_kernel(DEVICE)):
        pytest.skip("no kernels for few tokens on this device")


def multiply(x, weight, config, rows=None, bias=None):
    if isinstance(config, one_bit.DecodeConfig):
        return one_bit.decode(x, weight, bias, config, rows)
    return half_bits.multiply(x, weight, bias, config, rows)


def exact(x, packed):
    return x.double() @ packed.unpack().dequantize(torch.float64).T


# tiles of 128 columns: fewer than warps, a last round of one, whole rounds
@pytest.mark.parametrize("columns", [300, 1280, 4096])
@pytest.mark.parametrize("name", ["planes-1-col", "planes-2-col", "planes-3-mean", "groups-all-salient-col"])
def test_any_number_of_tiles_ahead(name, columns):
    packed = random_weight(name, 160, columns, prepared=False)
    weight = prepack.prepack(packed)
    cuts = [(m, one_bit.DecodeConfig(warps=warps)) for m in (1, 4) for warps in (4, 8)]
    cuts += [(m, half_bits.HalfConfig(4, slice_tiles=8)) for m in (4, 5, 16)]
    cuts.append((16, half_bits.HalfConfig(4, slice_tiles=8, warpgroups=False)))
    for m, config in cuts:
        x = random_input(m, columns, torch.bfloat16)
        found = [multiply(x, weight, replace(config, ahead=ahead)).view(m, 160) for ahead in (1, 2, 3, 8)]
        assert error(found[0], exact(x, packed)) < TOLERANCE[torch.bfloat16], config
        for each in found[1:]:
            assert torch.equal(each, found[0]), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_scales_of_other_dtypes(dtype):
    """Of 16 bits two are loaded as one word."""
    packed = random_weight("planes-2-col", 160, 1280, prepared=False)
    packed = replace(packed, row_scale=packed.row_scale.to(dtype))
    weight = prepack.prepack(packed)
    assert weight.row_scale.dtype == dtype
    for m, config in ((1, one_bit.DecodeConfig(warps=4, ahead=2)), (16, half_bits.HalfConfig(4, 2))):
        x = random_input(m, 1280, torch.float16)
        assert error(multiply(x, weight, config).view(m, 160), exact(x, packed)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("rows", [(128, 64, 192), (64, 7, 128), (96, 64)])
def test_joined_weights_in_programs_of_two_groups(rows):
    """Programs of two groups of rows where no part begins within one."""
    parts = [random_weight("planes-2-col", count, 1280, prepared=False, seed=count) for count in rows]
    weight = prepack.join([prepack.prepack(packed) for packed in parts])
    for m in (1, 3):
        x = random_input(m, 1280, torch.float16)
        out = multiply(x, weight, one_bit.DecodeConfig(2, 4, 2), rows)
        for packed, found in zip(parts, out.split([m * count for count in rows]), strict=True):
            assert error(found.view(m, -1), exact(x, packed)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", [5, 16])
@pytest.mark.parametrize("slice_tiles", [1, 3, 16])
@pytest.mark.parametrize("rows", [(128, 7, 64), (128, 256)])
def test_slices_of_the_columns(rows, slice_tiles, tokens):
    """Ten, four and one that programs share; the bias is added once, and no sum depends on the time."""
    parts = [random_weight("planes-2-col", count, 1280, prepared=False, seed=count) for count in rows]
    weight = prepack.join([prepack.prepack(packed) for packed in parts])
    x = random_input(tokens, 1280, torch.float16)
    biases = [random_input(1, count, torch.float16)[0] for count in rows]
    config = half_bits.HalfConfig(8, 2, slice_tiles)
    first, second = (multiply(x, weight, config, rows, torch.cat(biases)) for _ in range(2))
    assert torch.equal(first, second)
    for packed, bias, found in zip(parts, biases, first.split([tokens * count for count in rows]), strict=True):
        assert error(found.view(tokens, -1), exact(x, packed) + bias) < TOLERANCE[torch.float16]
