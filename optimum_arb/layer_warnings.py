"""Rules by which a binarized layer looks broken, from its errors alone."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

# An error of 1 is that of a layer whose outputs are all zero: above it, the layer does harm.
LOST = 1.0
# A layer that loses so many times what the layers of its kind lose in the median, and a tenth of its output at least
OUTLIER, OUTLIER_FLOOR = 4.0, 0.1
# is compared with the others of its kind where there are so many of them.
PEERS = 4
# Held-out sequences lose so many times what the fitted ones lose, and so much more of the output.
OVERFIT, OVERFIT_FLOOR = 2.0, 0.05


class Measured(Protocol):
    """What a rule looks at; the report's modules have it."""

    @property
    def name(self) -> str: ...
    @property
    def weight_error(self) -> float | None: ...
    @property
    def output_error(self) -> float | None: ...
    @property
    def held_out_error(self) -> float | None: ...


@dataclass(frozen=True)
class LayerWarning:
    """Why a layer looks broken.

    Attributes:
        module: its name.
        rule: "not-finite", "lost", "outlier" or "overfit".
        message: what was seen and what helps, one sentence.
    """

    module: str
    rule: str
    message: str


def layer_warnings(modules: Iterable[Measured]) -> list[LayerWarning]:
    """What looks broken, in the order of the modules; one warning a module, the first rule that holds.

    | rule | holds where |
    |---|---|
    | `not-finite` | an error is NaN or infinite |
    | `lost` | an output error (held-out, else calibration; without calibration the weight error) is 1 or more: zeros would do as well |
    | `outlier` | that error is 4 times the median of the same kind of layer and 0.1 at least, of 4 or more such layers |
    | `overfit` | the held-out error is twice the calibration error and 0.05 more |
    """  # noqa: E501 (a table)
    modules = list(modules)
    kinds: dict[str, list[float]] = defaultdict(list)
    for module in modules:
        error = _judged(module)
        if error is not None and math.isfinite(error):
            kinds[kind_of(module.name)].append(error)
    found = []
    for module in modules:
        warning = _warning(module, kinds[kind_of(module.name)])
        if warning is not None:
            found.append(LayerWarning(module.name, *warning))
    return found


def warning_lines(warnings: Sequence[LayerWarning], most: int = 10) -> list[str]:
    """What looks broken in few lines: where calibration was too short, nearly every layer has the same warning.

    Args:
        warnings: see `layer_warnings`.
        most: of each rule; how many more there are is one more line.
    """
    lines = []
    for rule in dict.fromkeys(warning.rule for warning in warnings):
        found = [warning for warning in warnings if warning.rule == rule]
        lines += [f"{warning.module}: {warning.message}" for warning in found[:most]]
        if len(found) > most:
            lines.append(f"{len(found) - most} more modules for the same reason ({rule})")
    return lines


def kind_of(name: str) -> str:
    """A module's name with its numbers replaced by a star: "model.layers.*.mlp.up_proj"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _judged(module: Measured) -> float | None:
    """The error that says most: on held-out inputs, else on those of the calibration, else of the weight."""
    known = (module.held_out_error, module.output_error, module.weight_error)
    return next((error for error in known if error is not None), None)


def _warning(module: Measured, peers: list[float]) -> tuple[str, str] | None:
    errors = (module.held_out_error, module.output_error, module.weight_error)
    if any(error is not None and not math.isfinite(error) for error in errors):
        return "not-finite", "its error is not finite: weights or activations overflow; load it in a wider dtype"
    error = _judged(module)
    if error is None:
        return None
    if error >= LOST:
        return "lost", (
            f"it loses {error:.2f} of its output, as much as zeros would or more: keep it in float "
            "(modules_to_not_convert) or give it more planes (overrides)"
        )
    middle = statistics.median(peers)
    if len(peers) >= PEERS and error >= OUTLIER_FLOOR and error >= OUTLIER * middle:
        return "outlier", (
            f"it loses {error:.3f}, {error / middle:.1f} times the median of its kind: give it more planes (overrides)"
            if middle > 0
            else f"it loses {error:.3f}, most of its kind nothing: give it more planes (overrides)"
        )
    held_out, fitted = module.held_out_error, module.output_error
    if held_out is None or fitted is None or held_out < max(OVERFIT * fitted, fitted + OVERFIT_FLOOR):
        return None
    return "overfit", (
        f"it loses {held_out:.3f} on held-out and {fitted:.3f} on calibration sequences: calibrate with more text "
        "(num_samples)"
    )
