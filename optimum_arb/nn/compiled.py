"""Packed products in code that torch compiles.

What such code reads of a layer torch looks at again before every call ("guards"): at each token of a compiled decoding
step. Of a 7B's 735 microseconds a token there, 550 were this package's. So the functions here read little. Torch
visits every module and every dict that is read; of what a dict holds it passes over numbers, strings, tensors and
tuples of constants while the dict is unchanged, up to 2.11 of tensors too. So what is constant is one plain tuple of
the module (`Facts`), tensors are read from the module's own dict of parameters, and what layers of one input have in
common is one dict (`Group`). They call no method and no property of the module, which torch would look up in all of its
classes, and touch no object of another kind: for one torch 2.11, which else passes over whole modules, looks at all
that is around it piece by piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from ..format.packing import TENSOR_NAMES
from ..ops.shared_input import split_results
from .input_transform import InputTransform

if TYPE_CHECKING:
    from .linear import ARBLinear

DECODED = "decoded_"
T = TypeVar("T")

# The fields of a `Product` but its dicts: a plain tuple, of a named one torch would look at each field.
Facts = tuple[str, int, int, int, int, int, tuple[str | None, ...], bool]
# Of layers of one input, of each under the keys of `group_keys`: its facts, parameters and buffers.
Group = dict[str, Any]


class Product(NamedTuple):
    """What compiled code reads of one packed product.

    Attributes:
        layout: its name.
        block_size: columns that share a row scale.
        columns: of the matrix.
        rows: of the matrix.
        hadamard: columns of the blocks of a Hadamard transform of the input, 0 for none.
        most_tokens: that the kernels for few tokens take.
        keys: of the tensors of `optimum_arb.format.packing.TENSOR_NAMES`, in this order, and of the bias; None for what
            there is not. Those that begin with `DECODED` are keys of buffers.
        decoded: whether there are such buffers.
        parameters: the module's own dict, not a copy.
        buffers: the same of its buffers, empty where none is read: torch would look at that dict too.
    """

    layout: str
    block_size: int
    columns: int
    rows: int
    hadamard: int
    most_tokens: int
    keys: tuple[str | None, ...]
    decoded: bool
    parameters: dict[str, Any]
    buffers: dict[str, Any]


def group_keys(index: int) -> tuple[str, str, str]:
    """The keys of a `Group` for the layer of this number."""
    return f"facts {index}", f"parameters {index}", f"buffers {index}"


# Of groups of layers of one input: a tensor by which a group is known, the input, the backend and the results that were
# not taken yet. All are of the graph that is being traced: what a layer computed for the others is taken there too, so
# that this is empty whenever code runs, as long as no graph is cut between them. One list for all: torch looks once
# whether it is empty.
_waiting: list[tuple[torch.Tensor | None, torch.Tensor, str, dict[int, torch.Tensor]]] = []


def compiled_product(layer: ARBLinear, x: torch.Tensor, join: bool = True) -> torch.Tensor:
    """`ARBLinear.forward` in code that is being compiled, for all backends of the operator; `join`: together with other
    layers that are called with this x."""
    backend, place, out = layer.backend, layer._place, None
    if join and place is not None and on_gpu(x):
        out = _joined(layer, *place, backend, x)
    if out is None:
        out = _alone(_product(layer, _known(layer._facts)), backend, x)
    following = layer._following
    return out if following is None else _alone(_product(layer, following), backend, out)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x is where there are kernels for few tokens."""
    return x.is_cuda


