"""Which ggml type holds a tensor, and by how much it differs from the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..format.packing import BinarizedWeight
from .blocks import BLOCKS, decode_blocks, sign_blocks

FLOAT_TYPES = ("auto", "F32", "F16", "BF16", "Q8_0")


@dataclass
class Encoded:
    """A tensor as the file holds it.

    Attributes:
        kind: the name of its ggml type.
        data: float32, float16, or uint8 rows of blocks.
        difference: Frobenius norm of what the file's values differ from the tensor's, over the tensor's norm; 0 is
            exact.
        reason: why the type is not Q1_0, for a binarized weight; else empty.
    """

    kind: str
    data: np.ndarray
    difference: float
    reason: str = ""


def encode_float(tensor: torch.Tensor, kind: str = "auto") -> Encoded:
    """A float tensor, in the type asked for, or in the narrowest of Q8_0, F16, BF16 and F32 that is exact.

    Args:
        tensor: `[..., K]`, any float dtype.
        kind: of `FLOAT_TYPES`. Q8_0 holds rows of a multiple of 32 columns; others become F16.
    """
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    if kind == "auto":
        for name in ("Q8_0", "F16", "BF16"):
            # a few rows tell most types apart; embeddings are large
            if values.dim() != 2 or encode_float(values[:16], name).difference == 0:
                encoded = encode_float(values, name)
                if encoded.difference == 0:
                    return encoded
        kind = "F32"
    if kind == "Q8_0" and values.shape[-1] % 32:
        kind = "F16"
    if kind == "F32":
        return Encoded(kind, values.numpy(), 0.0)
    if kind == "F16":
        data = values.to(torch.float16)
        return Encoded(kind, data.numpy(), relative_difference(values, data.float()))
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    blocks = quantize(values.numpy(), GGMLQuantizationType[kind])
    stored = torch.from_numpy(np.ascontiguousarray(dequantize(blocks, GGMLQuantizationType[kind])))
    return Encoded(kind, blocks, relative_difference(values, stored))


def encode_binarized(weight: BinarizedWeight, float_type: str = "auto") -> Encoded:
    """A binarized weight: Q1_0 where that is exact, else the narrowest exact type, else F16 and its difference.

    Args:
        weight: the weight.
        float_type: "F32" makes what neither Q1_0 nor Q4_0 holds exact; any other choice makes it F16.
    """
    columns = weight.shape[1]
    reason = not_signs_alone(weight)
    if not reason:
        scale = weight.row_scale[:, :, 0].float()
        if not torch.equal(scale.half().float(), scale):
            reason = "its row scales do not fit into float16"
        elif columns % BLOCKS["Q1_0"] == 0 and weight.block_size != 64:
            return _encode_signs(weight, "Q1_0", "")
        else:
            narrow = f"its block size {weight.block_size} is not a multiple of 128" if weight.block_size == 64 else ""
            reason = narrow or f"its {columns} columns are not a multiple of 128"
            if columns % BLOCKS["Q4_0"] == 0:
                return _encode_signs(weight, "Q4_0", reason)
    encoded = encode_float(weight.dequantize(torch.float32), "F32" if float_type == "F32" else "F16")
    encoded.reason = reason
    return encoded


def not_signs_alone(weight: BinarizedWeight) -> str:
    """What a weight has besides one plane of signs and its row scales; empty where it has nothing else."""
    layout = weight.layout
    if len(layout.terms) != 1 or layout.terms[0].planes != (0,):
        return f"its layout {layout.name} is more than one plane"
    if weight.col_scale is not None and not bool((weight.col_scale == 1).all()):
        return "it has column scales"
    if weight.permutation is not None:
        return "its columns are permuted"
    if weight.hadamard:
        return "its inputs go through a Hadamard transform"
    return ""


def _encode_signs(weight: BinarizedWeight, kind: str, reason: str) -> Encoded:
    columns = weight.shape[1]
    width = columns if weight.block_size == -1 else weight.block_size
    parts = BLOCKS[kind]
    block = torch.arange(0, columns, parts, device=weight.row_scale.device) // width
    scale = weight.row_scale[:, block, 0].half().cpu().numpy()
    data = sign_blocks(weight.signs[0].cpu().numpy(), scale, kind)
    difference = relative_difference(weight.dequantize().cpu(), torch.from_numpy(decode_blocks(data, kind)))
    return Encoded(kind, data, difference, reason)


def relative_difference(tensor: torch.Tensor, stored: torch.Tensor) -> float:
    """`||stored - tensor|| / ||tensor||` (Frobenius); infinite where a nonzero value is stored of a zero tensor, or
    one is not finite."""
    lost = float((stored - tensor).double().norm())
    if lost == 0:
        return 0.0
    size = float(tensor.double().norm())
    return lost / size if size > 0 and math.isfinite(lost) else math.inf
