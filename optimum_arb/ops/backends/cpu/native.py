"""The native kernels: finds and loads the shared object that setup.py builds from native.c, and calls it."""

from __future__ import annotations

import ctypes
import importlib.machinery
import warnings
from functools import cache, lru_cache
from pathlib import Path

import torch

from ..packed import PackedWeight
from .plan import Plan, Tiles, plan_for

LANES = 16
# Signs that one thread sums in about 5 microseconds, which is what waking another one costs.
_SIGNS_PER_THREAD = 2**18
_SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Term(ctypes.Structure):
    _fields_ = (
        ("planes", ctypes.c_int32),
        ("row", ctypes.c_int32),
        ("variant", ctypes.c_int32),
        ("factor", ctypes.c_float),
    )


class _Problem(ctypes.Structure):
    """`problem_t` of native.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "row_scale", "columns", "sums", "terms", "scales", "out")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "m", "out_stride", "row_bytes", "tiles", "tiles_per_block", "blocks")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("scale_type", "row_scales", "variants", "term_count", "planes", "tile_bytes", "last_bytes")
        ),
        ("threads", ctypes.c_int32),
    )


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The native kernels, or None, with one warning, where they were not built or cannot be loaded."""
    reason = "it was not built"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_native" + suffix)
        if path.exists():
            try:
                return _open(path)
            except OSError as error:
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
    for function in (library.arb_linear, library.arb_dequantize):
        function.argtypes = (ctypes.POINTER(_Problem), ctypes.c_int)
        function.restype = None
    library.arb_instruction_set.restype = ctypes.c_int
    return library


@lru_cache(maxsize=1)
def best_instruction_set() -> int:
    """0 what the compiler assumes, 1 AVX2, 2 AVX-512BW; 0 without the native kernels."""
    library = load()
    return library.arb_instruction_set() if library is not None else 0


@cache
def _terms(name: str) -> ctypes.Array:
    terms = plan_for(name).terms
    return (_Term * len(terms))(*(_Term(t.planes, t.row, t.variant, t.factor) for t in terms))


def linear(
    columns: torch.Tensor, packed: PackedWeight, plan: Plan, tiles: Tiles, instruction_set: int | None = None
) -> torch.Tensor:
    """Sums the plan's terms for every row of x.

    Args:
        columns: float32 `[M, variants, tiles, 8, 16]`, contiguous, from `prepare_columns`.
        packed: the weight.
        plan: its plan.
        tiles: its geometry with 16 lanes.
        instruction_set: one below `best_instruction_set`, for tests.

    Returns:
        float32 `[M, N]`.
    """
    out = torch.empty(columns.shape[0], packed.out_features)
    _call("arb_linear", columns, columns.sum(3), packed, plan, tiles, out, instruction_set)
    return out


def dequantize(
    columns: torch.Tensor,
    packed: PackedWeight,
    plan: Plan,
    tiles: Tiles,
    out: torch.Tensor,
    instruction_set: int | None = None,
) -> torch.Tensor:
    """The plan's terms as a weight, in the order of `Tiles.split`, written to `out`, float32 `[N, tiles * 128]`.

    `columns` are those of a row of ones.
    """
    _call("arb_dequantize", columns, columns, packed, plan, tiles, out, instruction_set)
    return out


def _call(
    function: str,
    columns: torch.Tensor,
    sums: torch.Tensor,
    packed: PackedWeight,
    plan: Plan,
    tiles: Tiles,
    out: torch.Tensor,
    instruction_set: int | None,
) -> None:
    library = load()
    assert library is not None
    if not out.numel():
        return
    weight, row_scale = packed.weight.contiguous(), packed.row_scale.contiguous()
    if row_scale.dtype not in _SCALE_TYPES:
        row_scale = row_scale.float()
    m, rows = columns.shape[0], packed.out_features
    work = m * rows * tiles.count * tiles.width * len(plan.terms)
    threads = max(1, min(torch.get_num_threads(), rows, work // _SIGNS_PER_THREAD))
    scales = torch.empty(threads, tiles.blocks * packed.layout.row_scales)
    problem = _Problem(
        weight=weight.data_ptr(),
        row_scale=row_scale.data_ptr(),
        columns=columns.data_ptr(),
        sums=sums.data_ptr(),
        terms=ctypes.addressof(_terms(packed.layout.name)),
        scales=scales.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        m=m,
        out_stride=rows,
        row_bytes=weight.shape[1],
        tiles=tiles.count,
        tiles_per_block=tiles.per_block,
        blocks=tiles.blocks,
        scale_type=_SCALE_TYPES[row_scale.dtype],
        row_scales=packed.layout.row_scales,
        variants=len(plan.variants),
        term_count=len(plan.terms),
        planes=packed.layout.planes,
        tile_bytes=tiles.width // 8,
        last_bytes=tiles.last_bytes,
        threads=threads,
    )
    best = best_instruction_set()
    chosen = best if instruction_set is None else min(best, instruction_set)
    getattr(library, function)(ctypes.byref(problem), chosen)
