"""One to sixteen tokens where the tensor cores have no products of one bit: signs times 8-bit digits of the inputs.

The two kernels of `digits_kernels.py`, and the sum of their parts where programs share columns. They read the stored
order of every layout without salient columns, on every GPU whose tensor cores multiply 8-bit integers.

A row of the result does not depend on the other rows, nor, with one `GemmConfig`, on their number.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch

from ....format.layout import layout_from_name
from ....format.packing import tile_width
from ..packed import PackedWeight
from . import prepack
from .digits_kernels import _multiply_kernel, _prepare_kernel
from .gemm_config import GemmConfig
from .launch import Launch, Launcher, Ready, capability, cdiv, overlaps, power_of_2, size_class, tensor_class
from .native_launch import EXTRA, OUT, SCRATCH, Slot, X
from .outputs import Outputs, aligned
from .ready_launches import ReadyProduct
from .sums import Parts, Sum

MAX_TOKENS = 16
MOST_SHARED = 8  # programs that share a row's columns
_prepare = Launcher(_prepare_kernel)
_multiply = Launcher(_multiply_kernel)


def candidates(n: int, k: int, m: int) -> list[GemmConfig]:
    """Cuts of the kernel worth timing for `[m, k] x [n, k]`.

    Args:
        n: out_features.
        k: in_features.
        m: tokens, up to `MAX_TOKENS`.
    """
    # rows, warps, stages, units of a program
    if m <= 2:
        programs = [(32, 2, 4, 4), (64, 4, 3, 4), (64, 4, 4, 4), (64, 4, 3, 8), (128, 8, 3, 4)]
    else:
        programs = [(64, 4, 3, 2), (64, 4, 4, 2), (128, 8, 3, 2), (64, 4, 3, 4)]
    found = []
    for rows, warps, stages, units in programs:
        for split_k in (1, 2, 4, 8):
            count = cdiv(n, rows) * split_k
            fits = split_k == 1 or (count * warps <= 8000 and k // 128 >= 2 * units * split_k)
            if fits and (count * warps >= 500 or k // 128 < 4 * units * split_k or split_k == MOST_SHARED):
                found.append(GemmConfig("digits", power_of_2(m), rows, warps, stages, split_k, units))
    return found


def default_config(packed: PackedWeight, m: int) -> GemmConfig:
    """A cut for what no table knows.

    Measured on an H200 with 1, 4 and 16 tokens of 4096 to 28672 rows and 4096 or 8192 columns (`digits_gpu.py`): within
    a quarter of the fastest there, where programs that are cut until there are enough of them took up to 2.1 times it.
    """
    programs = cdiv(packed.out_features, 64)
    if m > 4:
        rows, warps, units, split_k = 128, 8, 2, 4
    elif m > 2 and programs >= 100:
        rows, warps, units, split_k = 64, 4, 2, 4 if programs >= 400 else 8
    else:
        rows, warps, units, split_k = 64, 4, 4, 8 if m <= 2 and programs <= 128 else 4
    steps = cdiv(packed.in_features, 128 * units)
    while split_k > 1 and steps < 2 * split_k:
        split_k //= 2
    return GemmConfig("digits", power_of_2(m), rows, warps, 3, split_k, units)


@cache
def _terms(name: str) -> tuple[tuple[int, ...], tuple[tuple[int, int, int, int, float], ...]]:
    """The column scale of each input, and (plane, second plane, row scale, input, factor) of each term; -1 for none.

    Raises:
        ValueError: the layout has salient columns.
    """
    layout = layout_from_name(name)
    program = prepack.program(layout)
    if layout.salient:
        raise ValueError(f"The kernel of digits does not compute the layout {name}, which has salient columns.")
    terms = []
    for mask, row, source, factor in program.terms:
        first, second, *_ = [plane for plane in range(layout.planes) if mask >> plane & 1] + [-1, -1]
        terms.append((first, second, row, source, factor))
    return tuple(col for col, _ in program.inputs), tuple(terms)


def takes_assembly(device: torch.device) -> bool:
    """Whether the assembly in `digits_kernels.py` is this device's."""
    return device.type == "cuda" and torch.version.hip is None


@cache
def _least_columns(device: torch.device) -> int:
    """Of the operand of x: 8, but 16 on CDNA, where Triton makes four times the instructions of fewer."""
    if device.type != "cuda" or torch.version.hip is None:
        return 8
    return 16 if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9") else 8


def _batch(device: torch.device, config: GemmConfig, columns: int) -> int:
    """How many products of matrices the rows of a program are: one, or one for each warp.

    One for all warps is `mma` with Triton 3.6 and 3.7, on sm_90 up to 8 columns. From 3.8 on it is `wgmma` there, and
    on sm_100 `tcgen05`, whose operands go through tensor memory and which is waited for at every bit: 27 barriers a
    step where there were 2. A batch is `mma` with all of them, of the instructions that 3.6 makes of one product.
    """
    major = capability(device)[0]
    apart = major > 9 or (major == 9 and columns < 16)
    return config.warps if apart and config.block_n >= 16 * config.warps else 1