def _joined(layer: ARBLinear, index: int, count: int, backend: str, x: torch.Tensor) -> torch.Tensor | None:
    """The part of the layer of this number of what is computed for all of one input; None where it computes its own.

    Each thing is read where it is needed and once only: of two layers that hold the same dict torch would look at every
    call whether they still do. What it has to look at is that the layers for which results wait are of one group.
    """
    for place, (mark, source, of_backend, results) in enumerate(_waiting):
        if mark is not _mark(_members(_known(layer._group), count)):
            continue
        if source is x:
            out = results.pop(index, None)
            if not results:
                _waiting.pop(place)
            return out if of_backend == backend else None
        # cross-attention, whose key and value have another input, or one of the layers is not called
        _waiting.pop(place)
        shared = layer.first_product.shared_input
        if shared is not None:
            shared.end()
        return None
    every = _members(_known(layer._group), count)
    own = every[index]
    if not _few_tokens(own, backend, x):
        return None
    biases = [bias for bias in [_tensor(each, each.keys[-1]) for each in every] if bias is not None]
    if len(biases) not in (0, len(every)) or (torch.is_grad_enabled() and any(bias.requires_grad for bias in biases)):
        return None
    out = _together(every, backend, x, torch.cat(biases) if biases else None, _transform(own, backend))
    results = dict(enumerate(split_results(out, x.shape[:-1], [each.rows for each in every])))
    out = results.pop(index)
    _waiting.append((_mark(every), x, backend, results))
    return out


def _members(group: Group, count: int) -> list[Product]:
    """The products of a group of so many: asked for its length, torch would look at all dicts that a dict holds."""
    every = []
    for i in range(count):
        its_facts, its_parameters, its_buffers = group_keys(i)
        facts: Facts = group[its_facts]
        every.append(Product(*facts, group[its_parameters], group[its_buffers] if facts[-1] else {}))
    return every


def _mark(every: list[Product]) -> torch.Tensor | None:
    """A tensor by which a group is known: torch 2.11 cannot compile a question whether two dicts are one."""
    return _tensor(every[-1], every[-1].keys[0])


def _product(layer: ARBLinear, facts: Facts) -> Product:
    return Product(*facts, layer._parameters, layer._buffers if facts[-1] else {})


def _known(value: T | None) -> T:
    assert value is not None
    return value


def _alone(product: Product, backend: str, x: torch.Tensor) -> torch.Tensor:
    """One product, of a GPU's kernels for few tokens with what the input goes through first."""
    change = _transform(product, backend)
    bias = _tensor(product, product.keys[-1])
    if change is not None:
        # the operator for one product alone has no transform
        if on_gpu(x) and _few_tokens(product, backend, x):
            return _together([product], backend, x, bias, change).view(*x.shape[:-1], product.rows)
        x = change.apply(x)
    operands = [_tensor(product, key) for key in product.keys[:-1]]
    return torch.ops.optimum_arb.linear(x, *operands, bias, product.layout, product.block_size, backend)


def _together(
    every: list[Product], backend: str, x: torch.Tensor, bias: torch.Tensor | None, change: InputTransform | None
) -> torch.Tensor:
    """The products one after another, a vector."""
    tensors = [[_tensor(each, each.keys[i]) for each in every] for i in range(len(TENSOR_NAMES))]
    present = [[tensor for tensor in kind if tensor is not None] for kind in tensors]
    transform = () if change is None else change[:3]
    return torch.ops.optimum_arb.shared_input_linear(
        x, *present, bias, every[0].layout, every[0].block_size, backend, *transform
    )


def _tensor(product: Product, key: str | None) -> torch.Tensor | None:
    if key is None:
        return None
    return product.buffers[key] if key.startswith(DECODED) else product.parameters.get(key)


def _transform(product: Product, backend: str) -> InputTransform | None:
    if not product.hadamard:
        return None
    order = product.parameters.get("weight_permutation")  # no operand of such a product
    return InputTransform(order, product.buffers[f"{DECODED}input_signs"], product.hadamard, backend)


def _few_tokens(product: Product, backend: str, x: torch.Tensor) -> bool:
    """Whether the kernels for few tokens may compute this: they have no gradient."""
    if backend not in ("auto", "triton") or x.shape[-1] != product.columns:
        return False
    if torch.is_grad_enabled():
        bias = _tensor(product, product.keys[-1])
        if x.requires_grad or (bias is not None and bias.requires_grad):
            return False
    return 0 < x.numel() <= product.most_tokens * x.shape[-1] and x.dtype in (torch.float16, torch.bfloat16)
