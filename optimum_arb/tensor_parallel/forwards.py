"""Forwards of packed modules of which each rank has a part: what the ranks exchange around them, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..nn import ARBExperts, ARBLinear

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it


class _SumGradients(torch.autograd.Function):
    """x as it is; its gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' x; every rank has the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """The ranks' x side by side along the last dimension; the gradient is cut again, summed over the ranks if asked."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, size: int, sum_gradients: bool) -> torch.Tensor:
        ctx.group, ctx.width, ctx.sum_gradients = group, _width(size, group), sum_gradients
        return _gathered(x, group, size)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        grad = grads[0]
        if ctx.sum_gradients:
            grad = grad.contiguous()
            dist.all_reduce(grad, group=ctx.group)
        start = min(ctx.width * dist.get_rank(ctx.group), grad.shape[-1])
        return grad[..., start : start + ctx.width].contiguous(), None, None, None


def _width(size: int, group: Any) -> int:
    """How many of `size` a rank holds; the last ranks may hold fewer. As `DTensor` divides."""
    return -(-size // dist.get_world_size(group))


def _gathered(x: torch.Tensor, group: Any, size: int) -> torch.Tensor:
    """The ranks' x side by side, `[..., size]`."""
    ranks, width = dist.get_world_size(group), _width(size, group)
    if x.shape[-1] < width:
        x = nn.functional.pad(x, (0, width - x.shape[-1]))
    x = x.contiguous()
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:]) if x.dim() > 1 else x.new_empty(ranks * x.shape[0])
    _all_gather(out, x, group=group)
    out = out.view(ranks, *x.shape).movedim(0, -2).flatten(-2)
    # the padding lies at the end of each rank's part, and only the last parts have any
    if ranks * width != size:
        parts = [out[..., rank * width : min((rank + 1) * width, size)] for rank in range(ranks)]
        out = torch.cat([part for part in parts if part.shape[-1]], -1)
    return out


def _has_grad(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _plain(x: torch.Tensor, size: int) -> tuple[torch.Tensor, bool]:
    """A module's input as a plain tensor, and whether it is this rank's part alone."""
    if hasattr(x, "placements"):
        from torch.distributed.tensor import Replicate

        x = x.redistribute(placements=[Replicate()] * x.device_mesh.ndim).to_local()  # type: ignore[attr-defined]
    return x, x.shape[-1] != size


def divided_rows(module: ARBLinear, mesh: Any, gather_input: bool, gather_output: bool) -> Callable[..., torch.Tensor]:
    """The forward of a linear of which each rank has some rows."""
    own, group = module.forward, mesh.get_group()
    inputs, outputs = module.in_features, module.out_features

    def forward(x: torch.Tensor) -> torch.Tensor:
        x, part = _plain(x, inputs)
        if gather_input and part:
            x = _Gather.apply(x, group, inputs, True) if _has_grad(x) else _gathered(x, group, inputs)
        elif _has_grad(x):
            x = _SumGradients.apply(x, group)
        out = own(x)
        if not gather_output:
            return out
        return _Gather.apply(out, group, outputs, False) if _has_grad(out) else _gathered(out, group, outputs)

    return forward


def divided_columns(module: ARBLinear, mesh: Any, split_input: bool) -> Callable[..., torch.Tensor]:
    """The forward of a linear of which each rank has some columns. The bias is added once, to the sum."""
    own, group = module.forward, mesh.get_group()
    inputs = module.in_features
    width = inputs // mesh.size()
    start = width * mesh.get_local_rank()

    def forward(x: torch.Tensor) -> torch.Tensor:
        x, part = _plain(x, inputs)
        if not part and (split_input or width != inputs):
            x = _SumGradients.apply(x, group) if _has_grad(x) else x
            x = x[..., start : start + width]
        bias = module._parameters["bias"]
        module._parameters["bias"] = None
        try:
            out = own(x)
        finally:
            module._parameters["bias"] = bias
        if _has_grad(out):
            out = _Sum.apply(out, group)
        else:
            out = out.contiguous()
            dist.all_reduce(out, group=group)
        return out if bias is None else out + bias.to(out.dtype)

    return forward


def divided_experts(module: ARBExperts, mesh: Any) -> Callable[..., torch.Tensor]:
    """The forward of experts of which each rank has some, whole ones."""
    own, group = module.forward, mesh.get_group()
    width = -(-module.num_experts // mesh.size())
    start = width * mesh.get_local_rank()
    count = max(0, min(width, module.num_experts - start))

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if _has_grad(hidden):
            hidden = _SumGradients.apply(hidden, group)
        if _has_grad(weights):
            weights = _SumGradients.apply(weights, group)
        elsewhere = (index < start) | (index >= start + count)
        out = own(hidden, (index - start).masked_fill(elsewhere, count), weights.masked_fill(elsewhere, 0.0))
        if _has_grad(out):
            return _Sum.apply(out, group)
        out = out.contiguous()
        dist.all_reduce(out, group=group)
        return out

    return forward
