"""Objects with tensors from one rank to the others: what is around the tensors pickled, the tensors as they are.

On GPUs the tensors go through NCCL. They arrive in the layout that they left in, since a product of matrices in another
one may round otherwise.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .ranks import Ranks

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class _Form:
    """What a tensor is without its values: kind of device, dtype, shape of the memory, whether that is transposed."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        """The memory `[...]` on this rank, whose device of that kind is given."""
        return torch.empty(self.shape, dtype=self.dtype, device="cpu" if self.device == "cpu" else device)

    def tensor(self, memory: torch.Tensor) -> torch.Tensor:
        return memory.T if self.transposed else memory


class Arrival:
    """Something that a rank has, or that is on its way to it."""

    def __init__(self, ranks: Ranks, doing: str, put_together: Callable[[], Any] | None):
        self._ranks = ranks
        self._doing = doing
        self._put_together = put_together
        self._works: list[Any] = []

    def take(self) -> Any:
        """The object, once; None where this rank was not to keep it. Modules may compute with their tensors when they
        are put together: those are waited for first."""
        put_together, self._put_together = self._put_together, None
        return None if put_together is None else put_together()

    def wait(self) -> None:
        """What is asked of the device from here on, on this thread's stream, finds the tensors there."""
        for work in tuple(self._works):
            with self._ranks.answered(self._doing):
                work.wait()

    def end(self) -> None:
        """As `wait`; lets go of what sending holds. Only where one stream uses the tensors, or none any more."""
        self.wait()
        self._works.clear()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, which it collects; one that is met twice, once."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, nn.Parameter) or value.is_meta:
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)], type(value) is nn.Parameter, value.requires_grad, dict(value.__dict__)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(file)
        self._tensors = tensors
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        number, is_parameter, requires_grad, attributes = pid
        if number not in self._made:
            tensor = self._tensors[number]
            tensor = nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
            tensor.__dict__.update(attributes)
            self._made[number] = tensor
        return self._made[number]


def _apart(value: Any) -> tuple[bytes, list[_Form], list[torch.Tensor]]:
    """An object without its tensors, their forms, and their memory."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    forms, memory = [], []
    for tensor in pickler.tensors:
        plain = tensor.detach()
        transposed = plain.ndim == 2 and not plain.is_contiguous() and plain.T.is_contiguous()
        plain = plain.T if transposed else plain.contiguous()
        forms.append(_Form(plain.device.type, plain.dtype, tuple(plain.shape), transposed))
        memory.append(plain)
    return file.getvalue(), forms, memory


def _together(data: bytes, forms: list[_Form], memory: list[torch.Tensor]) -> Any:
    """What `_apart` took apart, in a process of this very run."""
    tensors = [form.tensor(one) for form, one in zip(forms, memory, strict=True)]
    return _Unpickler(io.BytesIO(data), tensors).load()


def _shared(unwanted: dict[_Form, torch.Tensor], form: _Form, device: torch.device) -> torch.Tensor:
    """Memory for what is only handed on: on a GPU, whose transfers come one after the other, one for all."""
    if form.device == "cpu":
        return form.empty(device)
    if form not in unwanted:
        unwanted[form] = form.empty(device)
    return unwanted[form]


@torch.no_grad()
def spread(
    ranks: Ranks,
    own: Mapping[Key, Any],
    device: torch.device,
    doing: str,
    keep: Callable[[Key], bool] = lambda key: True,
    dispensable: bool = False,
) -> dict[Key, Arrival]:
    """The objects of all ranks, by their keys, of which each has one rank. All ranks call this at the same place.

    It returns before tensors of other ranks have arrived.

    Args:
        ranks: all of them.
        own: what this one has.
        device: for tensors that are on another rank's device of that kind.
        doing: what this rank is doing, for the errors.
        keep: which of the others' this one wants. All ranks take part in all transfers.
        dispensable: whether all do without, and get nothing, where one has too little memory on its device.

    Raises:
        OtherRankFailed: another rank has failed, or does not answer.
    """
    mine = {key: _apart(value) for key, value in own.items()}
    everyone = ranks.exchange({key: (data, forms) for key, (data, forms, _) in mine.items()}, doing)
    try:
        memory = _memory(ranks, everyone, mine, device, keep)
    except torch.OutOfMemoryError:
        if not dispensable:
            raise
        memory = None
    # a rank without the memory says so here: the others would wait for its part of a transfer until they give up
    all_have_room = all(ranks.exchange(memory is not None, doing))
    if memory is None or not all_have_room:
        return {}
    result = {}
    for rank, sent in enumerate(everyone):
        for key, (data, forms) in sent.items():
            kept = None
            if rank == ranks.rank:
                kept = partial(own.get, key)
            elif keep(key):
                kept = partial(_together, data, forms, memory[rank, key])
            result[key] = arrival = Arrival(ranks, doing, kept)
            for one in memory[rank, key]:
                if one.numel():  # as bytes: gloo does not know every dtype
                    group = ranks.group(one.device)
                    with ranks.answered(doing):
                        values = one.view(-1).view(torch.uint8)
                        arrival._works.append(dist.broadcast(values, rank, group=group, async_op=True))
    return result


def _memory(
    ranks: Ranks,
    everyone: Sequence[Mapping[Key, tuple[bytes, list[_Form]]]],
    mine: Mapping[Key, tuple[bytes, list[_Form], list[torch.Tensor]]],
    device: torch.device,
    keep: Callable[[Key], bool],
) -> dict[tuple[int, Key], list[torch.Tensor]]:
    """Where the tensors of all ranks lie on this one, or will, by the rank and the key; arguments as in `spread`."""
    unwanted: dict[_Form, torch.Tensor] = {}
    memory = {}
    for rank, sent in enumerate(everyone):
        for key, (_, forms) in sent.items():
            if rank == ranks.rank:
                memory[rank, key] = mine[key][2]
            elif keep(key):
                memory[rank, key] = [form.empty(device) for form in forms]
            else:
                memory[rank, key] = [_shared(unwanted, form, device) for form in forms]
    return memory


def share_modules(
    ranks: Ranks, modules: dict[str, nn.Module], device: torch.device, records: dict[str, Any]
) -> dict[str, nn.Module]:
    """The binarized modules of all ranks: those of this one as they are, the others' on its device.

    Args:
        ranks: all of them.
        modules: of this rank, by their names.
        device: of this rank.
        records: what is known of modules by their names; the other ranks' are added.
    """
    if ranks.size == 1:
        return modules
    own = {name: (module, records.get(name)) for name, module in modules.items()}
    found = {}
    for name, arrival in spread(ranks, own, device, "exchanging binarized linears").items():
        arrival.end()
        found[name], record = arrival.take()
        if record is not None:
            records[name] = record
    return found
