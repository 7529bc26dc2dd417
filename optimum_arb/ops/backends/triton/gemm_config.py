"""How a product of many tokens is computed: the choices, and which of them a weight and a device have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ....format.packing import tile_width
from ..packed import PackedWeight
from .available import has_hopper_kernel
from .launch import capability, cdiv, power_of_2

Kernel = Literal["hopper", "portable", "digits", "dequantize"]
# Up to which several planes may be multiplied one after another: more tokens keep the tensor cores busy as it is.
SCALED_TOKENS = 128


@dataclass(frozen=True)
class GemmConfig:
    """How a product is computed. The result for a row of x depends on the config, never on the other rows.

    Attributes:
        kernel: see `gemm.py`.
        block_m: tokens of a tile of the output ("digits": all of them).
        block_n: weight rows of a tile of the output.
        warps: warps of a program.
        stages: tiles of x that are loaded ahead.
        tiles: "hopper": packing tiles that are loaded at once, 1 or 2; "digits": planes of tiles that a product of
            matrices takes at once, a power of two.
        split_k: programs that share the columns of one output tile; their sums are added in order by a second kernel.
        scale_input: "hopper": a launch of its own multiplies the column scales into x, once for each plane, which
            rounds x again, rather than every program into the weights that it decodes. Several planes are then
            multiplied one after another, which can pay where tokens are few. Weights of one plane with an order of
            columns have that anyway, by the launch that brings x into it.
        split_from: "hopper": the row of the weight from which `split_k` counts; the tiles of rows before it have a
            program each. So the few tiles of a last round are divided among all multiprocessors. 0: all rows.
    """

    kernel: Kernel = "dequantize"
    block_m: int = 64
    block_n: int = 128
    warps: int = 4
    stages: int = 3
    split_k: int = 1
    tiles: int = 1
    scale_input: bool = False
    split_from: int = 0


def is_fusable(packed: PackedWeight) -> bool:
    """Whether "portable" and "digits" compute this layout: they would have to search for salient columns all along."""
    return not packed.layout.salient


def suits_hopper(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether "hopper" is written for this weight, inputs of this dtype and the weight's device."""
    return (
        capability(packed.weight.device)[0] == 9
        and dtype in (torch.float16, torch.bfloat16)
        and packed.layout.name.startswith("planes-")
        and packed.block_size != 64
        and packed.in_features % 128 == 0
        and packed.weight.data_ptr() % 16 == 0  # the copy engine wants that
        and packed.weight.stride(1) == 1
    )


