"""What runs many times on the same tensors, as one launch: hundreds of small operators as a CUDA graph.

The refinement of a block of 128 columns is 220 launches, which take the host 4 ms and the GPU 1: of the 5 s that a
decoder layer of a 7B took on an H200, the GPU waited for the host in 2.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

# One at a time: all record with the same random number generator, and what another thread asks of a stream that is
# recorded would be recorded too.
_recording = threading.RLock()  # the collector may let go of a graph wherever this thread is
# Graphs of `_stay_registered`.
_kept: list[torch.cuda.CUDAGraph] = []


class Replayed:
    """A function that reads and writes the same tensors in every call: on a GPU recorded at its second call, and
    replayed from there on, with the bits that its operators give one by one.

    Args:
        function: waits for nothing on the host. What it puts into new tensors is lost. It must not refer to what holds
            this: memory of a graph goes back when nothing does.
        device: where its tensors are. On others than CUDA's the function is called as it is.

    Attributes:
        recorded: whether it is replayed. Where it cannot be recorded it is called as it is, which a message at level
            info says.
    """

    def __init__(self, function: Callable[[], None], device: torch.device):
        self._function = function
        self._device = device
        self._plain = device.type != "cuda" or torch.version.hip is not None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._called = False

    def __del__(self, recording: threading.RLock = _recording) -> None:
        # one at a time too: torch's list of a generator's graphs, which each is in, has no lock of its own
        if self._graph is not None:
            with recording:
                self._graph = None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if not self._plain and self._graph is None:
            with _recording:
                self._first_calls()
        elif self._graph is not None:
            self._graph.replay()
        else:
            self._function()

    def _first_calls(self) -> None:
        """On the stream that records: kernels are compiled, and libraries take their workspaces, in the first one."""
        here = torch.cuda.current_stream(self._device)
        stream = _side(self._device) if here == torch.cuda.default_stream(self._device) else here
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            if self._called:
                self._record()
            else:
                self._function()
        here.wait_stream(stream)
        if self._graph is not None:
            self._graph.replay()
        elif self._plain:
            self._function()
        self._called = True

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        _stay_registered(self._device)
        # what other threads ask of the GPU on their streams is not recorded, and does not end it
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            try:
                self._function()
            finally:
                graph.capture_end()
            self._graph = graph
        except RuntimeError as error:
            self._plain = True
            # torch leaves the generator as one that is recorded with, and refuses random numbers from then on
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            _stay_registered.cache_clear()  # with the new state no graph is registered
            logger.info("A CUDA graph could not be recorded; its operators run one by one: %s", error)


@lru_cache(maxsize=16)
def _stay_registered(device: torch.device) -> None:
    """Records a graph that is never let go of, so that no other is the last one.

    In torch 2.11 all graphs share two numbers of the random number generator on the GPU, to which every recording
    writes on its stream. With the last graph the host lets go of them: what was recorded elsewhere may have yet to
    write when others get their memory. In one of a hundred fits on four streams a scale was overwritten. Later each
    graph has its own (pytorch#173421).
    """
    number = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    side = _side(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        number.add_(1)
        graph.capture_begin(capture_error_mode="thread_local")
        number.add_(1)
        graph.capture_end()
    number.record_stream(side)
    _kept.append(graph)


@lru_cache(maxsize=16)
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
