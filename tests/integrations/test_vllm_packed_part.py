"""What a rank of vLLM keeps of a packed weight, and the layer that runs it. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch
from packed_weights import random_binarized, random_factorized, relative_error

from optimum_arb import ARBConfig
from optimum_arb.format.factors import ROUNDED_BLOCK, ROUNDED_LAYOUT, pack_factors
from optimum_arb.format.packing import pack
from optimum_arb.integrations.vllm.packed_part import PackedPart

ROWS, COLUMNS, RANKS = 24, 512, 2


def factors(scale_bits: int = 16, rank: int = 70) -> tuple[PackedPart, torch.Tensor]:
    """A part and the weight that it stands for."""
    tensors = pack_factors(random_factorized(ROWS, COLUMNS, rank), scale_bits)
    part = PackedPart.of("layer", tensors, ARBConfig(method="arb-dbf", scale_bits=scale_bits), COLUMNS)
    return part, part.linear().dequantize()


def planes(scale_bits: int = 16) -> tuple[PackedPart, torch.Tensor]:
    config = ARBConfig(planes=2, scale_bits=scale_bits)
    tensors = pack(random_binarized(config.layout, ROWS, COLUMNS, 128), scale_bits)
    part = PackedPart.of("layer", tensors, config, COLUMNS)
    return part, part.linear().dequantize()


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize("made", [factors, planes])
def test_whole_rows_and_columns(made, scale_bits):
    """Rows are rows of the weight, the products with ranges of columns sum up to the whole."""
    part, weight = made(scale_bits)
    assert part.is_factorized == (made is factors)
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ weight.double().T
    assert relative_error(part.linear()(x), expected) < 1e-5
    rows = torch.tensor([3, 17, 4])
    assert relative_error(part.rows(rows).linear()(x), expected[:, rows]) < 1e-5
    assert part.column_obstacle(RANKS) is None
    total = torch.zeros(5, ROWS)
    for rank in range(RANKS):
        start, stop = rank * COLUMNS // RANKS, (rank + 1) * COLUMNS // RANKS
        of_rank = part.columns(start, stop)
        assert of_rank.linear().in_features == COLUMNS // RANKS
        assert of_rank.column_obstacle(3) is not None, "of these columns 3 ranks can have no whole blocks"
        total += of_rank.linear()(x[:, start:stop])
    assert relative_error(total, expected) < 1e-5


def test_a_rank_of_factors_stores_its_share_of_one():
    """Of the outer factor its rows, of the inner one its columns, of the other one all."""
    part, _ = factors()
    by_rows, by_columns = part.rows(torch.arange(ROWS // 2)).tensors, part.columns(0, COLUMNS // 2).tensors
    whole = part.tensors
    assert by_rows["weight"].numel() * 2 == whole["weight"].numel()
    assert by_rows["inner"].numel() == whole["inner"].numel()
    assert by_columns["weight"].numel() == whole["weight"].numel()
    assert by_columns["inner"].numel() * 2 == whole["inner"].numel()


def test_weights_that_are_stored_as_one_plane():
    """`arb-dbf` stores one plane where that has less error."""
    config = ARBConfig(method="arb-dbf")
    tensors = pack(random_binarized(ROUNDED_LAYOUT, ROWS, COLUMNS, ROUNDED_BLOCK))
    part = PackedPart.of("layer", tensors, config, COLUMNS)
    assert not part.is_factorized
    assert part.block_size == -1
    weight = part.linear().dequantize()
    halves = [part.columns(0, 256).linear().dequantize(), part.columns(256, 512).linear().dequantize()]
    assert torch.equal(torch.cat(halves, 1), weight)


def test_a_missing_tensor_is_named():
    tensors = pack_factors(random_factorized(ROWS, COLUMNS, 70))
    del tensors["inner_col_scale"]
    with pytest.raises(ValueError, match=r"'layer\.weight_inner_col_scale' is missing"):
        PackedPart.of("layer", tensors, ARBConfig(method="arb-dbf"), COLUMNS)
