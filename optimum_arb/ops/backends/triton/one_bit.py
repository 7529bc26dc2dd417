"""One to four tokens: products of the packed sign words with 16-bit fixed-point inputs on the one-bit tensor cores.

Two kernels, those of `one_bit_kernels.py`. From sm_90 on each is launched while the one before it still runs
(programmatic dependent launch). The first waits before it reads x; the second fetches its first weights before it
waits: 0.7 us a call less on an H200.

A warp has the words and row scales of its next tiles loaded while it multiplies one, or it waits for memory at each: of
a weight [4096, 11008] with one plane, one token took 7.3 us while row scales and inputs were loaded when they were
needed, and the next words behind them; 5.1 since.

Each token's sums are made in the same order whatever the number of tokens, so a row of the result does not depend on
the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from .few_tokens_plan import Change, FewTokensPlan, Grid, change_class
from .launch import OPTIONS, Program, likeness, overlaps
from .one_bit_kernels import _decode, _prepare
from .prepack import ONE_BIT_TOKENS, ROWS, SLOTS, Prepacked

MAX_TOKENS = ONE_BIT_TOKENS  # the operands of more take more registers than a lane has to spare
# Told of no limit, the compiler loads late to need few registers, for the sake of more programs on a multiprocessor: of
# two tiles' inputs the second one behind the first one's products. Layouts that need more get what there is.
REGISTERS = 128
MOST_REGISTERS = 248
LOADED = 120  # of them, for what was loaded and is not used yet


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is cut.

    Attributes:
        groups: groups of 32 rows of a program.
        warps: warps of a program; each takes every `warps`-th tile of all its rows.
        ahead: tiles of a warp whose words and row scales are loaded before they are used.
    """

    groups: int = 1
    warps: int = 8
    ahead: int = 4


def decode(
    x: torch.Tensor,
    weight: Prepacked,
    bias: torch.Tensor | None,
    config: DecodeConfig,
    part_rows: tuple[int, ...] | None = None,
    experts: torch.Tensor | None = None,
    change: Change | None = None,
) -> torch.Tensor:
    """`x W^T + bias` for 1 to `MAX_TOKENS` rows of x.

    Args:
        x: `[M, K]`, float16 or bfloat16 (float32 is taken too, and rounded to 16-bit fixed point as the others), with
            neighbouring columns side by side in memory.
        weight: on the device of x.
        bias: `[N]`, or None.
        config: how to cut the work.
        part_rows: the rows of each weight that was joined; None for a single one.
        experts: int32 `[M]`, for the weights of experts (`prepack.experts`): the expert of each row of x, of which
            there may be any number; a number that is none's gives zeros.
        change: what x goes through first; not with experts.

    Returns:
        `[M * N]` of x's dtype: the results `[M, rows]` of the parts, one after another; with experts `[M, N]`, the
        parts side by side.
    """
    # Triton's own launch looks at every argument again: 25 us a kernel in Python, against 6 of a plan's
    key = (likeness(x, bias), config, part_rows, experts is None, change_class(change))
    plan = weight.plans.get(key)
    if plan is None:
        plan = weight.plans[key] = Plan(x, weight, bias, config, part_rows or (weight.rows,), experts, change)
    device = x.device.index
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return plan.run(x, bias, experts)
    return plan.run(x, bias, experts)