def fits_hopper(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether "hopper" computes this weight for inputs of this dtype: where it is written for them, and works."""
    return suits_hopper(packed, dtype) and has_hopper_kernel(packed.weight.device)


def candidates(n: int, k: int, m: int, hopper: bool = True, processors: int = 132) -> list[GemmConfig]:
    """Configurations worth timing for `[m, k] x [n, k]`, the fastest of which depends on the device.

    Args:
        n: out_features.
        k: in_features.
        m: tokens.
        hopper: whether "hopper" computes there; otherwise "portable".
        processors: multiprocessors of the device.
    """
    if not hopper:
        return _portable_candidates(n, k, m)
    found = [GemmConfig("dequantize")] if m >= 128 else []
    # tokens, rows, warps, stages, tiles of a program
    if m <= 64:
        block_m = max(8, power_of_2(m))
        programs = [(block_m, 64, 4, 2 if block_m == 64 else 3, 2), (block_m, 64, 4, 4, 1)]
        programs.append((block_m, 128, 4, 4, 1) if m <= 32 else (block_m, 128, 8, 3, 2))
        if m <= 32:
            programs.append((block_m, 128, 8, 4, 2))
    elif m <= 256:
        block_m = 128
        programs = [(64, 64, 4, 4, 1), (128, 64, 4, 3, 1), (128, 128, 8, 4, 1), (64, 128, 8, 3, 2)]
    else:
        programs = [(128, 128, 8, 4, 1), (128, 256, 8, 4, 1), (256, 128, 8, 3, 1)]
    if 16 < m <= 256 and n >= 8192:
        # every tile of rows reads all of x, more than once where it comes scaled for several planes
        programs.append((block_m, 256, 8, 4, 1))
    for block_m, block_n, warps, stages, tiles in programs:
        count = cdiv(m, block_m) * cdiv(n, block_n)
        # two large programs have no room on one multiprocessor, about four small ones do
        most = (270 if m <= 256 else 400) if warps == 8 else 800
        # more tokens than 512 have more tiles than there are multiprocessors, and parts of them are much to add
        for split_k in (1, 2, 4, 8, 16) if m <= 256 else (1, 2, 3) if m <= 512 else (1,):
            if split_k > 1 and (count * split_k > most or k // 128 < 2 * tiles * split_k):
                continue
            if count * split_k < 100 and count * split_k * 2 <= most and k // 128 >= 4 * tiles * split_k and m <= 256:
                continue
            found.append(GemmConfig("hopper", block_m, block_n, warps, stages, split_k, tiles))
        if warps == 8 and m > 128:
            split_from, split_k = last_round(n, m, block_n, block_m, processors)
            if split_k > 1 and k // 128 >= 2 * tiles * split_k:
                found.append(GemmConfig("hopper", block_m, block_n, warps, stages, split_k, tiles, False, split_from))
    return found


def scaled_candidates(n: int, k: int, m: int, planes: int, permuted: bool, processors: int = 132) -> list[GemmConfig]:
    """Those of "hopper" that read x multiplied by the column scales, where that is not what they do anyway.

    Args:
        n: out_features.
        k: in_features.
        m: tokens.
        planes: stored sign planes.
        permuted: whether the columns have an order of their own.
        processors: multiprocessors of the device.
    """
    if permuted if planes == 1 else m > SCALED_TOKENS:
        return []
    found = candidates(n, planes * k, m, processors=processors)
    return [replace(config, scale_input=True) for config in found if config.kernel == "hopper"]


def last_round(n: int, m: int, block_n: int, block_m: int, processors: int) -> tuple[int, int]:
    """The row from which tiles are left for a last round of programs, one on each multiprocessor, and how many programs
    can share each of them in one round; (0, 1) where there is no round before it, or no room.

    5120 rows are 160 tiles of 128 x 128 for 512 tokens: 132 in a first round, and 28 that would take as long again
    by themselves, or a quarter of that in four parts."""
    across = cdiv(m, block_m)
    whole = cdiv(n, block_n) * across // processors * processors // across  # rows of tiles
    left = (cdiv(n, block_n) - whole) * across
    if not whole or not left:
        return 0, 1
    return whole * block_n, min(processors // left, 4)


def _portable_candidates(n: int, k: int, m: int) -> list[GemmConfig]:
    found = [GemmConfig("dequantize")] if m >= 32 else []
    block_m = min(max(16, power_of_2(m)), 64)
    for block_n, warps in ((64, 4), (128, 4), (128, 8)):
        count = cdiv(m, block_m) * cdiv(n, block_n)
        for split_k in (1, 2, 4, 8):
            if split_k == 1 or (m <= 256 and count * split_k <= 800 and k // 128 >= 2 * split_k):
                found.append(GemmConfig("portable", block_m, block_n, warps, 2, split_k))
    return found


def portable_program() -> tuple[int, int]:
    """Weight rows and warps of a program of "portable" where nobody has measured what is fastest.

    On AMD's GPUs a program has 64 KB of shared memory, of which 128 rows take 64 to 80 and 64 rows 32 to 48.
    """
    return (128, 8) if torch.version.hip is None else (64, 4)


def default_config(packed: PackedWeight, m: int, dtype: torch.dtype) -> GemmConfig:
    """A configuration that works, for what no table knows."""
    if not (packed.weight.is_cuda and is_fusable(packed) and dtype in (torch.float16, torch.bfloat16)):
        return GemmConfig("dequantize")
    n, tiles = packed.out_features, packed.in_features // 128
    if not fits_hopper(packed, dtype):
        if m > 128:
            return GemmConfig("dequantize")
        # tiles of 128 tokens take 100 KB of shared memory, of which an RTX 4090 has 99 for a program
        block_m = min(max(16, power_of_2(m)), 64)
        block_n, warps = portable_program()
        programs = cdiv(m, block_m) * cdiv(n, block_n)
        split_k = 1
        while programs * split_k < 100 and split_k < 8 and tiles >= 8 * split_k:
            split_k *= 2
        return GemmConfig("portable", block_m, block_n, warps, 2, split_k)
    if m > 256:
        large = cdiv(m, 128) * cdiv(n, 256) >= 120
        return GemmConfig("hopper", 128, 256 if large else 128, 8, 4)
    block_m = min(max(8, power_of_2(m)), 128)
    programs = cdiv(m, block_m) * cdiv(n, 64)
    split_k = 1
    while programs * split_k < 200 and split_k < 8 and tiles >= 8 * split_k:
        split_k *= 2
    return GemmConfig("hopper", block_m, 64, 4, 4 if block_m < 128 else 3, split_k)


def scales_input(packed: PackedWeight, config: GemmConfig) -> bool:
    """Whether "hopper" reads x multiplied by the column scales: where its columns are brought into the weight's order,
    or where the config asks for it."""
    layout, scale = packed.layout, packed.col_scale
    if scale is None or layout.col_scales != layout.planes or not scale.is_contiguous():
        return False
    return config.scale_input or (layout.planes == 1 and packed.permutation is not None)


def reads_input(packed: PackedWeight, config: GemmConfig) -> bool:
    """Whether "hopper" reads x as it is: neither in another order nor multiplied by column scales."""
    return packed.permutation is None and not scales_input(packed, config)


def columns_read(packed: PackedWeight, config: GemmConfig) -> int:
    """Columns of x as "hopper" reads it: each once for every plane where x comes scaled."""
    return packed.in_features * (packed.layout.planes if scales_input(packed, config) else 1)


def split_of(config: GemmConfig, packed: PackedWeight) -> int:
    """No more programs along K than there are whole steps of `config.tiles` tiles, each with at least one."""
    steps = max(cdiv(columns_read(packed, config) // tile_width(packed.block_size), config.tiles), 1)
    share = cdiv(steps, min(config.split_k, steps))
    return cdiv(steps, share)
