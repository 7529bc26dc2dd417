"""Random packed weights of every layout."""

import torch

from optimum_arb.format.factors import FactorizedWeight
from optimum_arb.format.layout import Layout
from optimum_arb.format.packing import BinarizedWeight, block_count, pack
from optimum_arb.ops.backends.packed import PackedWeight


def random_binarized(
    layout: Layout,
    rows: int,
    columns: int,
    block_size: int = 128,
    permuted: bool = False,
    salient: int | None = None,
    seed: int = 0,
) -> BinarizedWeight:
    """A weight with scales around 1, some negative; a tenth of the columns salient where `salient` is None."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, columns // 10) if salient is None else salient

    def signs(planes: int, width: int) -> torch.Tensor:
        return torch.rand(planes, rows, width, generator=generator) < 0.5

    def scales(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5 + 1

    chosen = torch.randperm(columns, generator=generator)[:count].sort().values
    return BinarizedWeight(
        layout=layout,
        block_size=block_size,
        signs=signs(layout.planes, columns),
        row_scale=scales(rows, block_count(columns, block_size), layout.row_scales),
        col_scale=scales(layout.col_scales, columns) if layout.col_scales else None,
        permutation=torch.randperm(columns, generator=generator) if permuted else None,
        salient_columns=chosen if layout.salient else None,
        salient_signs=signs(layout.salient_planes, count) if layout.salient_planes else None,
        salient_col_scale=scales(layout.salient_col_scales, count) if layout.salient_col_scales else None,
    )


def random_packed(layout: Layout, rows: int, columns: int, block_size: int = 128, **choices) -> PackedWeight:
    """The same, packed."""
    tensors = pack(random_binarized(layout, rows, columns, block_size, **choices))
    return PackedWeight(layout, block_size, columns, **tensors)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; NaN where there is one."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max())


def random_factorized(rows: int, columns: int, rank: int, seed: int = 0, size: float = 0.05) -> FactorizedWeight:
    """A factorized weight with entries of about `size`; every scale has some negative values."""
    generator = torch.Generator().manual_seed(seed)

    def scale(count: int) -> torch.Tensor:
        sign = torch.where(torch.rand(count, generator=generator) < 0.2, -1.0, 1.0)
        return sign * (torch.rand(count, generator=generator) + 0.5)

    return FactorizedWeight(
        torch.rand(rows, rank, generator=generator) < 0.5,
        torch.rand(rank, columns, generator=generator) < 0.5,
        scale(rows),
        scale(rank) * size / rank**0.5,
        scale(columns),
    )
