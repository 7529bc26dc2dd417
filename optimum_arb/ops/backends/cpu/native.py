"""The native kernels: finds and loads the shared object that setup.py builds from native.c, and calls it."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path

import torch

from ....format.layout import layout_from_name
from ....format.packing import packed_bytes
from ..packed import PackedWeight
from .operands import TYPES, check, ready, ready_tensor
from .plan import Plan, Tiles, full_plan_for, plan_for, tiles_for
from .structures import Dequantize, Gemm, Linear, Term, Variant

LANES = 16
# Signs that one thread sums in about 5 microseconds, which is what waking another one costs.
_SIGNS_PER_THREAD = 2**18
# In a process that was forked: OpenMP's threads are the parent's and do not exist here, so that waiting for them never
# ends (torch's own products hang likewise; its data loaders set one thread for that).
_forked = False
_ZONES = {"all": 0, "rest": 1, "salient": 2}


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(work: int, most: int | None = None) -> int:
    """Threads for this many signs to sum: those that torch may use, no more than `most`, and not after a fork."""
    if _forked:
        return 1
    available = torch.get_num_threads() if most is None else min(torch.get_num_threads(), most)
    return max(1, min(available, work // _SIGNS_PER_THREAD))


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The native kernels, or None, with one warning, where they were not built or cannot be loaded."""
    reason = "it was not built"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_native" + suffix)
        if path.exists():
            try:
                return _open(path)
            except (OSError, AttributeError) as error:  # no library, or one of another version of this package
                reason = f"it cannot be loaded ({error})"
    warnings.warn(
        f"The native extension of optimum_arb is missing: {reason}. Packed layers run on the CPU in plain torch, "
        "several times slower. Install a C compiler (gcc), then: "
        "pip install --force-reinstall --no-deps --no-cache-dir --no-binary optimum-arb optimum-arb",
        stacklevel=2,
    )
    return None


