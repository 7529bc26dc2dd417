"""Calibration and fit on several processes, one for each GPU of a host or of several, through torch.distributed.

    torchrun --nproc-per-node 2 -m optimum_arb quantize MODEL OUT --device-map cuda

Every rank walks over the whole model, with its share of the batches: what it computes of a layer are its batches'
products, which are summed over the ranks, and the fit of its share of the layer's linears, which the ranks exchange
packed. What fits make of a large calibration matrix is divided as well (`division`). So every rank ends with the same
binarized model, and it is the one that a single process makes.

The ranks meet at the same places, and at each they tell each other of errors first: if one fails, wherever that is, the
others end with an error that says so, and none waits for it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..experts.matrices import is_experts
from .experts import LayerStatistics, RoutedInputs
from .standard_output import to_standard_error
from .statistics import Statistic, Sums

# Seconds that a rank waits for another one. A layer's fit of a large model takes minutes on one rank while the others
# have nothing to do.
TIMEOUT = 3600.0

T = TypeVar("T")
# names of linears that share a sum -> the ranks that need it
Needing = Callable[[Sequence[str]], Sequence[int]]


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

    def sum_statistics(
        self,
        statistics: LayerStatistics,
        owners: Mapping[str, int],
        needing: Needing | None = None,
        correcting: Needing | None = None,
    ) -> None:
        """Puts the sums over all ranks in the place of this rank's, on the ranks that will need them.

        Args:
            statistics: what this rank gathered of a layer.
            owners: as `owners` returned them.
            needing: which ranks need the calibration matrix of linears; those that own one unless given.
            correcting: which ranks need the sums of their corrections, likewise.
        """

        def owning(names: Sequence[str]) -> list[int]:
            return sorted({owners[name] for name in names})

        if self.size > 1:
            self._sum_linears(statistics, owning, needing or owning, correcting or owning)
            for experts in (statistics.experts, statistics.held_out_experts):
                for name, routed in experts.items():
                    experts[name] = self._all_inputs(routed)
        statistics.linears.finish()

    def _sum_linears(self, statistics: LayerStatistics, owning: Needing, needing: Needing, correcting: Needing) -> None:
        linears, device = statistics.linears, statistics.device()
        everyone = self.exchange(linears.sums(), "gathering the statistics of a layer")
        found: dict[str, Sums] = {}
        for other in everyone:
            for name, own in other.items():
                known = found.setdefault(name, Sums(own.leader, own.features, 0, 0))
                if known.leader != own.leader:
                    raise RuntimeError(
                        f"{name} shares its input with {own.leader} in the batches of one rank and with "
                        f"{known.leader} in those of another: its calibration matrix cannot be gathered. Run it in "
                        "one process."
                    )
                found[name] = replace(known, tokens=known.tokens + own.tokens, held_out=known.held_out + own.held_out)
        leaders = dict.fromkeys(each.leader for each in found.values())
        totals = {leader: linears.statistic(leader) or Statistic(found[leader].features, device) for leader in leaders}
        for leader in leaders:
            if found[leader].held_out and totals[leader].held_out is None:
                totals[leader].held_out = Statistic(found[leader].features, device)
        self._all_have_room("gathering the statistics of a layer")
        sums: dict[str, Statistic] = {}
        for leader, statistic in totals.items():
            members = [name for name, each in found.items() if each.leader == leader]
            needed = needing(members)
            self._sum(statistic.total, needed, leader)
            statistic.tokens = found[leader].tokens
            if statistic.held_out is not None:
                fitting = owning(members)
                self._sum(statistic.held_out.total, fitting, leader)
                statistic.held_out.tokens = found[leader].held_out
                statistic.held_out = statistic.held_out if self.rank in fitting else None
            if self.rank in needed:
                sums |= dict.fromkeys(members, statistic)
        linears.assign(sums)
        if statistics.corrections is not None:
            for name, total in statistics.corrections.sums.items():
                self._sum(total, correcting(statistics.corrections.members[name]), name)

    # The collectives

    def _sum(self, total: torch.Tensor, needed: Sequence[int], name: str) -> None:
        """The sum over the ranks, in place, on the ranks that need it; what the others hold then means nothing."""
        group = self.group(total.device)
        with self.answered(f"summing the statistics of {name}"):
            if len(needed) == 1:
                dist.reduce(total, needed[0], group=group)
            else:
                dist.all_reduce(total, group=group)

    def _all_inputs(self, routed: RoutedInputs) -> RoutedInputs:
        """The inputs of experts of all ranks in the order of the batches, on every rank."""
        own = routed.gathered()
        shapes = self.exchange([(tuple(t.shape), t.dtype) for t in own] if own else None, "gathering inputs of experts")
        everyone = [own if rank == self.rank else _empty(found or ()) for rank, found in enumerate(shapes)]
        self._all_have_room("gathering inputs of experts")
        result = RoutedInputs(routed.experts)
        for rank, tensors in enumerate(everyone):
            if not tensors:
                continue
            with self.answered("gathering the inputs of experts"):
                for tensor in tensors:
                    if tensor.numel():  # as bytes: gloo does not know every dtype
                        dist.broadcast(tensor.view(-1).view(torch.uint8), rank, group=self._groups["cpu"])
            result.add(*tensors)
        return result

    def _all_have_room(self, doing: str) -> None:
        """Before tensors are exchanged: a rank without the memory for its part says so here. Behind this the others
        would be in an exchange that it does not come to, where they hear of no error, for as long as they wait."""
        self.exchange(None, doing)

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

    def _tell(self, error: BaseException) -> None:
        """Lets the other ranks know that this one ends: they are at their next meeting, or will be."""
        if self.size > 1 and not isinstance(error, OtherRankFailed):
            with suppress(RuntimeError):  # where the others are gone, this rank's own error is the one to see
                self._exchange(None, f"{type(error).__name__}: {_first_line(error)}", "ending")


_current: ContextVar[Ranks | None] = ContextVar("optimum_arb_ranks", default=None)


def current_ranks() -> Ranks:
    """The ranks of the `distributed` context that is open; this process alone without one."""
    return _current.get() or Ranks()


def started_by_torchrun() -> int:
    """How many processes torchrun (or another launcher that sets its variables) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def distributed(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Inside this context, the processes that torchrun started binarize a model together.

        with distributed() as ranks:
            model = AutoModelForCausalLM.from_pretrained(name, quantization_config=ARBConfig(), device_map="cuda")
            if ranks.is_first:
                model.save_pretrained(out)

    All processes must do the same; each has the whole binarized model at the end. Without torchrun, or with one
    process, nothing is different.

    Args:
        timeout: seconds that a rank waits for the others before it gives up.

    Raises:
        OtherRankFailed: another rank failed; its own error is raised there.
        ValueError: there are more processes on this host than GPUs, or the timeout is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds.")
    size = started_by_torchrun()
    if size == 1 or _current.get() is not None:
        yield _current.get() or Ranks()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    own = not dist.is_initialized()
    with to_standard_error():
        if own:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        one_host = os.environ.get("LOCAL_WORLD_SIZE", str(size)) == str(size)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_rank, timeout, one_host)
    token = _current.set(ranks)
    bars = is_progress_bar_enabled()
    if not ranks.is_first:
        disable_progress_bar()
    try:
        yield ranks
        ranks.exchange(None, "ending")
    except BaseException as error:
        ranks._tell(error)
        raise
    finally:
        _current.reset(token)
        if bars:
            enable_progress_bar()
        if own:
            dist.destroy_process_group()


def local_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The device of its kind that is this rank's; of several GPUs, it becomes the current one, which kernels run on.

    Raises:
        ValueError: this host has fewer of them than processes.
    """
    if ranks.size == 1 or device.type == "cpu":
        return device
    count = torch.accelerator.device_count()
    if ranks.local_rank >= count:
        raise ValueError(
            f"Process {ranks.local_rank} of this host has no GPU of its own: there are {count}. Start at most "
            f"{count} processes: torchrun --nproc-per-node {count}."
        )
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    return torch.device(device.type, ranks.local_rank)


def model_fingerprint(model: nn.Module) -> str:
    """Tells models apart: a hash of the names, shapes and dtypes of all tensors, and of the first numbers of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:
                first = tensor.detach().reshape(-1)[:64].cpu().contiguous()
                digest.update(first.view(torch.uint8).numpy().tobytes() if first.numel() else b"")
    return digest.hexdigest()


def _empty(forms: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    """Memory for what another rank has, on the CPU."""
    return [torch.empty(shape, dtype=dtype) for shape, dtype in forms]


def _weights(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else math.prod(weight.shape)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:2000]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
