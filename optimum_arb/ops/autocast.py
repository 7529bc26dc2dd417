"""What `torch.autocast` does to packed products.

A packed layer is cast for as `nn.Linear` is: its input to autocast's dtype, in which its result is, whatever the number
of rows. The operators below it compute in the dtype of the input that they are given, as ever: of the dense products
inside of them autocast would round some, by the number of rows, and leave others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# a fifth of the time of asking for a device by its name, which every call of a layer would
is_any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """x as autocast gives it to `nn.Linear`: in autocast's dtype; x itself where that is its own, where autocast is
    off, and in float64, which autocast leaves alone."""
    if x.is_meta or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x if dtype == x.dtype else x.to(dtype)


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function with autocast off; its first argument is a tensor, on the device that counts."""

    @functools.wraps(function)
    def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
        if x.is_meta or not is_any_autocast_enabled():
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run
