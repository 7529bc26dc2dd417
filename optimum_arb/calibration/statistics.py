"""The calibration matrix H = X^T X of each linear, gathered by hooks while the model runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class _Sum:
    """X^T X of inputs, and how many were summed."""

    def __init__(self, features: int, device: torch.device):
        self.hessian = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            self.hessian.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]


class _Statistic(_Sum):
    """What one or several linears receive: for the fit, and apart from it what is held out."""

    def __init__(self, features: int, device: torch.device):
        super().__init__(features, device)
        self.held_out: _Sum | None = None
        self.seen: torch.Tensor | None = None

    def hold_out(self, inputs: torch.Tensor) -> None:
        if self.held_out is None:
            self.held_out = _Sum(inputs.shape[-1], inputs.device)
        self.held_out.add(inputs)


class InputStatistics:
    """Gathers the calibration matrices of some linears while the model runs inside this context.

    Linears that receive the very same tensor (query, key and value; gate and up) share one matrix. Call `end_batch`
    after each run of the model: it lets go of the inputs.

    Args:
        linears: name -> module, `nn.Linear` or `Conv1D`.

    Attributes:
        holding_out: while it is True, inputs go into a second matrix, on which nothing is fitted.
    """

    def __init__(self, linears: Mapping[str, nn.Module]):
        self.holding_out = False
        self._linears = linears
        self._statistics: dict[str, _Statistic] = {}
        self._leaders: dict[str, bool] = {}
        self._handles: list = []

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

    def held_out(self, name: str) -> tuple[torch.Tensor | None, int]:
        """The same of the inputs that were held out, and how many there were."""
        statistic = self._statistics.get(name)
        if statistic is None or statistic.held_out is None:
            return None, 0
        return statistic.held_out.hessian, statistic.held_out.tokens

    def _hook(self, name: str):
        def gather(module: nn.Module, args: tuple) -> None:
            inputs = args[0]
            statistic = self._statistics.get(name)
            if statistic is None:
                shared = next((s for s in self._statistics.values() if s.seen is inputs), None)
                statistic = shared or _Statistic(inputs.shape[-1], inputs.device)
                self._statistics[name] = statistic
                self._leaders[name] = shared is None
            if self._leaders[name]:
                (statistic.hold_out if self.holding_out else statistic.add)(inputs)
                statistic.seen = inputs
            elif statistic.seen is not inputs:
                raise RuntimeError(
                    f"{name} shared its input with another linear in the first calibration batch and does not in a "
                    "later one: its calibration matrix cannot be gathered. Set batch_size=1, or skip this module."
                )

        return gather
