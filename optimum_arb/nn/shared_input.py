"""Layers that are given the same input, query, key and value say, computed together.

Few tokens take one launch, or two with that of their preparation; prompts take one call for all launches, see
`shared_prompts.py`. Modules, parameters and files stay as they are: the first of the layers that is called computes for
all, and the others take their part when they are called with the same tensor.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..format.packing import TENSOR_NAMES
from ..ops.shared_input import split_results
from .plans import Sources
from .prepared_layers import MAX_TOKENS, runner
from .shared_prompts import SharedPrompts

if TYPE_CHECKING:
    from ..ops.backends.triton.prepack import Prepacked
    from .compiled import Group
    from .input_transform import InputTransform
    from .product import PackedProduct

MOST_WASTED = 3  # calls in a row whose results some layers did not take

_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


class _Waiting:
    """The results for an input that were not taken yet.

    Attributes:
        input: as it was given.
        results: of all layers; None for one that was taken.
        left: how many were not.
        state: `_state` of the input when they were computed.
        backend: of the layer that was called first.
    """

    __slots__ = ("backend", "input", "left", "results", "state")

    def __init__(
        self, x: torch.Tensor, results: list[torch.Tensor | None], state: tuple[int, int] | None, backend: str
    ):
        self.input, self.results, self.left, self.state = x, results, len(results), state
        self.backend = backend


class SharedInput:
    """The layers of one input.

    Several threads may run the layers at once: what a thread computed waits for that thread alone. Compiled code does
    not ask this object: it reads of the layers which of them it is to compute together, see `tell_compiled_code`.

    Attributes:
        layers: at most three, of one layout, block size and number of input features; those that still exist.
        enabled: whether few tokens are computed together: no longer once one of them was called with another input than
            the first, or was replaced.
        joins_prompts: whether prompts are; as `enabled`, but they need no copy of the weights.
    """

    def __init__(self, layers: list[PackedProduct]):
        # weak: the layers hold this object, and a model that is let go of is to free its memory at once, not when
        # Python's collector of cycles runs next
        end = weakref.WeakMethod(self.end)

        def ended(_: object, finishing: Callable[[], bool] = sys.is_finalizing) -> None:
            """What is ready for the layers would keep the tensors of the one that is gone."""
            method = end()
            if method is not None and not finishing():  # Python takes modules apart then, torch's too
                method()

        self._layers = [weakref.ref(layer, ended) for layer in layers]
        self.enabled = True
        self._rows = tuple(layer.out_features for layer in layers)
        self._prepared: Prepacked | None = None
        self._sources: Sources | None = None  # what it was made of
        # of each thread what it computed and its layers have not taken yet
        self._waiting: dict[int, _Waiting] = {}
        # thread -> the input that was transformed, its `_state`, what it became, how many layers have not taken it yet
        self._transformed: dict[int, tuple[torch.Tensor, tuple[int, int], torch.Tensor, int]] = {}
        self._alike = True  # in what the layers do to their input, as `share_inputs` found them
        self.joins_prompts = True
        self._prompts = SharedPrompts()
        self._wasted = 0  # calls in a row of which a result was left
        self._group: Group = {}  # what compiled code reads of the layers

    @property
    def layers(self) -> list[PackedProduct]:
        return [layer for layer in [reference() for reference in self._layers] if layer is not None]

    def output(self, layer: PackedProduct, x: torch.Tensor, *, prompt: bool = False) -> torch.Tensor | None:
        """The layer's result for x `[..., K]`; None where the layer has to compute it itself.

        Args:
            layer: of the group.
            x: see above.
            prompt: whether x, on a CUDA device, has more tokens than the kernels for few take.
        """
        thread = threading.get_ident()
        waiting = self._waiting.get(thread)
        if waiting is not None and waiting.input is not x:
            if waiting.results[layer.shared_index] is not None:  # cross-attention: key and value have another input
                self.end()
                return None
            waiting = None  # the layer has had its part: what waits is left of a call that an error ended
            if self._is_wasted():
                return None
        if waiting is None:
            layers = self.layers
            if len(layers) < len(self._rows):
                self.end()
                return None
            results = self._prompt(x, layers) if prompt else self._few_tokens(x, layers)
            if results is None:
                self._waiting.pop(thread, None)  # what was left
                return None
            waiting = self._waiting[thread] = _Waiting(x, results, _state(x), layer.backend)
        elif waiting.state != _state(x) or waiting.backend != layer.backend:
            return None  # as in `take`
        return self._part(waiting, layer, thread)

    def take(self, layer: PackedProduct, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's result where it waits, or where a call of all layers is ready; else None.

        Not in compiled code, and without gradients.
        """
        thread = threading.get_ident()
        waiting = self._waiting.get(thread)
        if waiting is None:
            results = self._prompts.call(x, layer.backend) if self.joins_prompts else None
            if results is None:
                return None
            waiting = self._waiting[thread] = _Waiting(x, [*results], _state(x), layer.backend)
        elif waiting.input is not x:
            return None
        elif waiting.state != _state(x) or waiting.backend != layer.backend:
            return (
                None  # written since, or to be used on another stream: the layer's own result waits for what it has to
            )
        return self._part(waiting, layer, thread)

    def _part(self, waiting: _Waiting, layer: PackedProduct, thread: int) -> torch.Tensor | None:
        index = layer.shared_index
        part = waiting.results[index]
        if part is not None:
            waiting.results[index] = None
            waiting.left -= 1
            if not waiting.left:
                self._waiting.pop(thread, None)
                self._wasted = 0
        return part

    def _few_tokens(self, x: torch.Tensor, layers: list[PackedProduct]) -> list[torch.Tensor | None]:
        if self._sources is not None and not self._sources.same():
            layers[0].forget()  # the copy is that of other signs or scales
            if not torch.cuda.is_current_stream_capturing():
                layers[0].prepare()
        out = self._compute(x, layers)
        return [*split_results(out, x.shape[:-1], self._rows, untraced=self._prepared is not None)]

    def _prompt(self, x: torch.Tensor, layers: list[PackedProduct]) -> list[torch.Tensor | None] | None:
        if not self._alike and (torch.cuda.is_current_stream_capturing() or not self._still_alike()):
            return None
        results = self._prompts.results(layers, x)
        return None if results is None else [*results]

    def _is_wasted(self) -> bool:
        """Counts results that nobody took; whether there are so many that a layer must be one that is not called."""
        self._wasted += 1
        if self._wasted >= MOST_WASTED:
            self.end()
        return self._wasted >= MOST_WASTED

    def transformed(self, x: torch.Tensor, change: InputTransform) -> torch.Tensor:
        """What becomes of an input, computed once for all layers that are called with it one after another."""
        if torch.is_grad_enabled() or not self._still_alike():
            return change.apply(x)  # what is kept must not outlive its graph
        if x.is_inference():
            return change.apply(x)  # nothing would tell that it was written between two layers
        thread = threading.get_ident()
        source, before, result, left = self._transformed.get(thread, (None, None, None, 0))
        state = _state(x)
        if result is None or source is not x or state != before:  # another one, written since, or on another stream
            result, left = change.apply(x), len(self._rows)
        if left > 1:
            self._transformed[thread] = (x, state, result, left - 1)
        else:
            self._transformed.pop(thread, None)
        return result

    def _still_alike(self) -> bool:
        """Whether the layers still do the same to their input; where they do not, none is computed for another."""
        if not self._alike:
            self._alike = one_transform(self.layers)
            self.enabled = self.enabled and self._alike
            self.joins_prompts = self.joins_prompts and self._alike
            self.tell_compiled_code()
        return self._alike

    def end(self) -> None:
        """Ends it: from now on each layer computes by itself."""
        self.enabled = self.joins_prompts = False
        self.forget()
        self.tell_compiled_code()
        for layer in self.layers:
            layer._looked = False  # for a copy of its own weight alone: the next call that is not compiled

    def _compute(self, x: torch.Tensor, layers: list[PackedProduct]) -> torch.Tensor:
        """The layers' results one after another, a vector."""
        first = layers[0]
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        change = first.input_transform()
        if self._prepared is not None:
            return runner()(x, self._prepared, bias, self._rows, change=None if change is None else change[:3])
        tensors = [[layer.operand(name) for layer in layers] for name in TENSOR_NAMES]
        present = [[tensor for tensor in kind if tensor is not None] for kind in tensors]
        transform = () if change is None else change[:3]
        return torch.ops.optimum_arb.shared_input_linear(
            x, *present, bias, first.layout.name, first.block_size, first.backend, *transform
        )

    @property
    def most_tokens(self) -> int:
        """Up to which number of tokens the layers are computed together."""
        return MAX_TOKENS if self._prepared is None else self._prepared.most_tokens

    def prepare(self) -> bool:
        """Makes the copy of the weights that the kernel reads; returns whether it will be used."""
        from ..ops.backends.triton import prepack
        from ..ops.backends.triton.few_tokens import prepare

        layers = self.layers
        weights = [layer.packed_weight() for layer in layers]
        whole = len(layers) == len(self._rows)
        if not self._still_alike() or not self.enabled:
            prepack.drop(weights)
        elif not whole or any(layer.is_offloaded for layer in layers) or len({w.weight.device for w in weights}) > 1:
            self.enabled = False
        else:
            sources = Sources(*[(layer._watched(), layer._bias_now()) for layer in layers])
            self._prepared = prepare(weights)
            self._sources = None if self._prepared is None else sources
            self.enabled = self._prepared is not None
        self.tell_compiled_code()
        return self.enabled

    def forget(self) -> None:
        """Drops what was computed and prepared: a layer's tensors have changed."""
        self._prepared, self._sources = None, None
        self._waiting.clear()
        self._transformed.clear()
        self._prompts.forget()
        self._alike = False  # has to be looked at again
        self.tell_compiled_code()

    def tell_compiled_code(self) -> None:
        """Lets compiled code compute the layers together, or each by itself.

        It is told by attributes of the layers: asking this object would be a hundred things more that torch looks at
        before every call. Compiled code cannot look whether transforms are alike, so that layers with one are computed
        by themselves until a call that is not compiled has looked.
        """
        layers = [layer for layer in self.layers if layer.shared_input is self]
        together = self.enabled and len(layers) == len(self._rows)
        together = together and (self._alike or not any(layer.hadamard for layer in layers))
        if not together:  # it holds the tensors of a layer that is gone
            self._group.clear()
        for index, layer in enumerate(layers):
            if together:
                layer.module.compute_together(self._group, index, len(layers))
            else:
                layer.module.compute_alone()


def _state(x: torch.Tensor) -> tuple[int, int]:
    """Changes when an input is written, as far as torch knows, or another stream becomes the current one."""
    version = 0 if x.is_inference() else x._version
    return version, _current_stream(x.get_device()) if x.is_cuda else 0


def one_transform(layers: list[PackedProduct]) -> bool:
    """Whether all do the same to their input before they multiply it."""
    first, *others = [layer.input_transform() for layer in layers]
    return all(other is None if first is None else first.equals(other) for other in others)
