"""The dtypes of the float tensors of a binarized checkpoint, under transformers before 5.21.

Where a model comes with a quantizer and its weights are quantized already, those versions leave a tensor that the
model knows under another name than the checkpoint (the routers of Mixtral, everything that `AutoModel` takes from a
model with a head) in the dtype of the file, whatever `dtype` asks for. Since 5.21 `HfQuantizer.get_new_dtype` decides.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..nn import ARBExperts, ARBLinear


def expected_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype that each float tensor of a model is to load in: name -> dtype; none where transformers sees to it.

    Args:
        model: on the meta device, its binarized modules in their places. Their packed tensors are left out: they keep
            the dtype of the file.
    """
    if hasattr(HfQuantizer, "get_new_dtype"):
        return {}
    packed = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, (ARBLinear, ARBExperts))
        for key, tensor in module.named_parameters(recurse=False)
        if (key in module.packed_names() if isinstance(module, ARBExperts) else key != "bias")
    }
    plan = model._get_dtype_plan(model.config.dtype) if isinstance(model.config.dtype, torch.dtype) else {}
    dtypes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and id(tensor) not in packed:
            kept = [dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name)]
            dtypes[name] = kept[0] if kept else tensor.dtype
    return dtypes


def cast_loaded(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> None:
    """Casts what loaded in another dtype than expected, in place.

    An offloaded tensor is on the meta device; accelerate brings it back in the dtype that it has there.
    """
    if not dtypes:
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes and tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])
