"""The tokens of a mixture sorted by the experts that they were routed to, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routed(NamedTuple):
    """Which expert gets which token: a row for each of the k experts of each of T tokens, sorted by expert.

    Attributes:
        rows: int64 `[T k]`, the token of each row.
        offsets: int64 `[E]`: the rows of expert e are `offsets[e - 1]` to `offsets[e]`.
        owner: `[T k]`, the expert of each row; the last one for rows of none, which come last.
        none: bool `[T k, 1]`, rows of no expert.
        order: int64 `[T k]`, the place of each row in `top_k_index`, flattened.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    owner: torch.Tensor
    none: torch.Tensor
    order: torch.Tensor


def route(top_k_index: torch.Tensor, num_experts: int) -> Routed:
    """Sorts tokens by expert.

    Args:
        top_k_index: integer `[T, k]`, the experts of each token; numbers of E and above stand for none.
        num_experts: E.
    """
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, numbers, right=True)
    none = (experts >= num_experts)[:, None]
    return Routed(order // top_k_index.shape[1], offsets, experts.clamp(max=num_experts - 1), none, order)


def weighted_sum(out: torch.Tensor, routed: Routed, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The sum over each token's experts, in a fixed order, `[T, H]` of the wider dtype of the two.

    Args:
        out: `[T k, H]`, of each row of `routed`.
        routed: see above.
        top_k_weights: `[T, k]`.
    """
    tokens, k = top_k_weights.shape
    weights = top_k_weights.reshape(-1)[routed.order][:, None].masked_fill(routed.none, 0.0)
    return (out * weights)[routed.order.argsort()].view(tokens, k, out.shape[-1]).sum(1)
