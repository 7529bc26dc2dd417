"""What merging adapters by binarizing again has cost."""

from __future__ import annotations

from dataclasses import dataclass

from ..result import Result


@dataclass(frozen=True)
class ModuleMerge:
    """One layer whose adapter was merged by binarizing again.

    Attributes:
        name: the module.
        error: squared error of the new packed weight against the merged float weight, relative to that weight's own
            squared norm; of the layer's outputs on the calibration text if there was one, else of the weights.
        error_without_adapter: the same of the packed weight before, which is how much the adapter had changed.
        rebinarized: False where the packed weight of before was at least as near to the merged one as the new fit was:
            it has been left as it was, and the adapter of this layer is lost.
    """

    name: str
    error: float
    error_without_adapter: float
    rebinarized: bool


@dataclass(frozen=True)
class MergeReport(Result):
    """What merging by binarizing again has cost.

    Attributes:
        modules: the packed layers that had an adapter.
        calibrated: whether the errors are those of outputs on calibration text; else those of weights.
    """

    modules: tuple[ModuleMerge, ...]
    calibrated: bool

    @property
    def mean_error(self) -> float:
        return sum(module.error for module in self.modules) / len(self.modules)

    @property
    def mean_error_without_adapter(self) -> float:
        return sum(module.error_without_adapter for module in self.modules) / len(self.modules)

    def summary(self) -> str:
        """A few lines for a terminal."""
        kind = "outputs on the calibration text" if self.calibrated else "weights"
        lost = [module.name for module in self.modules if not module.rebinarized]
        worst = max(self.modules, key=lambda module: module.error)
        lines = [
            f"{len(self.modules)} adapters merged by binarizing again. Mean relative squared error of the {kind}: "
            f"{self.mean_error:.4f} (leaving the adapters out: {self.mean_error_without_adapter:.4f}).",
            f"Worst: {worst.name} {worst.error:.4f} (without its adapter {worst.error_without_adapter:.4f}).",
        ]
        if lost:
            shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
            lines.append(
                f"{len(lost)} layers stayed as they were, nearer to the merged weight than a new fit: {shown}."
            )
        return "\n".join(lines)
