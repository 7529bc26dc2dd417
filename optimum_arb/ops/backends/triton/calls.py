"""Calls of layers without a step of Python's interpreter, by `calls.c`, where that was built."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import native_launch, outputs
from .launch import current_device, hooked
from .outputs import Allocation


class Entry(NamedTuple):
    """A call that is ready for inputs of one shape, as `_calls` takes it.

    Attributes:
        shape: of the input.
        dtype: of the input.
        device: the number of the GPU.
        launches: of which `address` is the plan.
        address: see there.
        extra: an address that the launches read, of a tensor that is watched; or 0.
        results: allocations of the results.
        scratch: that of the scratch memory; or None.
        written: tensors that copies were made of and their versions then, in turns.
        one: whether the result is wanted, not a list of it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: int
    launches: native_launch.NativeLaunches
    address: int
    extra: int
    results: tuple[Allocation, ...]
    scratch: Allocation | None
    written: tuple[Any, ...]
    one: bool


def make_calls(watched: Sequence[tuple[dict[str, Any], str]]) -> Any:
    """A `_calls.Calls` without entries yet; None where it was not built.

    Args:
        watched: where the tensors stand that the launches read; a call is ready as long as these are there, at the
            same addresses.
    """
    library = native_launch.load()
    if library is None:
        return None
    try:
        from ._calls import Calls  # type: ignore[import-not-found]
    except ImportError:
        return None
    there = tuple((values, key, values[key]) for values, key in watched)
    function = ctypes.cast(library.arb_launch_at, ctypes.c_void_p).value
    return Calls(torch.Tensor, there, current_device, outputs.current_stream, outputs._empty, hooked, function)
