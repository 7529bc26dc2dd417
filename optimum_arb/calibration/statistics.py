"""The calibration matrix H = X^T X of each linear, gathered by hooks while the model runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..algorithms.products import MIXED, product_float32
from .calls import version
from .workers import one_thread

# Rows of X^T X that are made at once: their product in float32 takes 180 MB at 11008 features, the whole one's 485 MB.
PANEL = 4096
# Panels of a square product, of which 5/8 is computed.
SQUARE_PANELS = 4


# Bytes of a product that the thread of a run makes whole: as many of them as there are threads wait for their turn.
MADE_WHOLE = 16 << 20

# where it belongs in a product, and a part of it
Panel = tuple[tuple[slice, slice], torch.Tensor]


def add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, made: Iterable[Panel] | None = None
) -> None:
    """Adds `left^T right` with sums in float32 to `total` `[M, K]`.

    On a GPU, factors in 16 bits go through its tensor cores as they are, their products exact; a left factor in float32
    is rounded to bfloat16 there where the right one is of it. All others are widened.

    Args:
        total: float64, or float32 where there is none.
        left: `[T, M]`, in float32 or the dtype of `right`. Where it is `right` itself, what stands left of the diagonal
            blocks of the panels is not added: `mirror` fills it in the end.
        right: `[T, K]`.
        made: what `product_ahead` made of the same.
    """
    with one_thread(right.device), torch.autocast(right.device.type, enabled=False):
        for at, product in _product(left, right) if made is None else made:
            total[at] += product


def product_ahead(left: torch.Tensor, right: torch.Tensor) -> list[Panel] | None:
    """The product of `add_product`, which adds it in its turn: a thread that ran a batch makes it beside others. None
    where it would take more than `MADE_WHOLE`, and on a GPU."""
    if right.device.type != "cpu" or 4 * left.shape[1] * right.shape[1] > MADE_WHOLE:
        return None
    with one_thread(right.device), torch.autocast(right.device.type, enabled=False):
        return list(_product(left, right))


def _product(left: torch.Tensor, right: torch.Tensor) -> Iterator[Panel]:
    alike = left.dtype == right.dtype or right.dtype == torch.bfloat16  # float16 would lose what is small
    wide = not (MIXED and alike and right.is_cuda and right.dtype in (torch.bfloat16, torch.float16))
    dtype = torch.float32 if wide else right.dtype
    same = left is right
    right = right.to(dtype)
    left = right if same else left.to(dtype)
    for start, stop in panels(left.shape[1], same):
        panel, first = left[:, start:stop].T, start if same else 0
        product = panel @ right[:, first:] if wide else product_float32(panel, right[:, first:])
        yield (slice(start, stop), slice(first, None)), product


def panels(columns: int, square: bool) -> list[tuple[int, int]]:
    """Where panels of a product begin and end; of a square one several, since half of it need not be computed."""
    width = min(PANEL, -(-columns // SQUARE_PANELS)) if square else PANEL
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def mirror(total: torch.Tensor) -> None:
    """Fills what `add_product` left out of a square product."""
    for start, stop in panels(len(total), True):
        total[stop:, start:stop] = total[start:stop, stop:].T


class Statistic:
    """X^T X of the inputs that one or several linears receive, and how many inputs were summed.

    The product of each batch has sums in float32 (of inputs in 16 bits, which are not widened on a GPU, the products
    themselves are exact), and their sum is of float64, which is exact while no batch's part of an entry
    is below 2^-29 of the sum. So, rounded to float32, it does not depend on the order of the batches: several processes
    that sum some each come to what one comes to (`calibration/gathering.py`).

    Attributes:
        tokens: how many inputs were summed.
        seen: the inputs of the batch that is running, and their version.
        held_out: the same of the inputs that nothing is fitted to; None where there were none.
    """

    def __init__(self, features: int, device: torch.device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._total: torch.Tensor | None = torch.zeros(features, features, dtype=wide, device=device)
        self._hessian: torch.Tensor | None = None
        self.tokens = 0
        self.seen: tuple[torch.Tensor, int] | None = None
        self.held_out: Statistic | None = None

    def add(self, inputs: torch.Tensor, made: Iterable[Panel] | None = None) -> None:
        """Adds inputs `[..., K]`, whose product may be made already."""
        rows = _rows(inputs)
        assert self._total is not None
        add_product(self._total, rows, rows, made)
        self.tokens += rows.shape[0]

    @property
    def total(self) -> torch.Tensor:
        """The sum `[K, K]`, but for what `mirror` fills, until it was asked for as `hessian`."""
        assert self._total is not None
        return self._total

    @property
    def hessian(self) -> torch.Tensor:
        """The sum in float32 `[K, K]`; the wider one is let go."""
        if self._hessian is None:
            self._hessian, self._total = self.total.to(torch.float32), None
            mirror(self._hessian)
        return self._hessian

    def has_seen(self, inputs: torch.Tensor, number: int) -> bool:
        """Whether the inputs of the batch that is running are these, in this version."""
        return self.seen is not None and self.seen[0] is inputs and self.seen[1] == number

    def hold_out(self, inputs: torch.Tensor, made: Iterable[Panel] | None = None) -> None:
        """Adds inputs to those that nothing is fitted to."""
        if self.held_out is None:
            self.held_out = Statistic(inputs.shape[-1], inputs.device)
        self.held_out.add(inputs, made)


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1])


@dataclass(frozen=True)
class Sums:
    """About the matrix of a linear.

    Attributes:
        leader: the first of the linears that share it.
        features: K.
        tokens: how many inputs were summed.
        held_out: how many were held out.
    """

    leader: str
    features: int
    tokens: int
    held_out: int


@dataclass
class _Input:
    """What one linear received: the tensor itself and its version then, by which sharing is seen (it may be written
    into before the next linear receives it), a copy of it where it is kept, and the product of that once it is made."""

    name: str
    inputs: torch.Tensor
    version: int
    copy: torch.Tensor
    product: list[Panel] | None = None

    def same(self, inputs: torch.Tensor, number: int) -> bool:
        return self.inputs is inputs and self.version == number


class InputStatistics:
    """Gathers the calibration matrices of some linears while the model runs inside this context.

    Linears that receive the very same tensor (query, key and value; gate and up) share one matrix. Call `end_batch`
    after each run of the model: it lets go of the inputs. Where several threads run the model, each does so inside
    `taking`, and then calls `multiply`; one thread calls `add` with what each took, in the order of the batches.

    Args:
        linears: name -> module, `nn.Linear` or `Conv1D`.

    Attributes:
        holding_out: while it is True, inputs go into a second matrix, on which nothing is fitted.
    """

    def __init__(self, linears: Mapping[str, nn.Module]):
        self.holding_out = False
        self._linears = linears
        self._statistics: dict[str, Statistic] = {}
        self._leaders: dict[str, bool] = {}
        self._handles: list = []
        self._taking = threading.local()

    @contextmanager
    def taking(self) -> Iterator[list[_Input]]:
        """Within, what this thread's run of the model hands to the linears is only taken down."""
        taken: list[_Input] = []
        self._taking.taken = taken
        try:
            yield taken
        finally:
            del self._taking.taken

    @staticmethod
    def multiply(taken: list[_Input]) -> None:
        """Makes the products of what one run took down, which is most of the work of `add`."""
        made: dict[int, list[Panel] | None] = {}
        for found in taken:
            if id(found.copy) not in made:
                rows = _rows(found.copy)
                made[id(found.copy)] = product_ahead(rows, rows)
            found.product = made[id(found.copy)]

    def add(self, taken: list[_Input]) -> None:
        """Sums what one run took down."""
        times = Counter(found.name for found in taken)
        for found in taken:
            # one that runs more than once shares no matrix: the others do not receive what it receives then
            self._gather(found.name, found.inputs, found.version, found.copy, times[found.name] == 1, found.product)
        self.end_batch()

    def __enter__(self) -> InputStatistics:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end_batch()

    def end_batch(self) -> None:
        for statistic in self._statistics.values():
            statistic.seen = None

    def hessian(self, name: str) -> torch.Tensor | None:
        """float32 `[K, K]`, shared by the linears with the same input; None where no input reached the linear."""
        statistic = self._statistics.get(name)
        return statistic.hessian if statistic is not None and statistic.tokens else None

    def tokens(self, name: str) -> int:
        statistic = self._statistics.get(name)
        return 0 if statistic is None else statistic.tokens

    def modules(self) -> list[nn.Module]:
        """The linears."""
        return list(self._linears.values())

    def sums(self) -> dict[str, Sums]:
        """What there is of each linear that inputs reached."""
        first: dict[int, str] = {}
        result = {}
        for name, statistic in self._statistics.items():
            leader = first.setdefault(id(statistic), name)
            held_out = 0 if statistic.held_out is None else statistic.held_out.tokens
            result[name] = Sums(leader, statistic.total.shape[0], statistic.tokens, held_out)
        return result

    def statistic(self, name: str) -> Statistic | None:
        """The sums that a linear has part in; None where no input reached it."""
        return self._statistics.get(name)

    def assign(self, statistics: Mapping[str, Statistic]) -> None:
        """Replaces the sums: by name of a linear, those with the same input share one."""
        self._statistics = dict(statistics)

    def absorb(self, other: InputStatistics) -> None:
        """Adds the sums of other linears."""
        self._statistics |= other._statistics

    def finish(self) -> None:
        """Rounds all sums to float32, which takes half the memory; nothing can be added then."""
        for statistic in self._statistics.values():
            if statistic.held_out is not None:
                _ = statistic.held_out.hessian
            _ = statistic.hessian

    def held_out(self, name: str) -> tuple[torch.Tensor | None, int]:
        """The same of the inputs that were held out, and how many there were."""
        statistic = self._statistics.get(name)
        if statistic is None or statistic.held_out is None:
            return None, 0
        return statistic.held_out.hessian, statistic.held_out.tokens

    def _hook(self, name: str):
        def gather(module: nn.Module, args: tuple) -> None:
            inputs, taken = args[0], getattr(self._taking, "taken", None)
            number = version(inputs)
            if taken is None:
                self._gather(name, inputs, number, inputs)
                return
            # a copy: what follows in the model may write into the tensor
            copy = next((found.copy for found in taken if found.same(inputs, number)), None)
            taken.append(_Input(name, inputs, number, inputs.detach().clone() if copy is None else copy))

        return gather

    def _gather(
        self,
        name: str,
        inputs: torch.Tensor,
        number: int,
        values: torch.Tensor,
        shares: bool = True,
        product: list[Panel] | None = None,
    ) -> None:
        statistic = self._statistics.get(name)
        if statistic is None:
            shared = next((s for s in self._statistics.values() if shares and s.has_seen(inputs, number)), None)
            statistic = shared or Statistic(inputs.shape[-1], inputs.device)
            self._statistics[name] = statistic
            self._leaders[name] = shared is None
        if self._leaders[name]:
            (statistic.hold_out if self.holding_out else statistic.add)(values, product)
            statistic.seen = (inputs, number) if shares else None
        elif not statistic.has_seen(inputs, number):
            raise RuntimeError(
                f"{name} shared its input with another linear in the first calibration batch and does not in a "
                "later one: its calibration matrix cannot be gathered. Skip this module."
            )
