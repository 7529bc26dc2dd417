"""How much worse a model becomes when one of its linears is binarized: the rise of the KL divergence, one run for all.

To second order, the divergence of the model's next-token distribution from what it was rises by

    1/2 E[(g . d)^2]

where `d` is the error of the linear's outputs at a token and `g` the gradient, with respect to these outputs, of the
sum of `log p(label)` over the sequence, its labels drawn from the model's own distribution (Fisher information; the
products of different tokens, which are as often negative as positive, are left out). So one forward and one backward
run of the float model tell it of every linear and of every form that was tried for it, without a label.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..nn import ARBLinear


def divergences(
    model: PreTrainedModel,
    trials: Mapping[str, Sequence[ARBLinear]],
    batches: Sequence[torch.Tensor | Mapping[str, Any]],
    device: torch.device | str,
    seed: int,
) -> dict[str, list[float]]:
    """The rise of the divergence, in nats a token, by name of a linear, for each of the forms tried for it.

    Args:
        model: the float model in evaluation mode, on the CPU, where it is put back.
        trials: name of a linear -> binarized forms of it, on `device` or, slower, the CPU.
        batches: token ids int64 `[B, L]`, or other inputs of the model's `forward` by their names.
        device: where the model runs, all of it, with the activations of one batch.
        seed: of the labels.

    Raises:
        ValueError: the model puts out no logits, or such that are not finite; or a gradient is not finite.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    sums = {name: torch.zeros(len(forms), dtype=torch.float64) for name, forms in trials.items()}
    count = 0
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nn.Module.to(model, device)
    try:
        with ExitStack() as stack, torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for parameter in frozen:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            for name, forms in trials.items():
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(_hook(module, forms, sums[name])).remove)
            for batch in batches:
                count += _backward(model, batch, device, generator)
    finally:
        nn.Module.to(model, "cpu")
    for name, values in sums.items():
        if not torch.isfinite(values).all():
            raise ValueError(
                f"{name}: the gradients that reach it hold NaN or Inf, so that bits cannot be divided by them. Load "
                "the model in another dtype (float32 or bfloat16 instead of float16), or give the bits as overrides."
            )
    return {name: (values / (2 * count)).tolist() for name, values in sums.items()}


def _hook(module: nn.Module, forms: Sequence[ARBLinear], sums: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Adds `(g . d)^2` of every token to `sums`, one for each form, when the gradient of an output is known."""

    def forward(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:  # nothing before it has a gradient
            output = output.detach().requires_grad_()
        inputs = args[0].detach().clone()  # what follows in the model may write into it

        def backward(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                rows = inputs.reshape(-1, inputs.shape[-1]).float()
                slopes = gradient.reshape(-1, gradient.shape[-1]).float()
                weight = module.get_parameter("weight").float()
                weight = weight.T if type(module) is Conv1D else weight
                for index, form in enumerate(forms):
                    lost = weight - form.dequantize(torch.float32).to(weight.device)
                    sums[index] += ((rows @ lost.T) * slopes).sum(1).double().square().sum().cpu()

        output.register_hook(backward)
        return output

    return forward


def _backward(
    model: PreTrainedModel, batch: torch.Tensor | Mapping[str, Any], device: torch.device, generator: torch.Generator
) -> int:
    """Runs the model on a batch, forth and back; returns how many distributions it put out."""
    known = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    inputs |= {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    if isinstance(batch, torch.Tensor) and getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = batch
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    logits = getattr(model(**inputs), "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"{type(model).__name__} puts out no logits, by which the bits could be divided: load it with its head, "
            "or give the bits as overrides."
        )
    logs = logits.reshape(-1, logits.shape[-1]).float().log_softmax(1)
    shares = logs.detach().exp()
    if not bool(shares.isfinite().all()):
        raise ValueError(
            f"{type(model).__name__} puts out NaN or Inf, so that bits cannot be divided by its predictions: its "
            "embedding, norms or output layer hold such, or its activations overflow. Check the checkpoint, load it in "
            "another dtype (float32 or bfloat16 instead of float16), or give the bits as overrides."
        )
    labels = torch.multinomial(shares, 1, generator=generator)
    logs.gather(1, labels).sum().backward()
    return len(labels)
