"""The processes that calibrate and fit together: which work is whose, and where they meet.

They meet at the same places, and at each they tell each other of errors first: if one fails, wherever that is, the
others end with an error that says so, and none waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..experts.matrices import is_experts

# Seconds that a rank waits for another one. A layer's fit of a large model takes minutes on one rank while the others
# have nothing to do.
TIMEOUT = 3600.0

T = TypeVar("T")


class OtherRankFailed(RuntimeError):
    """Another rank ended with an error, or does not answer."""


class Ranks:
    """The processes of a run; this one alone unless `distributed` says otherwise.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        local_rank: the number of this process on its host.
        one_host: whether all are on one host.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, timeout: float = TIMEOUT, one_host: bool = True
    ):
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.one_host = one_host
        self._timeout = timeout
        self._groups: dict[str, Any] = {}
        if size > 1:
            self._groups["cpu"] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    # Who does what

    def batches(self, batches: Sequence[T]) -> Sequence[T]:
        """This rank's share: whole batches, as one process would run them, neighbours together. Where there are fewer
        batches than ranks, the last ranks have none."""
        start = self.first_batch(len(batches))
        share, left = divmod(len(batches), self.size)
        return batches[start : start + share + (self.rank < left)]

    def first_batch(self, count: int) -> int:
        """The number, among all `count` batches, of the first one of this rank's share."""
        share, left = divmod(count, self.size)
        return self.rank * share + min(self.rank, left)

    def owners(self, modules: Mapping[str, nn.Module]) -> dict[str, int]:
        """Name of a linear -> the rank that binarizes it: the largest first, each to the rank with least to do.

        Modules of experts have no owner: `mine` divides their experts.
        """
        sizes = {name: _weights(module) for name, module in modules.items() if not is_experts(module)}
        work = [0] * self.size
        owners = {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            owners[name] = min(range(self.size), key=lambda rank: work[rank])
            work[owners[name]] += sizes[name]
        return owners

    def mine(self, count: int) -> range:
        """Which of `count` experts this rank binarizes."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    # Where the ranks meet

    def exchange(self, value: T, doing: str) -> list[T]:
        """Every rank's value, in the order of the ranks.

        Args:
            value: anything that can be pickled.
            doing: what this rank was doing, for the errors.

        Raises:
            OtherRankFailed: another rank has failed, or does not answer.
            RuntimeError: another rank is at another place.
        """
        if self.size == 1:
            return [value]
        return self._exchange(value, None, doing)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Whether all ranks were started alike.

        Args:
            facts: what a fact is about -> its value, of the first rank's type.

        Raises:
            ValueError: they differ; the message says in what.
        """
        everyone = self.exchange(dict(facts), "comparing how the ranks were started")
        for rank, other in enumerate(everyone):
            for name, value in everyone[0].items():
                if other.get(name) != value:
                    raise ValueError(
                        f"Rank {rank} was started with another {name} than rank 0: {_shown(other.get(name))} instead "
                        f"of {_shown(value)}. Start all ranks with the same command on the same model and versions."
                    )

    def merge(self, values: dict[Any, T], doing: str) -> dict[Any, T]:
        """The entries of all ranks; of equal keys, the first rank's."""
        merged: dict[Any, T] = {}
        for found in self.exchange(values, doing):
            merged = {**found, **merged}
        return merged

    def _exchange(self, value: T, error: str | None, doing: str) -> list[T]:
        gathered: list[Any] = [None] * self.size
        with self.answered(doing):
            dist.all_gather_object(gathered, (value, error, doing), group=self._groups["cpu"])
        failed = {rank: said for rank, (_, said, _) in enumerate(gathered) if said is not None}
        if failed and error is None:
            rank = min(failed)
            raise OtherRankFailed(f"Rank {rank} of {self.size} ended with an error: {failed[rank]}")
        first = gathered[0][2]
        elsewhere = {rank: said for rank, (_, _, said) in enumerate(gathered) if said != first}
        if elsewhere and error is None:  # one was told to resume, say: what the others sent is not what it waits for
            rank, said = next(iter(elsewhere.items()))
            raise RuntimeError(
                f"Rank {rank} was {said} while rank 0 was {first}. Start all ranks with the same command."
            )
        return [found for found, *_ in gathered]

    def group(self, device: torch.device) -> Any:
        """All ranks, as collectives on tensors of such a device have them. All ask for the first one together."""
        if device.type != "cpu" and device.type not in self._groups:
            backend = {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo")
            self._groups[device.type] = dist.new_group(backend=backend, timeout=timedelta(seconds=self._timeout))
        return self._groups[device.type]

    @contextmanager
    def answered(self, doing: str) -> Iterator[None]:
        """Says in plain words what it means when a collective fails."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, OtherRankFailed):
                raise
            raise OtherRankFailed(
                f"Rank {self.rank} got no answer from another rank while {doing}: it was ended, or took longer than "
                f"{self._timeout:g} seconds. Look at what the other ranks said, or allow more by a longer timeout. "
                f"({_first_line(error)})"
            ) from error

    def tell(self, error: BaseException) -> None:
        """Lets the other ranks know that this one ends: they are at their next meeting, or will be."""
        if self.size > 1 and not isinstance(error, OtherRankFailed):
            with suppress(RuntimeError):  # where the others are gone, this rank's own error is the one to see
                self._exchange(None, f"{type(error).__name__}: {_first_line(error)}", "ending")


def _weights(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else math.prod(weight.shape)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:2000]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
