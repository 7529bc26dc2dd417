"""`x W^T + bias` for many tokens, and the gradient of x.

Three ways, which `GemmConfig.kernel` names:

- "hopper": `hopper.py`, the packed weight decoded once a tile straight into the registers from which the tensor cores
  of an sm_90 read it. Layouts of one to three planes with or without column scales.
- "portable": the same idea in plain Triton, for every layout without salient columns and every GPU.
- "dequantize": the dense weight is written to memory and multiplied by the vendor's library. Every layout and dtype;
  its cost does not depend on the number of tokens, so it wins where there are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from ....format.packing import tile_width
from ..packed import PackedWeight
from .columns import gather_columns
from .decode import arguments, decode_tile
from .dequantize import dequantize
from .hadamard import Transform
from .launch import Launcher, capability, cdiv, power_of_2, size_class, tensor_class
from .sums import Sum

try:
    from .hopper_group import HopperGroup
    from .hopper_plan import HopperPlan
except ImportError:  # a Triton without Gluon, or with another form of it
    HopperPlan = HopperGroup = None  # type: ignore[assignment, misc]

Kernel = Literal["hopper", "portable", "dequantize"]


@dataclass(frozen=True)
class GemmConfig:
    """How a product is computed. The result for a row of x depends on the config, never on the other rows.

    Attributes:
        kernel: see the top of this file.
        block_m: tokens of a tile of the output.
        block_n: weight rows of a tile of the output.
        warps: warps of a program.
        stages: tiles of x that are loaded ahead.
        tiles: "hopper" alone: packing tiles that are loaded at once, 1 or 2.
        split_k: programs that share the columns of one output tile; their sums are added in order by a second kernel.
    """

    kernel: Kernel = "dequantize"
    block_m: int = 64
    block_n: int = 128
    warps: int = 4
    stages: int = 3
    split_k: int = 1
    tiles: int = 1


@triton.jit(do_not_specialize=["M", "row_stride", "tiles_per_block"])
def _gemm_kernel(
    out,
    x,
    bias,
    M,
    x_stride,
    weight,
    row_scale,
    col_scale,
    salient_columns,
    salient_weight,
    salient_col_scale,
    N,
    K,
    weight_stride,
    row_stride,
    tiles_per_block,
    salient,
    salient_stride,
    TERMS: tl.constexpr,
    PLANES: tl.constexpr,
    SALIENT_PLANES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    COL_SCALES: tl.constexpr,
    SALIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[m, n] (or [split, m, n], summed later): computed as W x^T, so that the decoded weight stays in registers."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # neighbouring programs share rows of the weight or of x: GROUP tiles of rows times all tiles of tokens in turn
    program = tl.program_id(0)
    group = program // (GROUP * tiles_m)
    height = tl.minimum(tiles_n - group * GROUP, GROUP)
    inside = program - group * GROUP * tiles_m
    tile_n = group * GROUP + inside % height
    tile_m = inside // height
    split = tl.program_id(1)

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, TILE)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride
    whole = K // TILE
    share = tl.cdiv(whole, SPLIT_K)
    start = split * share
    stop = tl.minimum(start + share, whole)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(start, stop):
        w = decode_tile(
            weight,
            row_scale,
            col_scale,
            salient_columns,
            salient_weight,
            salient_col_scale,
            K,
            weight_stride,
            row_stride,
            tiles_per_block,
            salient,
            salient_stride,
            rows,
            tile,
            TERMS,
            PLANES,
            SALIENT_PLANES,
            ROW_SCALES,
            COL_SCALES,
            SALIENT,
            ONE_BLOCK,
            TILE,
            WORDS,
            True,
        ).to(x.dtype.element_ty)
        tokens = tl.load(x_rows + tile * TILE + k[None, :])
        if UPCAST:
            sums = tl.dot(w.to(tl.float32), tl.trans(tokens.to(tl.float32)), sums)
        else:
            sums = tl.dot(w, tl.trans(tokens), sums)
    if (split == SPLIT_K - 1) & (whole * TILE < K):
        w = decode_tile(
            weight,
            row_scale,
            col_scale,
            salient_columns,
            salient_weight,
            salient_col_scale,
            K,
            weight_stride,
            row_stride,
            tiles_per_block,
            salient,
            salient_stride,
            rows,
            whole,
            TERMS,
            PLANES,
            SALIENT_PLANES,
            ROW_SCALES,
            COL_SCALES,
            SALIENT,
            ONE_BLOCK,
            TILE,
            WORDS,
            False,
        ).to(x.dtype.element_ty)
        tokens = tl.load(x_rows + whole * TILE + k[None, :], mask=(whole * TILE + k < K)[None, :], other=0)
        if UPCAST:
            sums = tl.dot(w.to(tl.float32), tl.trans(tokens.to(tl.float32)), sums)
        else:
            sums = tl.dot(w, tl.trans(tokens), sums)
    if HAS_BIAS:
        sums += tl.load(bias + rows).to(tl.float32)[:, None]
    at = out + split.to(tl.int64) * M * N + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


_gemm = Launcher(_gemm_kernel)


def is_fusable(packed: PackedWeight) -> bool:
    """Whether "portable" computes this layout: it would have to search for salient columns again and again."""
    return not packed.layout.salient


def has_hopper() -> bool:
    """Whether "hopper" is written for this version of Triton."""
    return HopperPlan is not None


def fits_hopper(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether "hopper" computes this weight for inputs of this dtype on the weight's device."""
    return (
        has_hopper()
        and capability(packed.weight.device)[0] == 9
        and dtype in (torch.float16, torch.bfloat16)
        and packed.layout.name.startswith("planes-")
        and packed.block_size != 64
        and packed.in_features % 128 == 0
        and packed.weight.data_ptr() % 16 == 0  # the copy engine wants that
        and packed.weight.stride(1) == 1
    )


