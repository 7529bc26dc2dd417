"""A layer binarized in the steps in which it runs, each fitted to make up for the errors before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .activations import Activations, EveryOther
from .calls import Call, layer_runs
from .correction import Corrections, Read, Reading, Step, find_steps, sharing_weights
from .distributed import Ranks
from .experts import LayerStatistics, Taken
from .fitting import Fitting
from .workers import in_order

# of a batch's number and the float layer's output for it
TakeOutput = Callable[[int, torch.Tensor], None]


@dataclass
class Steps:
    """Binarizes layers step by step.

    Attributes:
        fitting: binarizes modules.
        ranks: the processes that do this together.
        device: where the layer is.
        fitted: how many batches something may be fitted to.
        keep: whether the statistics, and the modules with the weights that were fitted, are asked for.
    """

    fitting: Fitting
    ranks: Ranks
    device: torch.device
    fitted: int
    keep: bool

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
        steps = None
        if calls:
            run = layer_runs(layer, EveryOther(hidden), calls, self.device)
            steps = find_steps(layer, modules, lambda: run(0))
        steps = self.ranks.exchange(steps, "looking at how a layer runs")[0]
        assert steps is not None  # the first rank has batches
        fitted: dict[str, nn.Module] = {}
        every = LayerStatistics(modules)
        for step in steps:
            statistics = LayerStatistics({target: modules[target] for target in step.names})
            statistics.corrections = Corrections(step, modules, self.device)
            last = step is steps[-1]
            self._gather(name, layer, of_float, step, statistics, hidden, calls, take if last else None)
            fitted |= self.fitting.binarize(step.names, statistics, self.keep)
            if self.keep:
                every.absorb(statistics)
        return fitted, every

    def _gather(
        self,
        name: str,
        layer: nn.Module,
        of_float: nn.Module,
        step: Step,
        statistics: LayerStatistics,
        hidden: Activations,
        calls: list[Call],
        take: TakeOutput | None,
    ) -> None:
        """Runs both forms of a layer up to a step, the float one to its end where its outputs are taken."""
        corrections = statistics.corrections
        assert corrections is not None
        run_float = layer_runs(of_float, EveryOther(hidden, 0), calls, self.device)
        run = layer_runs(layer, EveryOther(hidden), calls, self.device)
        with (
            statistics,
            Reading(of_float, name, step, whole=take is not None) as of_wanted,
            Reading(layer, name, step, whole=False) as of_given,
        ):

            def taken(batch: int) -> tuple[torch.Tensor | None, dict[str, torch.Tensor], Taken]:
                output, wanted = None, Read()
                if take is not None or (corrections.sums and batch < self.fitted):
                    with of_wanted.reading() as wanted:
                        output = run_float(batch)
                with of_given.reading() as given, statistics.taking() as found:
                    run(batch)
                if found.inputs:  # the run ended at the first of the linears that share this input
                    first = found.inputs[0]
                    found.inputs[1:] = [replace(first, name=other) for other in step.names if other != first.name]
                differences = corrections.differences(wanted, given) if batch < self.fitted else {}
                return output, differences, found

            for batch, (output, differences, found) in enumerate(in_order(taken, range(len(calls)), self.device)):
                statistics.hold_out(batch >= self.fitted)
                if differences:
                    corrections.add(differences, found.inputs[0].copy)
                statistics.add(found)
                if take is not None:
                    assert output is not None
                    take(batch, output)
                del output, differences, found