class Plan(FewTokensPlan):
    """The two launches of a product of some weight and number of tokens, compiled and with all but x and bias known."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: Prepacked,
        bias: torch.Tensor | None,
        config: DecodeConfig,
        parts: tuple[int, ...],
        experts: torch.Tensor | None,
        change: Change | None = None,
    ):
        tokens = x.shape[0]
        inputs, tiles = len(weight.program.inputs), weight.tiles
        super().__init__(x, weight.rows, scratch=len(parts) * inputs * tokens * tiles * SLOTS)
        ends = [sum(parts[: i + 1]) for i in range(len(parts))]
        starts = [0]
        for rows in parts:
            starts.append(starts[-1] + -(-rows // ROWS))
        # a program must not cross from part to part
        groups = 1 if any(start % config.groups for start in starts[1:-1]) else config.groups
        programs = triton.cdiv(weight.groups, groups)
        early = overlaps(x.device)
        # launching early takes room from what runs: it pays where few waves of programs cover the weight
        overlap = early and (
            programs * (1 if experts is None else tokens)
            <= 4 * torch.cuda.get_device_properties(x.device).multi_processor_count
        )
        self.prepare_grid = (tiles, tokens, len(parts) * inputs)
        self.prepare_weights, constants = self.preparation(weight, change)
        self.prepare_sizes = (tokens, x.shape[1])
        self.prepare_constants = (
            inputs,
            len(parts),
            weight.experts,
            weight.index is not None,
            *constants,
            early,
            overlap,
        )
        at_once = 1 << (tokens - 1).bit_length() if experts is None else 1
        steps = triton.cdiv(tiles, config.warps)
        of_weight = groups * (4 * weight.program.planes + 2 * weight.program.row_scales)
        of_input = 4 * at_once * inputs
        ahead = max(min(config.ahead, (LOADED - of_input) // of_weight), 1)
        ahead = triton.cdiv(steps, triton.cdiv(steps, ahead))  # which leaves the fewest steps without a tile
        inputs_ahead = ahead if ahead * (of_weight + of_input) <= LOADED else 1
        # the inputs of a tile, and of the next one, take half of them
        heavy = of_input > REGISTERS // 4
        self.registers = min(65536 // (32 * config.warps), MOST_REGISTERS) if heavy else REGISTERS
        self.tiles = tiles
        self.decode_grid = (programs, 1 if experts is None else tokens, 1)
        self.decode_weights = (weight.words, weight.row_scale)
        self.decode_sizes = (tiles, weight.groups, tokens, *[*ends, 0, 0][:3], *[*starts, 0, 0][1:3], weight.rows)
        self.decode_constants = (
            weight.program.planes,
            weight.program.row_scales,
            inputs,
            weight.program.terms,
            weight.tiles_per_block,
            bias is not None,
            len(parts),
            weight.experts,
            at_once,
            groups,
            config.warps,
            ahead,
            inputs_ahead,
            ahead >= steps,
            overlap,
        )
        self.warps, self.early, self.overlap = config.warps, early, overlap

    def run(self, x: torch.Tensor, bias: torch.Tensor | None, experts: torch.Tensor | None = None) -> torch.Tensor:
        """`[M * N]`; the first run goes through Triton, which compiles."""
        if self.serves(x):
            return self.launch(x, bias if experts is None else experts)
        scratch = torch.empty(self.scratch, dtype=torch.int32, device=x.device)
        out = torch.empty(self.results, dtype=x.dtype, device=x.device)
        first, second = self.arguments(x, x.stride(0), scratch, bias, experts, out)
        if self.launches is None:
            made = _prepare[self.prepare_grid](*first, num_warps=1, launch_pdl=self.early, **OPTIONS)
            options = {"num_warps": self.warps, "launch_pdl": self.overlap, "maxnreg": self.registers, **OPTIONS}
            decoded = _decode[self.decode_grid](*second, **options)
            self.launches = Program(made), Program(decoded)
            self.prepare_native(x.stride(0), bias, experts)
        else:
            stream = triton.runtime.driver.active.get_current_stream(x.device.index)
            self.launches[0](self.prepare_grid, first, stream)
            self.launches[1](self.decode_grid, second, stream)
        return out

    def grids(self) -> tuple[Grid, Grid]:
        return self.prepare_grid, self.decode_grid

    def arguments(
        self, x: Any, stride: int, scratch: Any, bias: Any, experts: Any, out: Any
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        owner = scratch if experts is None else experts
        sizes = (self.tiles, stride, *self.prepare_sizes)
        first = (x, *self.prepare_weights, owner, scratch, *sizes, *self.prepare_constants)
        second = (
            scratch,
            *self.decode_weights,
            owner,
            scratch if bias is None else bias,
            out,
            *self.decode_sizes,
            *self.decode_constants,
        )
        return first, second