def _open(path: Path) -> ctypes.CDLL:
    """Loads the object; its OpenMP symbols are those of the library that torch has loaded for all to see."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        # a torch that keeps its OpenMP library to itself: load one (the same file where the name is the same)
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    library.arb_linear.argtypes = (ctypes.POINTER(Linear), ctypes.c_int)
    library.arb_linear.restype = ctypes.c_int
    library.arb_dequantize.argtypes = (ctypes.POINTER(Dequantize), ctypes.c_int)
    library.arb_dequantize.restype = None
    library.arb_gemm.argtypes = (ctypes.POINTER(Gemm), ctypes.c_int)
    library.arb_gemm.restype = ctypes.c_int
    library.arb_kernel_name.restype = ctypes.c_char_p
    return library


@lru_cache(maxsize=1)
def kernels() -> dict[str, int]:
    """The kernels that this machine can run, from the slowest to the fastest, by name; none without the extension."""
    library = load()
    if library is None:
        return {}
    found = {library.arb_kernel_name(i).decode(): i for i in range(library.arb_kernel_count())}
    return {name: index for name, index in found.items() if library.arb_supported(index)}


@lru_cache(maxsize=1)
def best_kernel() -> str:
    """The fastest kernel of this machine: "amx", "avx512-bf16", "avx512-vnni", "avx-vnni", "avx2", "dotprod", "neon" or
    "portable"."""
    return list(kernels())[-1]


@cache
def _plan(name: str) -> tuple[ctypes.Array, ctypes.Array]:
    """Variants and terms of the layout of this name."""
    layout, plan = layout_from_name(name), full_plan_for(name)
    variants = []
    for col, zone in plan.variants:
        own = col is not None and col >= layout.col_scales
        index = -1 if col is None else col - layout.col_scales * own
        variants.append(Variant(index, own, _ZONES[zone]))
    return (Variant * len(variants))(*variants), _terms(plan)


def _terms(plan: Plan) -> ctypes.Array:
    return (Term * len(plan.terms))(*(Term(t.planes, t.row, t.variant, t.factor) for t in plan.terms))


@cache
def _dequantize_terms(name: str) -> ctypes.Array:
    return _terms(plan_for(name))


@lru_cache(maxsize=4096)
def _described(
    name: str,
    block_size: int,
    rows: int,
    columns: int,
    salient: int,
    types: tuple[torch.dtype | None, ...],
) -> bytes:
    """The part of a `Linear` that does not change from call to call; `types` are those of its `_type` fields, then of
    the permutation and the salient columns."""
    layout, tiles = layout_from_name(name), tiles_for(columns, block_size, LANES)
    variants, terms = _plan(name)
    x, row, col, own, bias = (TYPES[torch.float32 if dtype is None else dtype] for dtype in types[:5])
    permutation, index = (0 if dtype is None else dtype.itemsize for dtype in types[5:])
    return bytes(
        Linear(
            variants=ctypes.addressof(variants),
            terms=ctypes.addressof(terms),
            rows=rows,
            columns=columns,
            salient=salient,
            row_bytes=layout.planes * packed_bytes(columns, tiles.width),
            salient_bytes=layout.salient_planes * packed_bytes(salient, tiles.width),
            tiles=tiles.count,
            tiles_per_block=tiles.per_block,
            blocks=tiles.blocks,
            x_type=x,
            row_scale_type=row,
            col_scale_type=col,
            salient_col_scale_type=own,
            bias_type=bias,
            permutation_bytes=permutation,
            salient_columns_bytes=index,
            planes=layout.planes,
            row_scales=layout.row_scales,
            variant_count=len(variants),
            term_count=len(terms),
            width=tiles.width,
            last_bytes=tiles.last_bytes,
            digits=3 if types[0] == torch.float32 else 2,
        )
    )


class LinearPlan:
    """`x W^T + bias` for inputs of one number of rows and one dtype, ready to run: a call fills in what changes.

    Args:
        rows: of x, its leading dimensions flattened.
        dtype: of x: float32, bfloat16 or float16.
        packed: the weight, its tensors contiguous and of dtypes that the kernels read (`operands.ready`).
        bias: one like those of all calls, ready too, or None.
        kernel: one of `kernels()`.

    Raises:
        ValueError: a tensor is on another device, or has another number of elements than this weight's.
    """

    __slots__ = ("_index", "_kept", "_library", "_out_features", "_problem", "_work")

    def __init__(self, rows: int, dtype: torch.dtype, packed: PackedWeight, bias: torch.Tensor | None, kernel: str):
        check(packed, bias)
        library = load()
        assert library is not None
        self._library, self._index = library, kernels()[kernel]
        name = packed.layout.name
        # in the order of the pointers of `Linear`, from the second on
        self._kept = (
            packed.weight,
            packed.row_scale,
            packed.col_scale,
            packed.permutation,
            packed.salient_columns,
            packed.salient_weight,
            packed.salient_col_scale,
        )
        kinds = [None if tensor is None else tensor.dtype for tensor in self._kept]
        types = (dtype, kinds[1], kinds[2], kinds[6], None if bias is None else bias.dtype, kinds[3], kinds[4])
        salient = 0 if packed.salient_columns is None else packed.salient_columns.shape[-1]
        self._out_features = packed.out_features
        described = _described(name, packed.block_size, packed.out_features, packed.in_features, salient, types)
        problem = Linear.from_buffer_copy(described)
        for field, tensor in zip(_POINTERS, self._kept, strict=True):
            if tensor is not None:
                setattr(problem, field, tensor.data_ptr())
        problem.m = rows
        self._work = rows * packed.out_features * packed.in_features * problem.term_count
        self._problem = bytes(problem)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[..., N]` of the dtype of x, for x and bias as they were announced, contiguous."""
        out = x.new_empty((*x.shape[:-1], self._out_features))
        problem = Linear.from_buffer_copy(self._problem)  # another thread may run the same layer
        problem.x, problem.out, problem.threads = x.data_ptr(), out.data_ptr(), _threads(self._work)
        if bias is not None:
            problem.bias = bias.data_ptr()
        if self._library.arb_linear(ctypes.byref(problem), self._index):
            raise MemoryError(f"No memory for the digits of an input of {list(x.shape)}: pass fewer rows at once.")
        return out


# Of a `Linear`, those to the tensors that a plan keeps.
_POINTERS = tuple(field[0] for field in Linear._fields_ if field[1] is ctypes.c_void_p)[1:8]


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, kernel: str | None = None) -> torch.Tensor:
    """`x W^T + bias` straight from the packed bits.

    Args:
        x: float32, bfloat16 or float16 `[M, K]`.
        packed: the weight.
        bias: `[N]`, or None.
        kernel: one of `kernels()`; the best one where it is None.

    Returns:
        `[M, N]` of x's dtype.
    """
    if not x.shape[0] or not packed.out_features:
        return x.new_empty(x.shape[0], packed.out_features)
    bias = ready_tensor(bias)
    name = best_kernel() if kernel is None else kernel
    return LinearPlan(x.shape[0], x.dtype, ready(packed), bias, name).run(x.contiguous(), bias)


