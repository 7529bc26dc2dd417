"""Quantizers of other packages, for comparison: their weights in a plain model, and their true bits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import ARBConfig
from ..modules import linear_shape, select_modules

HQQ_GROUP = 64


@torch.no_grad()
def quantize_hqq(model: PreTrainedModel, bits: int) -> dict[str, Any]:
    """Rounds the linears that optimum_arb would binarize with HQQ (data-free), in place.

    Groups of 64 columns, HQQ's default, with scales and zero points in float16; the weights are then dequantized, so
    the model runs in plain torch.

    Args:
        model: a float model.
        bits: bits of a code: 1, 2, 3, 4 or 8.

    Returns:
        `bits_per_weight` (codes, scales and zero points), `packed_bytes` and `modules`.

    Raises:
        ImportError: the package `hqq` is not installed.
        ValueError: a linear whose weights 64 does not divide.
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise ImportError(f"The peer hqq needs the package of that name ({error}): pip install hqq") from None
    selection = select_modules(model, ARBConfig(dataset=None))
    if any(name in selection.experts for name in selection.convert):
        raise ValueError("The peer hqq rounds linears alone, and this model has experts in tensors of their own.")
    names = list(selection.convert)
    stored = weights = 0
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if weight.numel() % HQQ_GROUP:
            raise ValueError(f"{name}: its {weight.numel()} weights are not groups of {HQQ_GROUP}, as HQQ wants.")
        codes, meta = Quantizer.quantize(
            weight.detach().float(), bits, group_size=HQQ_GROUP, axis=1, device=str(weight.device),
            compute_dtype=torch.float32,
        )  # fmt: skip
        for key in ("scale", "zero"):
            rounded = meta[key].half()
            stored += rounded.numel() * rounded.element_size()
            meta[key] = rounded.float()
        stored += codes.numel() * codes.element_size()
        weight.data = Quantizer.dequantize(codes, meta).reshape(weight.shape).to(weight.dtype)
        rows, columns = linear_shape(module)
        weights += rows * columns
    return {"bits_per_weight": 8 * stored / weights, "packed_bytes": stored, "modules": len(names)}