def multiply(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype, config: GemmConfig
) -> torch.Tensor:
    """`x W^T + bias`, `[M, N]`, of up to `MAX_TOKENS` rows of x, float16, bfloat16 or float32, on the current device.

    All of them are rounded to 16-bit fixed point by tiles.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    plan = DigitsPlan(packed, x.shape[0], x.stride(0), tensor_class(x), out_dtype, bias, x.device, config)
    return plan.run(x, bias)


class DigitsPlan(ReadyProduct):
    """The launches of a product of some weight and number of tokens, with all but x and bias known.

    Args:
        packed: the weight, of a layout without salient columns; tensors that are not contiguous are copied.
        tokens: M, up to `MAX_TOKENS`.
        stride: from row to row of x.
        kind: `tensor_class` of x.
        out_dtype: of the result.
        bias: one like those that are to be added, or None.
        device: of all tensors.
        config: how; `tiles` is the units (planes of tiles) that a product of matrices takes at once, more where that
            is too few.
    """

    def __init__(
        self,
        packed: PackedWeight,
        tokens: int,
        stride: int,
        kind: tuple[torch.dtype, bool],
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
        device: torch.device,
        config: GemmConfig,
    ):
        layout, rows, columns = packed.layout, packed.out_features, packed.in_features
        super().__init__(device, kind[0], Outputs(rows, out_dtype))
        cols, terms = _terms(layout.name)
        width = tile_width(packed.block_size)
        tiles = cdiv(columns, width)
        overlap = overlaps(device)
        options = {"launch_pdl": True} if overlap else {}
        self.out_dtype, self.with_bias = out_dtype, bias is not None
        self.digits = len(cols) * tiles * 8 * tokens * 2 * (width // 8)
        self.steps = len(cols) * tiles * tokens

        absent = packed.weight
        self.inputs = (
            absent if packed.permutation is None else packed.permutation.contiguous(),
            absent if packed.col_scale is None else packed.col_scale.contiguous(),
        )
        self.prepare_sizes = (tokens, columns, tiles, stride)
        self.prepare_constants = (cols, packed.permutation is not None, overlap, width)
        key: tuple[Hashable, ...] = (kind, size_class(columns), size_class(stride), self.prepare_constants)
        self.prepare = Launch(
            _prepare, (key, *map(tensor_class, self.inputs)), (tiles, tokens, len(cols)), device, num_warps=1, **options
        )

        # products of matrices take 32 bytes at least
        units = max(config.tiles, 256 // width, _least_columns(device) // (2 * power_of_2(tokens)))
        total = cdiv(tiles * len(terms), units)
        share = cdiv(total, min(config.split_k, total))
        split_k = cdiv(total, share)
        self.parts = (split_k, tokens, rows)
        self.sum = Sum([Parts(split_k, rows, bias)], tokens, out_dtype, device) if split_k > 1 else None
        has_bias = bias is not None and split_k == 1
        self.weights = (packed.weight, packed.row_scale.contiguous())
        row_stride = packed.row_scale.shape[1]
        self.multiply_sizes = (tokens, rows, columns, tiles, packed.weight.stride(0), row_stride)
        self.multiply_constants = (
            terms,
            layout.planes,
            layout.row_scales,
            0 if packed.block_size == -1 else packed.block_size // width,
            min(row_stride & -row_stride, 16),
            any(second >= 0 or first < 0 for first, second, *_ in terms),
            tiles * len(terms) % units == 0,
            columns % width != 0,
            width,
            has_bias,
            split_k,
            takes_assembly(device),
            overlap,
            power_of_2(tokens),
            config.block_n,
            units,
            _batch(device, config, 2 * power_of_2(tokens) * units),
        )
        key = (
            out_dtype if split_k == 1 else torch.float32,
            tensor_class(bias) if has_bias and bias is not None else None,
            *map(tensor_class, self.weights),
            *map(size_class, (rows, columns, packed.weight.stride(0), row_stride)),
            self.multiply_constants,
            config.warps,
            config.stages,
        )
        grid = (cdiv(rows, config.block_n), split_k, 1)
        self.multiply = Launch(
            _multiply, key, grid, device, num_warps=config.warps, num_stages=config.stages, **options
        )

        # digits, steps, parts of sums
        self.steps_at = aligned(self.digits)
        self.parts_at = self.steps_at + aligned(4 * self.steps)
        self.scratch = self.parts_at + (0 if self.sum is None else 4 * split_k * tokens * rows)

    def _run_by_triton(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        digits = torch.empty(self.digits, dtype=torch.int8, device=x.device)
        steps = torch.empty(self.steps, dtype=torch.float32, device=x.device)
        out = torch.empty((*x.shape[:-1], self.parts[2]), dtype=self.out_dtype, device=x.device)
        self.prepare(self.prepare_arguments(x, digits, steps))
        if self.sum is None:
            self.multiply(self.multiply_arguments(digits, steps, bias, out))
        else:
            parts = torch.empty(self.parts, dtype=torch.float32, device=x.device)
            self.multiply(self.multiply_arguments(digits, steps, None, parts))
            self.sum((parts, bias, out))
        self._ran = True
        return out

    def ready(self) -> list[Ready | None]:
        bias = Slot(EXTRA) if self.with_bias else None
        digits, steps, parts = Slot(SCRATCH), Slot(SCRATCH, self.steps_at), Slot(SCRATCH, self.parts_at)
        found = [self.prepare.ready(self.prepare_arguments(Slot(X), digits, steps))]
        if self.sum is None:
            return [*found, self.multiply.ready(self.multiply_arguments(digits, steps, bias, Slot(OUT)))]
        found.append(self.multiply.ready(self.multiply_arguments(digits, steps, None, parts)))
        return [*found, self.sum.launch.ready(self.sum.arguments((parts, bias, Slot(OUT))))]

    def prepare_arguments(self, x: Any, digits: Any, steps: Any) -> tuple[Any, ...]:
        """All of the first kernel's, of tensors or of what stands for them."""
        return digits, steps, x, *self.inputs, *self.prepare_sizes, *self.prepare_constants

    def multiply_arguments(self, digits: Any, steps: Any, bias: Any, out: Any) -> tuple[Any, ...]:
        """All of the second kernel's."""
        added = out if bias is None else bias
        return out, digits, steps, added, *self.weights, *self.multiply_sizes, *self.multiply_constants