def gemm(x: torch.Tensor, packed: PackedWeight, columns: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + bias` of many rows, W rounded to bfloat16; only where `kernels()` has "avx512-bf16".

    Args:
        x: bfloat16 `[M, K]`.
        packed: the weight. What the salient columns alone have is left out.
        columns: as in `dequantize`.
        bias: `[N]`, or None.

    Returns:
        bfloat16 `[M, N]`.
    """
    library = load()
    assert library is not None
    rows = packed.out_features
    out = x.new_empty(x.shape[0], rows)
    if not out.numel():
        return out
    x, permutation, bias = x.contiguous(), ready_tensor(packed.permutation), ready_tensor(bias)
    tiles = tiles_for(packed.in_features, packed.block_size, LANES)
    weight, kept = _dequantize_problem(columns, packed, tiles, bias)
    weight.threads = _threads(x.shape[0] * rows * packed.in_features, (rows + 31) // 32)
    problem = Gemm(
        weight=weight,
        x=x.data_ptr(),
        permutation=None if permutation is None else permutation.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        m=x.shape[0],
        columns=packed.in_features,
        permutation_bytes=0 if permutation is None else permutation.dtype.itemsize,
        bias_type=0 if bias is None else TYPES[bias.dtype],
    )
    if library.arb_gemm(ctypes.byref(problem), kernels()[best_kernel()]):
        raise MemoryError(f"No memory for an input of {x.shape[0]} x {packed.in_features}: pass fewer rows at once.")
    del kept
    return out


def dequantize(
    columns: torch.Tensor,
    packed: PackedWeight,
    tiles: Tiles,
    out: torch.Tensor,
    kernel: str | None = None,
) -> torch.Tensor:
    """The plan's terms as a weight, in the order of `Tiles.split`, written to `out`, float32 `[N, tiles * 128]`.

    Args:
        columns: float32 `[1, variants, tiles, 8, 16]`, contiguous, from `prepare_columns` of a row of ones.
        packed: the weight.
        tiles: its geometry with 16 lanes.
        out: where the weight goes.
        kernel: one of `kernels()`; the best one where it is None.
    """
    library = load()
    assert library is not None
    if not out.numel():
        return out
    problem, kept = _dequantize_problem(columns, packed, tiles)
    problem.threads = _threads(
        packed.out_features * tiles.count * tiles.width * problem.term_count, packed.out_features
    )
    scales = columns.new_empty(problem.threads, tiles.blocks * packed.layout.row_scales)
    problem.scales, problem.out = scales.data_ptr(), out.data_ptr()
    library.arb_dequantize(ctypes.byref(problem), kernels()[best_kernel() if kernel is None else kernel])
    del kept
    return out


def _dequantize_problem(
    columns: torch.Tensor, packed: PackedWeight, tiles: Tiles, bias: torch.Tensor | None = None
) -> tuple[Dequantize, tuple[torch.Tensor, ...]]:
    """What is the same for every way to dequantize, and the tensors that it points to and the caller keeps alive."""
    check(packed, bias)
    weight, row_scale = ready_tensor(packed.weight), ready_tensor(packed.row_scale)
    assert weight is not None
    assert row_scale is not None
    terms = _dequantize_terms(packed.layout.name)
    problem = Dequantize(
        weight=weight.data_ptr(),
        row_scale=row_scale.data_ptr(),
        columns=columns.data_ptr(),
        terms=ctypes.addressof(terms),
        rows=packed.out_features,
        row_bytes=weight.shape[1],
        tiles=tiles.count,
        tiles_per_block=tiles.per_block,
        blocks=tiles.blocks,
        row_scale_type=TYPES[row_scale.dtype],
        row_scales=packed.layout.row_scales,
        term_count=len(terms),
        planes=packed.layout.planes,
        tile_bytes=tiles.width // 8,
        last_bytes=tiles.last_bytes,
    )
    return problem, (weight, row_scale, columns)
