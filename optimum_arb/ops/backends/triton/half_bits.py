"""Up to sixteen tokens, mostly five and more: sign bits taken as float16 numbers by one logic operation for two.

`fragments.half_multiply` says how. Two kernels, those of `half_bits_kernels.py`, launched as those of `one_bit.py`: the
second fetches its first words before it waits for the first. Where programs share the columns, a third (`sums.py`) adds
what they have computed.

A row of the result does not depend on the other rows, or on their number up to 8 and from 9 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton

from .available import has_hopper_kernel
from .few_tokens_plan import Change, FewTokensPlan, Grid, change_class
from .half_bits_inputs import CHUNK, WARPGROUP_CHUNK
from .half_bits_kernels import _multiply, _prepare
from .half_bits_transformed import WARPS as TRANSFORMED_WARPS
from .half_bits_transformed import _prepare_transformed
from .launch import OPTIONS, Program, Ready, capability, cdiv, likeness, overlaps, power_of_2
from .native_launch import SCRATCH, Slot
from .prepack import ROWS, Prepacked
from .sums import Parts, Sum

MAX_TOKENS = 16  # two operands of the tensor cores: the sums of more take more registers than a lane has to spare
# bytes of shared memory for what 8 tokens are in a tile of 128 columns
TILE_SHARED = 3072
WARPGROUP_TILE_SHARED = 4 * WARPGROUP_CHUNK
HOPPER_SHARED = 192 << 10  # bytes of it for the copy of the inputs, of the 227 KB of a program there


@dataclass(frozen=True)
class HalfConfig:
    """How the kernel is cut.

    Attributes:
        warps: of a program, 4, 8 or 16, each with 32 rows; they share a copy of the inputs.
        ahead: tiles of a warp whose words and row scales are loaded before they are used.
        slice_tiles: tiles of 128 columns of a program at most; other programs take the others, and all their sums are
            added then.
        registers: of a thread at most.
        warpgroups: multiply more than 8 tokens by warpgroups, where `has_warpgroups` says that it can be.
    """

    warps: int = 8
    ahead: int = 2
    slice_tiles: int = 8
    registers: int = 128
    warpgroups: bool = True


def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may take for its copy of the inputs, of which it has some to spare."""
    return HOPPER_SHARED if capability(device) == (9, 0) else 96 << 10


def has_warpgroups(device: torch.device) -> bool:
    """Whether there are products of warpgroups, of which the warps of a program must be whole ones."""
    return device.type == "cuda" and capability(device) == (9, 0) and has_hopper_kernel(device)


