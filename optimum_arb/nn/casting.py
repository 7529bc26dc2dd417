"""Casting a module without its packed tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def keep_dtype(
    fn: Callable[[torch.Tensor], torch.Tensor], packed: Iterable[torch.Tensor | None]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `nn.Module._apply` does to each tensor, without a change of dtype for the packed ones: they are moved alone.

    A cast would cost the scales digits, and the files have them in float16 or float32.

    Args:
        fn: as `nn.Module._apply` gets it.
        packed: the tensors to keep.
    """
    kept = {id(tensor) for tensor in packed}

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

    return apply
