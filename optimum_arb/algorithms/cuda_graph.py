"""A function of tensors as a CUDA graph: hundreds of small operators in one launch.

The refinement of a block of 128 columns takes 220 launches, 1,100 blocks a decoder layer of a 7B and sweep pair: on a
fast GPU the host takes longer to launch them than the GPU to run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)

Function = Callable[..., tuple[torch.Tensor, ...]]

KEPT = 8  # graphs: with two shapes of linears, one or two blocks each (the last may be narrower) there are few


class Graphs:
    """Functions that run as CUDA graphs from their third call with the same key and shapes on; as they are on a CPU.

    The graph does what the function does, operator by operator. A function that cannot be captured runs as it is, which
    a message at level info says once.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}

    def run(self, key: Hashable, function: Function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`function(*tensors)`.

        Args:
            key: what the function depends on besides the tensors.
            function: must read and write nothing else, wait for nothing and not change its arguments.
            tensors: on one device.

        Returns:
            Tensors that the next call with the same key overwrites.
        """
        device = tensors[0].device
        if device.type != "cuda" or torch.version.hip is not None:
            return function(*tensors)
        whole = (key, device, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
        calls = self._calls[whole] = self._calls.get(whole, 0) + 1
        if calls == 3:  # kernels are compiled and chosen by now
            while len(self._graphs) >= KEPT:
                self._graphs.pop(next(iter(self._graphs)))
            try:
                self._graphs[whole] = _Graph(function, tensors)
            except RuntimeError as error:
                torch.cuda.synchronize(device)
                logger.info("A CUDA graph could not be captured; its operators run one by one: %s", error)
        graph = self._graphs.get(whole)
        return function(*tensors) if graph is None else graph.run(tensors)

    def clear(self) -> None:
        """Gives the memory of the graphs back."""
        self._calls.clear()
        self._graphs.clear()


class _Graph:
    def __init__(self, function: Function, tensors: tuple[torch.Tensor, ...]):
        self._inputs = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor)
        stream = torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(stream):  # libraries take the workspaces of a stream at its first use
            function(*self._inputs)
        torch.cuda.current_stream(tensors[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def run(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._outputs
