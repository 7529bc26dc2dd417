"""Weights that are products of two sign matrices: their packed form."""

import pytest
import torch
from packed_weights import random_factorized, relative_error

from optimum_arb.format.factors import (
    FACTOR_TENSOR_NAMES,
    FactorizedWeight,
    factor_shapes,
    pack_factors,
    rank_for_bits,
    unpack_factors,
)
from optimum_arb.format.packing import STORED_NAMES, bits_per_weight, stored_bytes

SHAPES = [(42, 300, 24), (5, 7, 1), (130, 64, 200), (16, 129, 129), (1, 1, 3)]


def by_hand(weight) -> torch.Tensor:
    """diag(a) A diag(m) B diag(b), entry by entry as the docstring has it."""
    outer = weight.outer_signs.double() * 2 - 1
    inner = weight.inner_signs.double() * 2 - 1
    a, m, b = weight.row_scale.double(), weight.rank_scale.double(), weight.col_scale.double()
    return torch.einsum("n,nr,r,rk,k->nk", a, outer, m, inner, b)


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_dequantize(rows, columns, rank):
    weight = random_factorized(rows, columns, rank)
    assert weight.shape == (rows, columns)
    assert weight.rank == rank
    assert relative_error(weight.dequantize(torch.float64), by_hand(weight)) < 1e-12
    assert relative_error(weight.dequantize(), by_hand(weight)) < 1e-5
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_round_trip(rows, columns, rank):
    weight = random_factorized(rows, columns, rank)
    packed = pack_factors(weight)
    assert tuple(packed) == FACTOR_TENSOR_NAMES[:-1]  # no grids of scales
    assert set(packed) <= set(STORED_NAMES)
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == factor_shapes(rows, columns, rank)
    for name, tensor in packed.items():
        assert tensor.dtype == (torch.uint8 if name in ("weight", "inner") else torch.float16)
    unpacked = unpack_factors(packed, columns)
    assert relative_error(unpacked.dequantize(torch.float64), by_hand(weight)) < 3e-3  # three scales in float16
    again = pack_factors(unpacked)
    for name, tensor in packed.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("factor", [1e-9, 1.0, 3e5])
def test_balance(factor):
    """Whatever the scales that a method returned, what lies between the products is as large as the output."""
    weight = random_factorized(64, 96, 40)
    weight.row_scale *= 37.0
    weight.rank_scale *= factor
    weight.col_scale *= 1e-4
    balanced = weight.balanced()
    assert relative_error(balanced.dequantize(torch.float64), by_hand(weight)) < 1e-6
    for scale in (balanced.row_scale, balanced.rank_scale, balanced.col_scale):
        assert (scale > 0).all()
    bound = 2**0.5 * 1.0001
    assert 1 / bound < float(balanced.col_scale.mean()) < bound
    assert 1 / bound < float(balanced.row_scale.mean()) * 40**0.5 < bound
    x = torch.randn(200, 96)
    inner = torch.where(balanced.inner_signs, 1.0, -1.0) * balanced.rank_scale[:, None] * balanced.col_scale
    between, output = x @ inner.T, x @ weight.dequantize().T
    assert 0.4 < float(between.std() / output.std()) < 2.5
    packed = pack_factors(weight)
    dtype = torch.float32 if factor == 1e-9 else torch.float16  # float16 holds 1e-12 not at all
    assert packed["inner_row_scale"].dtype == dtype
    assert packed["row_scale"].dtype == packed["inner_col_scale"].dtype == torch.float16
    assert relative_error(unpack_factors(packed, 96).dequantize(torch.float64), by_hand(weight)) < 3e-3


def test_zero_scales():
    weight = random_factorized(6, 9, 4)
    weight.row_scale[2] = weight.rank_scale[1] = weight.col_scale[3] = 0
    assert relative_error(weight.balanced().dequantize(torch.float64), by_hand(weight)) < 1e-6
    weight.rank_scale.zero_()
    weight.row_scale.zero_()
    assert not unpack_factors(pack_factors(weight), 9).dequantize().any()


@pytest.mark.parametrize("name", ["row_scale", "rank_scale", "col_scale"])
def test_a_scale_that_is_no_number(name):
    weight = random_factorized(6, 9, 4)
    getattr(weight, name)[1] = torch.nan
    with pytest.raises(ValueError, match=f"the {name} of its factors holds NaN or Inf"):
        pack_factors(weight)


@pytest.mark.parametrize(
    ("rows", "columns"), [(576, 576), (1536, 576), (192, 576), (300, 77), (4096, 4096), (64, 1000)]
)
@pytest.mark.parametrize("bits", [0.5, 0.8, 1.0, 1.18, 2.3])
def test_rank_for_bits(rows, columns, bits):
    rank = rank_for_bits(rows, columns, bits)

    def stored(rank: int) -> float:
        sizes = factor_shapes(rows, columns, rank)
        return sum(8 * n * k if name in ("weight", "inner") else 16 * n * k for name, (n, k) in sizes.items()) / (
            rows * columns
        )

    assert stored(rank) <= bits
    assert stored(rank + 8) > bits  # rows end at whole bytes


def test_stored_bits_are_those_of_the_tensors():
    rank = rank_for_bits(96, 160, 1.3)
    packed = pack_factors(random_factorized(96, 160, rank))
    assert bits_per_weight(packed, 96, 160) == stored_bytes(packed) * 8 / (96 * 160)
    assert 1.2 < bits_per_weight(packed, 96, 160) <= 1.3


def test_no_budget_is_too_small_for_one():
    assert rank_for_bits(2, 64, 0.5) == 1


def test_balance_between_scales_far_apart():
    """On the way from one scale to another a third one does not leave float32."""
    ones = torch.ones(2, 2, dtype=torch.bool)
    weight = FactorizedWeight(ones, ones, *(torch.full((2,), size) for size in (1e-30, 1e-18, 1e30)))
    torch.testing.assert_close(
        weight.balanced().dequantize(torch.float64), weight.dequantize(torch.float64), rtol=1e-12, atol=0
    )
