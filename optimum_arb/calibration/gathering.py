"""What the ranks gathered of a layer, put together: sums over linears' inputs, and the inputs of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from .experts import LayerStatistics, RoutedInputs
from .ranks import Ranks
from .statistics import Statistic, Sums

# names of linears that share a sum -> the ranks that need it
Needing = Callable[[Sequence[str]], Sequence[int]]


def sum_statistics(
    ranks: Ranks,
    statistics: LayerStatistics,
    owners: Mapping[str, int],
    needing: Needing | None = None,
    correcting: Needing | None = None,
) -> None:
    """Puts the sums over all ranks in the place of this rank's, on the ranks that will need them.

    Args:
        ranks: all of them.
        statistics: what this rank gathered of a layer.
        owners: as `Ranks.owners` returned them.
        needing: which ranks need the calibration matrix of linears; those that own one unless given.
        correcting: which ranks need the sums of their corrections, likewise.
    """

    def owning(names: Sequence[str]) -> list[int]:
        return sorted({owners[name] for name in names})

    if ranks.size > 1:
        _sum_linears(ranks, statistics, owning, needing or owning, correcting or owning)
        for experts in (statistics.experts, statistics.held_out_experts):
            for name, routed in experts.items():
                experts[name] = _all_inputs(ranks, routed)
    statistics.linears.finish()


def _sum_linears(
    ranks: Ranks, statistics: LayerStatistics, owning: Needing, needing: Needing, correcting: Needing
) -> None:
    linears, device = statistics.linears, statistics.device()
    everyone = ranks.exchange(linears.sums(), "gathering the statistics of a layer")
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
    _all_have_room(ranks, "gathering the statistics of a layer")
    sums: dict[str, Statistic] = {}
    for leader, statistic in totals.items():
        members = [name for name, each in found.items() if each.leader == leader]
        needed = needing(members)
        _sum(ranks, statistic.total, needed, leader)
        statistic.tokens = found[leader].tokens
        if statistic.held_out is not None:
            fitting = owning(members)
            _sum(ranks, statistic.held_out.total, fitting, leader)
            statistic.held_out.tokens = found[leader].held_out
            statistic.held_out = statistic.held_out if ranks.rank in fitting else None
        if ranks.rank in needed:
            sums |= dict.fromkeys(members, statistic)
    linears.assign(sums)
    if statistics.corrections is not None:
        for name, total in statistics.corrections.sums.items():
            _sum(ranks, total, correcting(statistics.corrections.members[name]), name)


def _sum(ranks: Ranks, total: torch.Tensor, needed: Sequence[int], name: str) -> None:
    """The sum over the ranks, in place, on the ranks that need it; what the others hold then means nothing."""
    group = ranks.group(total.device)
    with ranks.answered(f"summing the statistics of {name}"):
        if len(needed) == 1:
            dist.reduce(total, needed[0], group=group)
        else:
            dist.all_reduce(total, group=group)


def _all_inputs(ranks: Ranks, routed: RoutedInputs) -> RoutedInputs:
    """The inputs of experts of all ranks in the order of the batches, on every rank."""
    own = routed.gathered()
    shapes = ranks.exchange([(tuple(t.shape), t.dtype) for t in own] if own else None, "gathering inputs of experts")
    everyone = [own if rank == ranks.rank else _empty(found or ()) for rank, found in enumerate(shapes)]
    _all_have_room(ranks, "gathering inputs of experts")
    result = RoutedInputs(routed.experts)
    for rank, tensors in enumerate(everyone):
        if not tensors:
            continue
        with ranks.answered("gathering the inputs of experts"):
            for tensor in tensors:
                if tensor.numel():  # as bytes: gloo does not know every dtype
                    dist.broadcast(tensor.view(-1).view(torch.uint8), rank, group=ranks.group(torch.device("cpu")))
        result.add(*tensors)
    return result


def _all_have_room(ranks: Ranks, doing: str) -> None:
    """Before tensors are exchanged: a rank without the memory for its part says so here. Behind this the others
    would be in an exchange that it does not come to, where they hear of no error, for as long as they wait."""
    ranks.exchange(None, doing)


def _empty(forms: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[torch.Tensor]:
    """Memory for what another rank has, on the CPU."""
    return [torch.empty(shape, dtype=dtype) for shape, dtype in forms]
