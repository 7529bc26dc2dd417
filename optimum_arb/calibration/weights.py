"""Where the weights of a model are while it is walked over."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

# Name of the part of a model that is in none of its layers.
OUTSIDE = ""


class LayerWeights:
    """The weights of a model in memory: there from the beginning to the end.

    The walk asks for a layer's weights before it runs it and says when it has no more use of them, so that a model
    that does not fit into memory can be read layer by layer.

    Attributes:
        resident: whether all weights are there all the time.
    """

    resident = True

    def load(self, layer: str) -> None:
        """The layer of this name is about to run: its weights must be there, on the CPU."""

    def finish(self, layer: str) -> None:
        """The layer is binarized, its outputs are computed (unless it is the last), and it is on the CPU."""

    def release(self, layer: str) -> None:
        """The layer has run, without being finished: its weights are not needed now."""

    def is_finished(self, layer: str) -> bool:
        """Whether an interrupted run has finished the layer; `load` then loads it binarized."""
        return False

    def in_float(self, layer: str, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """For a run of the float layer of this name: inside this context it is there, on the CPU.

        Args:
            layer: its name.
            module: the layer as it is in the model.
        """
        return nullcontext(module)

    def stay(self, reason: str) -> None:
        """The layers cannot be walked over one by one: all weights must be there from now on."""

    def outside(self) -> AbstractContextManager[None]:
        """For a run of the model up to its layers: the weights that are in no layer are there inside this context."""
        return nullcontext()

    def whole(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """For runs of the whole model: inside this context, so are those of the layers while these run."""
        return nullcontext()
