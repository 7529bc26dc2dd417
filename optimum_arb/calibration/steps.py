"""A layer binarized in the steps in which it runs, each fitted to make up for the errors before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .activations import Activations, CopiedAhead, EveryOther
from .ahead import Ahead
from .ahead_plan import Following, Pace, make_plan
from .calls import Call, layer_runs
from .correction import Corrections
from .experts import LayerStatistics, Taken
from .fitting import Fitting
from .ranks import Ranks
from .reading import LAYER_INPUT, Read, Reading, Step, find_steps, sharing_weights
from .reuse import Outputs, Reuse, Settled, worth_keeping
from .statistics import Panel
from .workers import in_order

# of a batch's number and the float layer's output for it
TakeOutput = Callable[[int, torch.Tensor], None]
# what a run came to that is to be kept, and the input of the step's linears
Made = tuple[dict[str, torch.Tensor], "torch.Tensor | None"]
# what a step's linears lack, and the products with their inputs
Differences = tuple[dict[str, torch.Tensor], dict[str, "list[Panel] | None"]]


@dataclass
class Steps:
    """Binarizes a layer step by step.

    Attributes:
        fitting: binarizes modules.
        ranks: the processes that do this together.
        device: where the layer is.
        fitted: how many batches something may be fitted to.
        keep: whether the statistics, and the modules with the weights that were fitted, are asked for.
        runs_on: whether `outputs` will be asked for, of the layer as `binarize` leaves it.
        following: the layer behind this one, where several ranks may run it ahead.
        ahead: what they made of this one; behind `binarize`, of the one that follows.
    """

    fitting: Fitting
    ranks: Ranks
    device: torch.device
    fitted: int
    keep: bool
    runs_on: bool
    following: Following | None = None
    ahead: Ahead | None = None
    _reuse: Reuse | None = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def binarize(
        self,
        name: str,
        layer: nn.Module,
        modules: dict[str, nn.Module],
        hidden: Activations,
        calls: list[Call],
        take: TakeOutput | None,
    ) -> tuple[dict[str, nn.Module], LayerStatistics]:
        """Binarizes the modules of a layer.

        Args:
            name: of the layer.
            layer: the layer.
            modules: name -> float module.
            hidden: the hidden states of both models. Those of the float model are read for a batch before its output
                is handed to `take`, and not again.
            calls: the layer's other arguments.
            take: gets the float layer's outputs of the float model's hidden states; None if nothing needs them.

        Returns:
            if they are to be kept, the modules with the weights that they were fitted to, and their statistics.
        """
        of_float = sharing_weights(layer)
        looked: tuple[list[Step], list[Settled]] | None = None
        if calls:
            run = layer_runs(layer, EveryOther(hidden), calls, self.device)
            with Outputs(layer, [target.removeprefix(name + ".") for target in modules]) as outputs:
                steps = find_steps(layer, modules, lambda: run(0))
            looked = steps, outputs.settled(name, steps) if hidden.in_memory else []
        looked = self.ranks.exchange(looked, "looking at how a layer runs")[0]
        assert looked is not None  # the first rank has batches
        steps, settled = looked
        self._count = len(steps)
        if self.ahead is not None and self.ahead.steps != steps:
            self.ahead.settle()
            self.ahead = None

        def reuse(form: nn.Module, runs: int) -> Reuse:
            size = hidden[0].nbytes if calls and settled else 0
            return Reuse(form, worth_keeping(settled, runs, size, len(calls), self.device), self.device)

        both = reuse(of_float, len(steps)), reuse(layer, len(steps) + self.runs_on)
        self._reuse = both[1]
        fitted: dict[str, nn.Module] = {}
        every = LayerStatistics(modules)
        for number, step in enumerate(steps, 1):
            statistics = LayerStatistics({target: modules[target] for target in step.names})
            statistics.corrections = Corrections(step, modules, self.device)
            last = step is steps[-1]
            following = self._plan(name, steps, modules, hidden) if last else None

            def put_out(batch: int, output: torch.Tensor, following: Ahead | None = following) -> None:
                if following is not None:
                    following.give(batch, output)
                assert take is not None
                take(batch, output)

            with both[0].run(number), both[1].run(number):
                taking = None if take is None or not last else put_out
                self._gather(name, layer, of_float, number, step, statistics, hidden, calls, both, taking)
            if last:
                self.ahead = following
            if following is not None:
                following.hand_over()
            fitted |= self.fitting.binarize(step.names, statistics, self.keep, following)
            if following is not None:
                following.collect()
            if self.keep:
                every.absorb(statistics)
        return fitted, every

    def _plan(self, name: str, steps: list[Step], modules: dict[str, nn.Module], hidden: Activations) -> Ahead | None:
        some = hidden[0] if self.following is not None and len(hidden) else None  # not in vain from a disk
        pace = Pace() if self.ahead is None else self.ahead.pace()
        plan = make_plan(self.ranks, self.device, name, steps, modules, self.following, some, pace)
        return None if plan is None or self.following is None else Ahead(self.ranks, self.device, plan, self.following)

    @contextmanager
    def outputs(
        self, layer: nn.Module, hidden: Activations, calls: list[Call]
    ) -> Iterator[Callable[[int], torch.Tensor]]:
        """A function that gives the binarized layer's output for a batch, with what is known of it already."""
        reuse = self._reuse
        assert reuse is not None
        run = layer_runs(layer, EveryOther(hidden), calls, self.device)

        def output(batch: int) -> torch.Tensor:
            with reuse.batch(batch):
                return run(batch)

        with reuse.run(self._count + 1):
            yield output

    def _gather(
        self,
        name: str,
        layer: nn.Module,
        of_float: nn.Module,
        number: int,
        step: Step,
        statistics: LayerStatistics,
        hidden: Activations,
        calls: list[Call],
        both: tuple[Reuse, Reuse],
        take: TakeOutput | None,
    ) -> None:
        """Runs both forms of a layer up to a step, the float one to its end where its outputs are taken."""
        corrections = statistics.corrections
        assert corrections is not None
        reuse_float, reuse = both
        ahead = self.ahead if number > 1 else None  # up to the first step there is little to run
        if ahead is not None:
            ahead.settle()
        float_hidden = EveryOther(hidden, 0)
        streams = CopiedAhead(float_hidden, len(calls), self.device) if self.device.type == "cuda" else float_hidden
        run_float = layer_runs(of_float, float_hidden, calls, self.device)
        run = layer_runs(layer, EveryOther(hidden), calls, self.device)
        with (
            statistics,
            Reading(of_float, name, step, whole=take is not None) as of_wanted,
            Reading(layer, name, step, whole=step.repeats) as of_given,
        ):

            def taken(batch: int) -> tuple[torch.Tensor | None, Differences, Taken, list[Made]]:
                output, wanted, made_float = None, Read(), {}
                known = ahead is not None and ahead.has(batch)
                if ahead is not None and known:
                    wanted = ahead.read(number, batch)
                    if LAYER_INPUT in step.residual.values():
                        wanted.streams[LAYER_INPUT] = streams[batch]
                    if take is not None:
                        output = ahead.output(batch)
                elif take is not None or (corrections.sums and batch < self.fitted):
                    with of_wanted.reading() as wanted, reuse_float.batch(batch) as made_float:
                        output = run_float(batch)
                with of_given.reading() as given, statistics.taking() as found, reuse.batch(batch) as made:
                    run(batch)
                if found.inputs and not step.repeats:  # the run ended at the first of the linears that share this input
                    first = found.inputs[0]
                    found.inputs[1:] = [replace(first, name=other) for other in step.names if other != first.name]
                statistics.multiply(found)
                differences = corrections.differences(wanted, given) if batch < self.fitted else {}
                products = corrections.multiply(differences, found.inputs[0].copy) if differences else {}
                kept_float = None if known else wanted.input
                return output, (differences, products), found, [(made_float, kept_float), (made, given.input)]

            run_all = in_order(taken, range(len(calls)), self.device)
            for batch, (output, (differences, products), found, kept) in enumerate(run_all):
                for form, (made, given) in zip(both, kept, strict=True):
                    form.keep(batch, made, given)
                statistics.hold_out(batch >= self.fitted)
                if differences:
                    corrections.add(differences, found.inputs[0].copy, products)
                statistics.add(found)
                if take is not None:
                    assert output is not None
                    take(batch, output)
                del output, differences, products, found, kept, made, given
