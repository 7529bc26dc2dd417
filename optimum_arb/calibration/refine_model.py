"""The last pass of refinement: scales and norms of a whole binarized model, tuned to the float model's predictions.

Layer by layer, an error counts by its size in the hidden states; here it counts by what it does to the distribution of
the next token. The float model is gone by then, but for what came out of its last layer: its logits follow from that
batch by batch, through the final norm and the head as they were.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .calls import hidden_states, like, replaced_forwards
from .layers import Layers
from .tuning import Refinement, RefineSettings, computing_in_float32, split_batches, swapped, tune


def refine_model(
    model: PreTrainedModel,
    chain: Layers,
    batches: Sequence[torch.Tensor | Mapping[str, Any]],
    float_outputs: Sequence[torch.Tensor],
    settings: RefineSettings,
    device: torch.device | str = "cpu",
) -> Refinement:
    """Tunes all scales, means, norms and biases of a binarized model in place; signs stay.

    The loss is the divergence of the model's distributions from the float model's, in nats: the mean over the tokens of
    KL(float || binarized). Layers are computed again for their gradients, so that the activations of one layer are in
    memory at a time; the signs of the whole model are, a byte each.

    Args:
        model: the binarized model; it is on the CPU before and after.
        chain: its layers, as `CalibrationWalk.chain` has them.
        batches: the calibration batches.
        float_outputs: what came out of the float model's last layer, batch by batch.
        settings: how; `sign_learning_rate` does not count.
        device: where the model is trained; it must hold it as a whole.

    Raises:
        ValueError: fewer than two batches, a model without logits, or a loss that is not finite.
    """
    start = time.perf_counter()
    device = torch.device(device)
    train, held = split_batches(len(batches), settings.held_out)
    in_layers = {id(p) for layer in chain.modules for p in layer.parameters()}
    move(model, device)
    try:
        with computing_in_float32(model) as stored, swapped(model, settings.sign_learning_rate > 0) as twins:
            outside = [p for p in model.parameters() if p.ndim <= 1 and id(p) not in in_layers]
            of_float = [p.detach().clone() for p in outside]
            last = len(chain.modules) - 1
            forms = [seen[0][1] for seen in chain.seen]

            def hand_on(index: int, batch: int) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    hidden = hidden_states(args, kwargs)
                    if index == last:
                        assert hidden is not None
                        hidden = float_outputs[batch].to(hidden)
                    return like(forms[index], hidden)

                return forward

            @torch.no_grad()
            def float_logits(batch: int) -> torch.Tensor:
                forwards = [hand_on(index, batch) for index in range(last + 1)]
                with holding(outside, of_float), replaced_forwards(chain.modules, forwards):
                    return logits(model, batches[batch], device)

            computed_again = [_computed_again(layer) for layer in chain.modules]

            def loss(batch: int) -> torch.Tensor:
                wanted = float_logits(batch)
                with replaced_forwards(chain.modules, computed_again):
                    found = logits(model, batches[batch], device)
                return divergence(found, wanted, batches[batch])

            result = tune(model, twins, loss, train, held, settings, "the model", stored)
    finally:
        move(model, torch.device("cpu"))
    return replace(result, seconds=time.perf_counter() - start)


def logits(model: PreTrainedModel, batch: torch.Tensor | Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """The logits of a calibration batch, `[..., V]` in float32.

    Raises:
        ValueError: the model has none.
    """
    inputs: dict[str, Any] = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    inputs = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs |= {"use_cache": False}
    found = getattr(model(**inputs), "logits", None)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{type(model).__name__} puts out no logits to refine by: use refine='block'.")
    return found.float()


def divergence(
    found: torch.Tensor, wanted: torch.Tensor, batch: torch.Tensor | Mapping[str, Any] | None = None
) -> torch.Tensor:
    """KL(wanted || found) of distributions given by their logits `[..., V]`, in nats: the mean over the tokens, those
    left out that an attention mask `[B, L]` in the batch marks as padding."""
    wanted = wanted.log_softmax(-1)
    each = (wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.shape == each.shape:
        mask = mask.to(each)
        return (each * mask).sum() / mask.sum().clamp_min(1)
    return each.mean()


def move(model: nn.Module, device: torch.device) -> None:
    """As `model.to(device)`."""
    nn.Module.to(model, device)


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """The parameters have these values inside this context."""
    own = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def _computed_again(layer: nn.Module) -> Callable[..., Any]:
    """The layer's forward, which keeps its inputs alone and is run again for the gradients."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(own, *args, use_reentrant=False, **kwargs)

    return forward
