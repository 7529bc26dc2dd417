"""Five to sixteen tokens: sign bits taken as float16 numbers by one logic operation for two of them.

`fragments.half_multiply` says how. Two kernels, those of `half_bits_kernels.py`, launched as those of `one_bit.py`: the
second fetches its first words before it waits for the first.

A row of the result does not depend on the other rows, or on their number up to 8 and from 9 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from .few_tokens_plan import Change, FewTokensPlan, Grid, change_class
from .half_bits_kernels import _multiply, _prepare
from .half_bits_transformed import WARPS as TRANSFORMED_WARPS
from .half_bits_transformed import _prepare_transformed
from .launch import OPTIONS, Program, cdiv, likeness, overlaps
from .prepack import ROWS, Prepacked

MAX_TOKENS = 16  # two operands of the tensor cores: the sums of more take more registers than a lane has to spare


@dataclass(frozen=True)
class HalfConfig:
    """How the kernel is cut.

    Attributes:
        groups: groups of 32 rows of a warp, 1, 2 or 4.
        row_warps: warps of a program beside each other along the rows; they read the same inputs.
        column_warps: warps beside each other along the columns; each takes every `column_warps`-th tile.
        ahead: tiles of a warp whose words and row scales are loaded before they are used.
    """

    groups: int = 1
    row_warps: int = 2
    column_warps: int = 4
    ahead: int = 2


def candidates(out_features: int, in_features: int, tokens: int) -> list[HalfConfig]:
    """Cuts worth timing for a weight `[out_features, in_features]`.

    Args:
        out_features: N.
        in_features: K.
        tokens: 1 to `MAX_TOKENS`.
    """
    found = []
    for groups in (1, 2, 4):
        for row_warps in (1, 2, 4):
            for column_warps in (2, 4, 8, 16):
                warps = row_warps * column_warps
                programs = cdiv(out_features, ROWS * groups * row_warps)
                # sums and inputs of a warp: what would not fit the 65536 registers of a multiprocessor twice
                wide = groups * cdiv(tokens, 8)
                if not 4 <= warps <= 16 or wide > 4 or wide * warps > 32 or 2 * column_warps > cdiv(in_features, 128):
                    continue
                if programs < 64 and groups * row_warps > 1:
                    continue
                steps = cdiv(cdiv(in_features, 128), column_warps)
                found += [HalfConfig(groups, row_warps, column_warps, ahead) for ahead in (1, 2, 4) if ahead <= steps]
    return found


def multiply(
    x: torch.Tensor,
    weight: Prepacked,
    bias: torch.Tensor | None,
    config: HalfConfig,
    part_rows: tuple[int, ...] | None = None,
    change: Change | None = None,
) -> torch.Tensor:
    """`x W^T + bias` for 1 to `MAX_TOKENS` rows of x.

    Args:
        x: `[M, K]`, float16, bfloat16 or float32, with neighbouring columns side by side in memory.
        weight: on the device of x, not of experts.
        bias: `[N]`, or None.
        config: how to cut the work.
        part_rows: the rows of each weight that was joined; None for a single one.
        change: what x goes through first.

    Returns:
        `[M * N]` of x's dtype: the results `[M, rows]` of the parts, one after another.
    """
    key = (likeness(x, bias), config, part_rows, change_class(change))
    plan = weight.plans.get(key)
    if plan is None:
        plan = weight.plans[key] = Plan(x, weight, bias, config, part_rows or (weight.rows,), change)
    device = x.device
    if x.is_cuda and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return plan.run(x, bias)
    return plan.run(x, bias)


class Plan(FewTokensPlan):
    """The two launches of a product of some weight and number of tokens, compiled and with all but x and bias known."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: Prepacked,
        bias: torch.Tensor | None,
        config: HalfConfig,
        parts: tuple[int, ...],
        change: Change | None = None,
    ):
        starts = [0]
        for rows in parts:
            starts.append(starts[-1] + cdiv(rows, ROWS))
        groups, row_warps = config.groups, config.row_warps
        # a program must not cross from part to part
        while any(start % (groups * row_warps) for start in starts[1:-1]):
            groups, row_warps = (groups, row_warps // 2) if row_warps > 1 else (groups // 2, 1)
        tokens, tiles, inputs = x.shape[0], weight.tiles, len(weight.program.inputs)
        token_tiles = 1 if tokens <= 8 else 2
        overlap = overlaps(x.device)
        super().__init__(x, weight.rows, scratch=len(parts) * inputs * tiles * token_tiles * 528)
        ends = [sum(parts[: i + 1]) for i in range(len(parts))]
        self.prepare_grid = (tiles, token_tiles, len(parts) * inputs)
        tensors, constants = self.preparation(weight, change)
        common = (inputs, len(parts), weight.index is not None)
        self.prepare: Any = _prepare
        self.prepare_weights: tuple[Any, ...] = tensors[2:]
        self.prepare_sizes: tuple[int, ...] = (tokens,)
        self.prepare_constants: tuple[Any, ...] = (*common, overlap)
        self.prepare_warps = 4
        if change is not None:
            self.prepare, self.prepare_warps = _prepare_transformed, TRANSFORMED_WARPS
            self.prepare_weights, self.prepare_sizes = tensors, (tokens, x.shape[1])
            self.prepare_constants = (*common, *constants, overlap)
        steps = cdiv(tiles, config.column_warps)
        ahead = cdiv(steps, cdiv(steps, config.ahead))  # which leaves the fewest steps without a tile
        self.tiles = tiles
        self.grid = (cdiv(weight.groups, groups * row_warps), 1, 1)
        self.weights = (weight.words, weight.row_scale)
        self.rest = (
            tiles,
            weight.groups,
            tokens,
            *[*ends, 0, 0][:3],
            *[*starts[: len(parts)], 0, 0][1:3],
            weight.program.planes,
            weight.program.row_scales,
            inputs,
            weight.program.terms,
            weight.tiles_per_block,
            bias is not None,
            len(parts),
            token_tiles,
            groups,
            row_warps,
            config.column_warps,
            ahead,
            ahead >= steps,
            overlap,
        )
        self.options: dict[str, Any] = {**OPTIONS, "launch_pdl": overlap}
        self.warps = row_warps * config.column_warps

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[M * N]`; the first run goes through Triton, which compiles."""
        if self.serves(x):
            return self.launch(x, bias)
        device = x.device
        scratch = torch.empty(self.scratch, dtype=torch.int32, device=device)
        out = torch.empty(self.results, dtype=x.dtype, device=device)
        first, second = self.arguments(x, x.stride(0), scratch, bias, None, out)
        if self.launches is None:
            made = self.prepare[self.prepare_grid](*first, num_warps=self.prepare_warps, **self.options)
            self.launches = Program(made), Program(_multiply[self.grid](*second, num_warps=self.warps, **self.options))
            self.prepare_native(x.stride(0), bias, None)
        else:
            stream = triton.runtime.driver.active.get_current_stream(device.index)
            self.launches[0](self.prepare_grid, first, stream)
            self.launches[1](self.grid, second, stream)
        return out

    def grids(self) -> tuple[Grid, Grid]:
        return self.prepare_grid, self.grid

    def arguments(
        self, x: Any, stride: int, scratch: Any, bias: Any, experts: Any, out: Any
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        sizes = (self.tiles, stride, *self.prepare_sizes)
        first = (x, *self.prepare_weights, scratch, *sizes, *self.prepare_constants)
        return first, (scratch, *self.weights, scratch if bias is None else bias, out, *self.rest)
