"""Times of GPU calls, and random weights to time them with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

from ....format.layout import Layout
from ....format.packing import packed_shapes
from ..packed import PackedWeight

ROTATED_BYTES = 192e6  # over three times the second-level cache of an H200: no call finds its weight there


def graph_time(call: Callable[[int], object], copies: int, replays: int = 7) -> float:
    """Median microseconds of `call(i)`, i over the copies, from replays of a CUDA graph of all of them.

    Args:
        call: launches on the current stream, without waiting.
        copies: calls in the graph, each with its own data.
        replays: timed replays.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
        call(copies - 1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    found = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(found)


def copies_for(nbytes: int) -> int:
    """Copies of data of this size that do not fit the caches together."""
    return max(2, min(64, math.ceil(ROTATED_BYTES / nbytes)))


def random_weight(
    layout: Layout, out_features: int, in_features: int, block_size: int, permuted: bool, device: str, seed: int = 0
) -> PackedWeight:
    """A packed weight of random bits and scales, without salient columns.

    Args:
        layout: its terms.
        out_features: N.
        in_features: K.
        block_size: columns that share a row scale.
        permuted: whether the columns are permuted.
        device: where.
        seed: of all values.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in packed_shapes(layout, out_features, in_features, block_size, permuted).items():
        if name == "weight":
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
        elif name == "permutation":
            order = torch.randperm(in_features, device=device, generator=generator)
            tensors[name] = order.to(torch.int16 if in_features <= 2**15 else torch.int32)[None]
        else:
            scale = 0.02 if name == "row_scale" else 1
            values = (torch.rand(shape, device=device, generator=generator) + 0.5) * scale
            tensors[name] = values.to(torch.float16)
    return PackedWeight(layout, block_size, in_features, **tensors)
