"""What a linear has to make up for: the errors of what was binarized before it.

By the time a linear is binarized, its inputs are no longer those of the float model, and in the residual stream, to
which it adds, there is an error already. Fitted to the float weight `W` it would hand all of that on. So it is fitted
to the weight that comes closest, on the inputs `x` which it really gets, to what would put things right:

    T = argmin  sum |T x - (W x + s d)|^2 + damping |T - W|^2  =  W + s (sum d x^T) (H + damping I)^-1,   H = sum x x^T

`d` is what the float model's linear puts out less what this one, still float, puts out; where the linear's output is
added to the residual stream, `d` also has what the float model's stream there has and this one has not. `s`, the
strength, is below one because calibration tokens are few.

That inputs differ is taken into account by "asymmetric calibration" (GPTAQ, arXiv 2504.02692) and by QEP (arXiv
2504.09629, whose strength `s` is); the error of the residual stream is added here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..experts.matrices import is_experts
from ..modules import linear_shape
from .reading import Read, Step
from .statistics import Panel, add_product, product_ahead

# of the mean diagonal of H; see docs/method.md
DAMPING = 0.1

# How far a token's residual stream may be off for the correction, in lengths of a usual token of its sequence.
MOST_OFF = 1.0


def _off(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """`wanted - found` `[..., T, N]` in float32, no token's longer than `MOST_OFF` of the median length in `wanted`.

    The first token of a sequence is a thousand times as long as others in many models. Where it is off by a part of
    that, no other token would count in the sums, and what they ask for would be added to all that attend to it.
    """
    wanted = wanted.float()
    change = wanted - found.float()
    # torch refuses medians of a GPU's tensors where it is told to be deterministic, and does not know all on others
    lengths = wanted.norm(dim=-1, keepdim=True).sort(-2).values
    most = MOST_OFF * lengths[..., (lengths.shape[-2] - 1) // 2, None, :]
    return change * (most / change.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1)


class Corrections:
    """`sum d x^T` of the linears of a step, in float64 for the reason that `Statistic` gives.

    With `e` for what the float model's `x` has and this one has not, `d = W e`, and the sum is `W sum e x^T`: where
    linears only share an input they share that sum as well. It takes no product of every token with their weights, and
    less memory. A linear that adds to the residual stream has a sum of its own.

    Args:
        step: the step.
        modules: name -> float module.
        device: where they are.

    Attributes:
        sums: by name of the first of the linears that share one, `sum e x^T` `[K, K]` or `sum d x^T` `[N, K]`.
        members: name -> names of the linears that share it.
        changes: by the same names, what is added to weights, `[K, K]` to be multiplied by the weight, or `[N, K]`.
    """

    def __init__(self, step: Step, modules: Mapping[str, nn.Module], device: torch.device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        linears = {name: modules[name] for name in step.names if not is_experts(modules[name])}
        shapes = {name: linear_shape(module) for name, module in linears.items()}
        self._linears = linears
        self._residual = step.residual
        self.changes: dict[str, torch.Tensor] = {}
        self.shared = bool(linears) and not step.residual
        self.shared &= 2 * sum(rows for rows, _ in shapes.values()) > next(iter(shapes.values()), (0, 0))[1]
        self.members = {next(iter(shapes)): list(shapes)} if self.shared else {name: [name] for name in shapes}
        if step.repeats:
            self.members = {}
        self.sums = {}
        for name in self.members:
            rows, columns = shapes[name]
            self.sums[name] = torch.zeros(columns if self.shared else rows, columns, dtype=wide, device=device)

    def differences(self, wanted: Read, found: Read) -> dict[str, torch.Tensor]:
        """`e` `[..., K]` or `d` `[..., N]`, float32, of one batch, by the names of `sums`.

        Args:
            wanted: of the float layer, on the float model's inputs.
            found: of the layer that is binarized.
        """
        if not self.sums or wanted.input is None or found.input is None:
            return {}
        change = wanted.input.float() - found.input.float()
        if self.shared:
            return dict.fromkeys(self.sums, change)
        result = {}
        for name, module in self._linears.items():
            weight = module.get_parameter("weight")
            product = change.to(weight.dtype) @ (weight if type(module) is Conv1D else weight.T)
            result[name] = product.float()
            if (stream := self._residual.get(name)) is not None:
                result[name] += _off(wanted.streams[stream], found.streams[stream])
        return result

    @staticmethod
    def multiply(differences: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> dict[str, list[Panel] | None]:
        """The products of one batch with its `x` `[..., K]`, by the same names; None where `add` makes it."""
        rows = inputs.detach().flatten(0, -2)
        return {name: product_ahead(each.flatten(0, -2), rows) for name, each in differences.items()}

    def add(
        self,
        differences: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
        made: Mapping[str, list[Panel] | None] | None = None,
    ) -> None:
        """Adds the products of one batch with its `x` `[..., K]`, which may be made already."""
        rows = inputs.detach().flatten(0, -2)
        for name, difference in differences.items():
            add_product(self.sums[name], difference.flatten(0, -2), rows, None if made is None else made[name])

    @torch.no_grad()
    def solve(self, names: Collection[str], hessian: torch.Tensor, strength: float) -> dict[str, torch.Tensor]:
        """Makes of the sums what is added to weights; they are let go.

        Args:
            names: of the linears that are fitted here.
            hessian: their H, `[K, K]`.
            strength: s.

        Returns:
            `changes`.
        """
        sums, self.sums = self.sums, {}
        mean = float(hessian.diagonal().double().mean()) if sums else 0.0
        if not 0 < mean < math.inf:
            return self.changes  # nothing came in, or what no fit can do with, which it says
        lower = None
        for leader, members in self.members.items():
            total = sums.pop(leader)
            if not set(members) & set(names) or not torch.isfinite(total).all() or not total.any():
                continue
            if lower is None:
                damped = hessian.to(total.dtype, copy=True)
                damped.diagonal().add_(DAMPING * mean)
                lower = torch.linalg.cholesky(damped)
                del damped
            self.changes[leader] = torch.cholesky_solve(total.T, lower).T.mul_(strength)
        return self.changes

    @torch.no_grad()
    def corrected(self, name: str) -> nn.Module:
        """The float linear with the weight `T` of the equation above, in float32; as it is where nothing is to be
        corrected."""
        module = self._linears[name]
        leader = next((leader for leader, members in self.members.items() if name in members), None)
        if leader is None or leader not in self.changes:
            return module
        change = self.changes[leader] if self.shared else self.changes.pop(leader)
        weight = module.get_parameter("weight")
        wide = (weight.T if type(module) is Conv1D else weight).to(change.dtype)
        target = wide + wide @ change if self.shared else change.add_(wide)
        target = target.T if type(module) is Conv1D else target
        result = copy.copy(module)
        result._parameters = dict(module._parameters)
        result._parameters["weight"] = nn.Parameter(target.float(), requires_grad=False)
        return result