def candidates(n: int, k: int, m: int) -> list[GemmConfig]:
    """Configurations worth timing for `[m, k] x [n, k]`, the fastest of which depends on the device.

    Args:
        n: out_features.
        k: in_features.
        m: tokens.
    """
    found = [GemmConfig("dequantize")] if m >= 128 else []
    # tokens, rows, warps, stages, tiles of a program
    if m <= 64:
        block_m = max(8, power_of_2(m))
        programs = [(block_m, 64, 4, 2 if block_m == 64 else 3, 2), (block_m, 64, 4, 4, 1)]
        programs.append((block_m, 128, 4, 4, 1) if m <= 32 else (block_m, 128, 8, 3, 2))
        if m <= 32:
            programs.append((block_m, 128, 8, 4, 2))
    elif m <= 256:
        programs = [(64, 64, 4, 4, 1), (128, 64, 4, 3, 1), (128, 128, 8, 4, 1), (64, 128, 8, 3, 2)]
    else:
        programs = [(128, 128, 8, 4, 1), (128, 256, 8, 4, 1), (256, 128, 8, 3, 1)]
    for block_m, block_n, warps, stages, tiles in programs:
        count = cdiv(m, block_m) * cdiv(n, block_n)
        # two large programs have no room on one multiprocessor, about four small ones do
        most = 270 if warps == 8 else 800
        for split_k in (1, 2, 4, 8, 16):
            if split_k > 1 and (m > 256 or count * split_k > most or k // 128 < 2 * tiles * split_k):
                continue
            if count * split_k < 100 and count * split_k * 2 <= most and k // 128 >= 4 * tiles * split_k and m <= 256:
                continue
            found.append(GemmConfig("hopper", block_m, block_n, warps, stages, split_k, tiles))
    return found


def default_config(packed: PackedWeight, m: int, dtype: torch.dtype) -> GemmConfig:
    """A configuration that works, for what no table knows."""
    if not (packed.weight.is_cuda and is_fusable(packed) and dtype in (torch.float16, torch.bfloat16)):
        return GemmConfig("dequantize")
    n, tiles = packed.out_features, packed.in_features // 128
    if not fits_hopper(packed, dtype):
        if m > 128:
            return GemmConfig("dequantize")
        block_m = max(16, power_of_2(m))
        programs = cdiv(n, 128)
        split_k = 1
        while programs * split_k < 100 and split_k < 8 and tiles >= 8 * split_k:
            split_k *= 2
        return GemmConfig("portable", block_m, 128, 8, 2, split_k)
    if m > 256:
        large = cdiv(m, 128) * cdiv(n, 256) >= 120
        return GemmConfig("hopper", 128, 256 if large else 128, 8, 4)
    block_m = min(max(8, power_of_2(m)), 128)
    programs = cdiv(m, block_m) * cdiv(n, 64)
    split_k = 1
    while programs * split_k < 200 and split_k < 8 and tiles >= 8 * split_k:
        split_k *= 2
    return GemmConfig("hopper", block_m, 64, 4, 4 if block_m < 128 else 3, split_k)


def gemm(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """`x W^T + bias`.

    Args:
        x: `[M, K]`, float16, bfloat16 or float32.
        packed: the weight, on x's device.
        bias: `[N]`, or None.
        out_dtype: x's where None.
        config: how; a sensible one where None. Replaced by "dequantize" where its kernel cannot compute this weight.

    Returns:
        `[M, N]`, accumulated in float32.
    """
    if x.is_cuda and torch.cuda.current_device() != x.device.index:
        with torch.cuda.device(x.device):
            return gemm(x, packed, bias, out_dtype, config=config)
    out_dtype = out_dtype or x.dtype
    config = config or default_config(packed, x.shape[0], x.dtype)
    fused = x.dtype in (torch.float16, torch.bfloat16) and x.numel() > 0
    if config.kernel == "hopper" and fused and fits_hopper(packed, x.dtype):
        return _hopper(x, packed, bias, out_dtype, config)
    if config.kernel == "portable" and fused and is_fusable(packed):
        return _portable(x, packed, bias, out_dtype, config)
    weight = _dense(packed, x.dtype)
    if bias is None:
        return torch.mm(x, weight.T).to(out_dtype)
    return torch.addmm(bias.to(x.dtype), x, weight.T).to(out_dtype)


def gemm_input_grad(grad: torch.Tensor, packed: PackedWeight, *, config: GemmConfig | None = None) -> torch.Tensor:
    """`grad W`, the gradient of the input, `[M, K]` from `[M, N]`: through the dense weight.

    Args:
        grad: `[M, N]`, float16, bfloat16 or float32.
        packed: the weight.
        config: not used yet by any kernel of this direction.

    Returns:
        `[M, K]` of grad's dtype.
    """
    if grad.is_cuda and torch.cuda.current_device() != grad.device.index:
        with torch.cuda.device(grad.device):
            return gemm_input_grad(grad, packed, config=config)
    return torch.mm(grad, _dense(packed, grad.dtype))


def _dense(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """`[N, K]`: a view of `[K, N]` where the columns are permuted, because that is written faster."""
    if packed.permutation is not None:
        return dequantize(packed, dtype, transposed=True).T
    return dequantize(packed, dtype)


def _output(m: int, n: int, split_k: int, out_dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a kernel fills: the result, or the parts of its sums."""
    if split_k == 1:
        return torch.empty(m, n, dtype=out_dtype, device=device)
    return torch.empty(split_k, m, n, dtype=torch.float32, device=device)


def _finish(filled: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    if filled.dim() == 2:
        return filled
    out = torch.empty(filled.shape[1:], dtype=out_dtype, device=filled.device)
    split_k, tokens, rows = filled.shape
    Sum(split_k, tokens, rows, out_dtype, bias, filled.device)(filled, bias, out)
    return out


def _split(config: GemmConfig, packed: PackedWeight) -> int:
    """No more programs along K than there are whole steps of `config.tiles` tiles, each with at least one."""
    steps = max(cdiv(packed.in_features // tile_width(packed.block_size), config.tiles), 1)
    share = cdiv(steps, min(config.split_k, steps))
    return cdiv(steps, share)


def _hopper(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype, config: GemmConfig
) -> torch.Tensor:
    strided = x.stride(0) % 8 or x.data_ptr() % 16  # the copy engine wants 16-byte rows
    if x.stride(1) != 1 or (packed.permutation is None and strided):
        x = x.clone(memory_format=torch.contiguous_format)
    found = HopperPlan(
        packed, x.shape[0], x.stride(0), tensor_class(x), out_dtype, bias, x.device, _split(config, packed), config
    )
    return found.run(x, bias)


def plan(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, config: GemmConfig) -> HopperPlan | None:
    """The launches of `gemm` for any x `[..., K]` of this one's size, made ready; None where it is not by "hopper".

    Args:
        x: contiguous and 16-byte aligned, as those that are to follow.
        packed: the weight.
        bias: `[N]`, or None.
        config: how.
    """
    if config.kernel != "hopper" or not x.numel() or not fits_hopper(packed, x.dtype):
        return None
    tokens, columns = x.numel() // packed.in_features, packed.in_features
    kind = (x.dtype, True)
    return HopperPlan(packed, tokens, columns, kind, x.dtype, bias, x.device, _split(config, packed), config)


def plan_group(
    x: torch.Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[torch.Tensor | None],
    configs: Sequence[GemmConfig],
    transform: Transform | None,
) -> HopperGroup | None:
    """`plan` of several weights of one input, all launches made ready; None where one of them is not by "hopper".

    Args:
        x: as in `plan`.
        weights: two or three, with the same number of columns, all of them with an order of columns or none.
        biases: `[N]` of each weight, or None; they stay where they are.
        configs: how each is computed.
        transform: what x goes through first; the weights have no order of columns then. Or None.
    """
    orders = {packed.permutation is None for packed in weights}
    if len(orders) > 1 or len(weights) > 3 or not x.numel():
        return None
    for packed, config in zip(weights, configs, strict=True):
        if config.kernel != "hopper" or packed.weight.device != x.device or not fits_hopper(packed, x.dtype):
            return None
    tokens = x.numel() // x.shape[-1]
    splits = [_split(config, packed) for config, packed in zip(configs, weights, strict=True)]
    return HopperGroup(weights, biases, tokens, x.dtype, x.device, splits, configs, transform)


def _portable(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, out_dtype: torch.dtype, config: GemmConfig
) -> torch.Tensor:
    if packed.permutation is not None:
        x = gather_columns(x, packed)
    elif x.stride(1) != 1:
        x = x.contiguous()
    split_k = _split(config, packed)
    filled = _output(x.shape[0], packed.out_features, split_k, out_dtype, x.device)
    args = arguments(packed)
    has_bias = bias is not None and split_k == 1
    constants = (has_bias, split_k, 8, not x.is_cuda, config.block_m, config.block_n)
    _gemm(
        (
            tensor_class(x),
            size_class(x.stride(0)),
            filled.dtype,
            None if bias is None else tensor_class(bias),
            constants,
            config.warps,
            config.stages,
            args.key,
        ),
        (cdiv(x.shape[0], config.block_m) * cdiv(packed.out_features, config.block_n), split_k, 1),
        (
            filled,
            x,
            filled if bias is None else bias,
            x.shape[0],
            x.stride(0),
            *args.tensors,
            *args.sizes,
            *args.constants.values(),
            *constants,
        ),
        x.device,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return _finish(filled, bias, out_dtype)
