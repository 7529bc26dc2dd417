"""`PackedProduct`: x times one packed matrix by the operator, and what a GPU keeps beside the matrix for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from ..format.layout import Layout
from ..format.packing import TENSOR_NAMES
from ..ops.backends.packed import PackedWeight
from ..ops.forward_ad import is_more_than_values
from ..ops.hadamard import hadamard
from ..ops.linear import Plan, linear, linear_without_grad, plan
from .input_transform import InputTransform
from .plans import MAX_PLANS, Plans, Sources, current_device
from .prepared_layers import MAX_TOKENS, prepare_layer, run_prepared_layer
from .shared_input import SharedInput

if TYPE_CHECKING:
    from ..ops.backends.triton.prepack import Prepacked
    from .packed_parameters import PackedParameters


class PackedProduct(ABC):
    """What an `ARBLinear` does with its matrix, and each of the two matrices of an `ARBFactorizedLinear`.

    Compiled code has a way of its own, `compiled_product`, and reads of this what the module's `describe` tells.

    Attributes:
        layout: of the matrix.
        block_size: columns that share a row scale.
        out_features: rows of the matrix.
        backend: a name of the operator's backends.
        bias: `[rows]`, or None.
        shared_input: the group that computes this product with others of the same input; set by `share`.
        shared_index: the place in it.
        hadamard: columns of the blocks of a Hadamard transform of the input, 0 for none.
    """

    layout: Layout
    block_size: int
    out_features: int
    backend: str
    bias: torch.Tensor | None
    shared_input: SharedInput | None
    shared_index: int
    hadamard: int = 0
    _prepared: Prepacked | None  # the matrix as the GPU kernel for few tokens reads it
    _looked: bool  # for it
    _most_tokens: int = MAX_TOKENS  # that it is read for
    _sources: Sources | None = None  # what it was made of
    _plans: Plans[Plan] | None = None  # products that were made ready, for inputs of a kind

    @property
    @abstractmethod
    def columns(self) -> int:
        """Columns of the matrix."""

    @property
    @abstractmethod
    def module(self) -> PackedParameters:
        """Whose parameters the tensors are."""

    @property
    @abstractmethod
    def is_offloaded(self) -> bool:
        """Whether a hook brings the matrix to the GPU for the time of a call: no copy of it is to stay there."""

    @abstractmethod
    def operand(self, name: str) -> torch.Tensor | None:
        """The tensor of this name of `optimum_arb.format.packing.TENSOR_NAMES` as the operator takes it: scales
        decoded, no permutation where a Hadamard transform has taken care of it; None where there is none."""

    @abstractmethod
    def _watched(self) -> list[tuple[dict[str, Any], str]]:
        """The dicts and keys where the tensors stand that the product reads, the bias and the input's transform too."""

    def packed_weight(self) -> PackedWeight:
        """The matrix's tensors as a backend takes them."""
        tensors = {name: self.operand(name) for name in TENSOR_NAMES}
        return PackedWeight(self.layout, self.block_size, self.columns, **tensors)  # type: ignore[arg-type]

    def input_transform(self) -> InputTransform | None:
        """What the input goes through before it meets the matrix."""
        return None

    def _operands(self) -> list[torch.Tensor | None]:
        """The tensors of `optimum_arb.format.packing.TENSOR_NAMES`, in this order, as the operator takes them."""
        return [self.operand(name) for name in TENSOR_NAMES]

    def _present(self) -> tuple[torch.Tensor, ...]:
        """Those of `_operands` that there are, and the bias if there is one, by the shortest way."""
        return tuple(tensor for tensor in [*self._operands(), self.bias] if tensor is not None)

    def _bias_now(self) -> torch.Tensor | None:
        """`bias`, by the shortest way outside of compiled code."""
        return self.bias

    def share(self, shared: SharedInput | None, index: int = 0) -> None:
        """Makes this the product of this number of a group, or of none."""
        before, self.shared_input, self.shared_index = self.shared_input, shared, index
        self.module.compute_alone()
        for group in (before, shared):
            if group is not None:
                group.tell_compiled_code()

    def forget(self) -> None:
        """Drops what was prepared and, of a group, computed: the matrix has changed."""
        self._prepared, self._sources, self._looked = None, None, False
        self._plans = None
        if self.shared_input is not None:
            self.shared_input.forget()

    def _product(self, x: torch.Tensor, join: bool = True) -> torch.Tensor:
        """`[..., columns]` to `[..., rows]`, the bias added; `join`: with other layers that are called with this x."""
        if is_more_than_values():
            return self._product_of_operators(x)
        shared = self.shared_input if join else None
        if not torch.is_grad_enabled():
            out = None if shared is None else shared.take(self, x)
            if out is None and (shared is None or not shared.joins_prompts):
                out = self._called(x)
            if out is not None:
                return out
        bias = self._bias_now()
        few = x.is_cuda and self._few_tokens(x)
        if shared is not None and x.is_cuda and (shared.enabled if few else shared.joins_prompts):
            out = shared.output(self, x, prompt=not few)
            if out is not None:
                return out
        change = self.input_transform()
        if few and self._prepared is not None:
            return run_prepared_layer(x, self._prepared, bias, change)
        if change is not None:
            x = change.apply(x) if shared is None else shared.transformed(x, change)
        if self._without_grad(x) and not x.is_meta:
            out = self._planned(x, bias)
            if out is not None:
                return out
            return linear_without_grad(x, self._operands(), bias, self.layout, self.block_size, self.backend)
        return torch.ops.optimum_arb.linear(
            x, *self._operands(), bias, self.layout.name, self.block_size, self.backend
        )  # fmt: skip

    def _product_of_operators(self, x: torch.Tensor) -> torch.Tensor:
        """The product by nothing else, for values that no kernel reads by itself."""
        change = self.input_transform()
        if change is not None:
            x = hadamard(x, change.sign, change.permutation, block=change.block, backend=change.backend)
        tensors = dict(zip(TENSOR_NAMES, self._operands(), strict=True))
        choices = {"layout": self.layout.name, "block_size": self.block_size, "backend": self.backend}
        return linear(x, bias=self.bias, **tensors, **choices)  # type: ignore[arg-type]

    def _planned(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The product as it was made ready at an earlier call; None where that cannot be.

        Looking at every tensor again takes the host longer than the GPU takes for 64 tokens, and 12 of the 45
        microseconds that a CPU takes for one token at 576 x 576.
        """
        if not x.is_contiguous() or x.size(-1) != self.columns:
            return None
        if x.is_cuda and (x.data_ptr() % 16 or current_device() != x.get_device()):
            return None
        plans, tensors, backend = self._plans, self._present(), self.backend
        if plans is None or plans.backend != backend or not plans.fit(tensors) or len(plans) > MAX_PLANS:
            self._plans = None
            if self.is_offloaded or backend not in ("auto", "triton", "cpu"):
                return None
            plans = self._plans = Plans(tensors, backend)
        key = (x.numel(), x.dtype)
        found = plans.get(key)
        if found is None:
            if key in plans or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                return None  # what is found in a capture is not for all times: kernels may not have been checked yet
            found = plans[key] = plan(x, self._operands(), bias, self.layout, self.block_size, backend)
        if found is None:
            return None
        out = found.run(x, bias)
        if x.is_cuda and (bias is None or bias is self._bias_now()):
            plans.keep(found, x.shape, bias, self._watched)
        return out

    def _called(self, x: torch.Tensor) -> torch.Tensor | None:
        """The product by a call that was made ready, outside of compiled code and without gradients, or None."""
        plans = self._plans
        if plans is None or plans.call is None or self.hadamard or plans.backend != self.backend:
            return None
        return plans.call(x)

    def _without_grad(self, x: torch.Tensor) -> bool:
        """Whether this is a plain product without a gradient, for which the host need not ask the dispatcher."""
        if type(x) is not torch.Tensor:  # a subclass may do otherwise with the operator
            return False
        return not torch.is_grad_enabled() or not (
            x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )

    def _few_tokens(self, x: torch.Tensor) -> bool:
        """Whether the kernels for few tokens may compute this. Prepares them."""
        columns = self.columns
        if self._looked and x.numel() > self._most_tokens * columns:
            return False  # before all else: the rest takes the host as long as a launch
        if self.backend not in ("auto", "triton") or x.shape[-1] != columns:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return False  # what follows has no gradient
        if self._sources is not None and not self._sources.same():
            self.forget()  # the copy is that of other signs or scales
        if not self._looked:
            if torch.cuda.is_current_stream_capturing():
                return False
            self.prepare()
        return 0 < x.numel() <= self._most_tokens * x.shape[-1] and x.dtype in (torch.float16, torch.bfloat16)

    def prepare(self) -> None:
        """Makes the copy that the GPU's kernels for few tokens read, where they run.

        A call does so by itself unless it is compiled: to be called before code that compiles the very first one.
        """
        sources = Sources((self._watched(), self._bias_now()))
        self._prepared = prepare_layer(self)
        self._sources = None if self._prepared is None else sources
        self._plans = None  # which few tokens may be among
        self._most_tokens = MAX_TOKENS
        if self._prepared is not None:
            self._most_tokens = self._prepared.most_tokens
        elif self.shared_input is not None and self.shared_input.enabled:
            self._most_tokens = self.shared_input.most_tokens
        self.module.describe()
        self._looked = True