def candidates(out_features: int, in_features: int, tokens: int, processors: int) -> list[HalfConfig]:
    """Cuts worth timing for a weight `[out_features, in_features]` on a GPU of sm_90.

    Args:
        out_features: N.
        in_features: K.
        tokens: 1 to `MAX_TOKENS`.
        processors: multiprocessors of the GPU.
    """
    found = []
    tiles = cdiv(in_features, 128)
    products = (False, True) if tokens > 8 else (False,)
    for warps, slices, warpgroups in product((4, 8, 16), range(1, 17), products):
        slice_tiles = cdiv(tiles, slices)
        tile_shared = WARPGROUP_TILE_SHARED if warpgroups else TILE_SHARED
        shared = power_of_2(slice_tiles) * cdiv(tokens, 8) * tile_shared
        if cdiv(tiles, slice_tiles) < slices or slice_tiles < min(2, tiles) or shared > HOPPER_SHARED:
            continue
        programs = cdiv(out_features, ROWS * warps) * slices
        # the share of the multiprocessors' time with work, if a program takes as long as any other
        at_once = processors * min(16 // warps, (227 << 10) // shared)
        room = cdiv(programs, at_once) * at_once if programs > at_once else cdiv(programs, processors) * processors
        fewest_or_most = slices in (1, min(16, max(tiles // 2, 1)))
        if not fewest_or_most and (programs < 0.75 * room or programs > 6 * processors):
            continue
        counts = (1, 2, 4) if warpgroups else (2, 4)
        registers = (128,) if warpgroups or warps == 4 else (96, 128)
        ahead = dict.fromkeys(cdiv(slice_tiles, cdiv(slice_tiles, count)) for count in counts)
        found += [
            HalfConfig(warps, count, slice_tiles, most, warpgroups if tokens > 8 else HalfConfig.warpgroups)
            for count in ahead
            for most in registers
        ]
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


def _slices(config: HalfConfig, tiles: int, most: int) -> tuple[int, int, int]:
    """Slices of the columns, a warp's steps through one, a whole number of rounds, and the tiles ahead, which is one.

    Args:
        config: what is asked for.
        tiles: of the columns.
        most: tiles that there is memory for; the kernel takes that of a power of two.
    """
    most = 1 << most.bit_length() - 1
    slices = cdiv(tiles, min(config.slice_tiles, most))
    steps = cdiv(tiles, slices)
    ahead = cdiv(steps, cdiv(steps, config.ahead))  # which leaves the fewest steps without a tile
    while power_of_2(ahead * cdiv(steps, ahead)) > most:
        ahead -= 1
    return slices, ahead * cdiv(steps, ahead), ahead


class Plan(FewTokensPlan):
    """The launches of a product of some weight and number of tokens, compiled and with all but x and bias known."""

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
        warps = config.warps
        while any(start % warps for start in starts[1:-1]):  # a program must not cross from part to part
            warps //= 2
        tokens, tiles, inputs = x.shape[0], weight.tiles, len(weight.program.inputs)
        token_tiles = 1 if tokens <= 8 else 2
        overlap = overlaps(x.device)
        warpgroups = config.warpgroups and token_tiles == 2 and warps % 4 == 0 and has_warpgroups(x.device)
        chunk, shared = (WARPGROUP_CHUNK, WARPGROUP_TILE_SHARED) if warpgroups else (CHUNK, TILE_SHARED)
        slices, steps, ahead = _slices(config, tiles, most_shared(x.device) // (inputs * token_tiles * shared))
        self.added = len(parts) * inputs * tiles * token_tiles * chunk  # words of the inputs; the slices' sums follow
        total = tokens * weight.rows
        super().__init__(x, weight.rows, scratch=self.added + (slices * total if slices > 1 else 0))
        ends = [sum(parts[: i + 1]) for i in range(len(parts))]
        self.prepare_grid = (tiles, token_tiles, len(parts) * inputs)
        tensors, constants = self.preparation(weight, change)
        common = (inputs, len(parts), weight.index is not None)
        self.prepare: Any = _prepare
        self.prepare_weights: tuple[Any, ...] = tensors[2:]
        self.prepare_sizes: tuple[int, ...] = (tokens,)
        self.prepare_constants: tuple[Any, ...] = (*common, overlap, warpgroups)
        self.prepare_warps = 4
        if change is not None:
            self.prepare, self.prepare_warps = _prepare_transformed, TRANSFORMED_WARPS
            self.prepare_weights, self.prepare_sizes = tensors, (tokens, x.shape[1])
            self.prepare_constants = (*common, *constants, overlap, warpgroups)
        self.tiles = tiles
        self.grid = (cdiv(weight.groups, warps), slices, 1)
        self.sum = Sum([Parts(slices, weight.rows)], tokens, x.dtype, x.device) if slices > 1 else None
        self.weights = (weight.words, weight.row_scale)
        self.rest = (
            tiles,
            weight.groups,
            tokens,
            total,
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
            warps,
            power_of_2(steps),
            ahead,
            ahead >= steps,
            overlap,
            warpgroups,
        )
        self.options: dict[str, Any] = {**OPTIONS, "launch_pdl": overlap}
        self.warps, self.registers = warps, config.registers

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[M * N]`; the first run goes through Triton, which compiles."""
        if self.serves(x):
            return self.launch(x, bias)
        device = x.device
        scratch = torch.empty(self.scratch, dtype=torch.int32, device=device)
        out = torch.empty(self.results, dtype=x.dtype, device=device)
        first, second, *third = self.arguments(x, x.stride(0), scratch, bias, None, out)
        begins = self.launches is None
        if self.launches is None:
            made = self.prepare[self.prepare_grid](*first, num_warps=self.prepare_warps, **self.options)
            options = {"num_warps": self.warps, "maxnreg": self.registers, **self.options}
            self.launches = Program(made), Program(_multiply[self.grid](*second, **options))
        else:
            stream = triton.runtime.driver.active.get_current_stream(device.index)
            self.launches[0](self.prepare_grid, first, stream)
            self.launches[1](self.grid, second, stream)
        if self.sum is not None:
            self.sum.launch(third[0])
        if begins:
            self.prepare_native(x.stride(0), bias, None)
        return out

    def ready(self, arguments: tuple[tuple[Any, ...], ...]) -> list[Ready | None]:
        found = super().ready(arguments)
        return found if self.sum is None else [*found, self.sum.launch.ready(arguments[2])]

    def grids(self) -> tuple[Grid, Grid]:
        return self.prepare_grid, self.grid

    def arguments(
        self, x: Any, stride: int, scratch: Any, bias: Any, experts: Any, out: Any
    ) -> tuple[tuple[Any, ...], ...]:
        sizes = (self.tiles, stride, *self.prepare_sizes)
        first = (x, *self.prepare_weights, scratch, *sizes, *self.prepare_constants)
        added = scratch if bias is None else bias
        if self.sum is None:
            return first, (scratch, *self.weights, added, out, *self.rest)
        sums: Any = Slot(SCRATCH, 4 * self.added)
        if not isinstance(scratch, Slot):
            sums = scratch[self.added :].view(torch.float32)
        second = (scratch, *self.weights, added, sums, *self.rest)
        return first, second, self.sum.arguments((sums, None, out))
