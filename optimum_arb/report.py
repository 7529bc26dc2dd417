"""What was binarized, how well, in how many bits, and what stayed in float and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .conversion import Record
from .format.packing import stored_bytes
from .layer_warnings import LayerWarning, layer_warnings, warning_lines
from .modules import parameter_bytes
from .nn import ARBExperts, ARBLinear
from .result import Result


@dataclass(frozen=True)
class ModuleReport:
    """One binarized linear, or one matrix of all experts of a layer.

    Attributes:
        name: its name in the model (of experts: the parameter's).
        method: the method that made it.
        layout: the name of its layout.
        weights: number of weights that it stands for.
        bits_per_weight: all stored bits of its packed weight over `weights`.
        stored_bytes: bytes of its packed weight (without the bias, which stays as it was).
        weight_error: squared error of the weight over its squared norm, with error correction of the weight that was
            fitted in place of the model's; None for a model loaded binarized.
        output_error: the same of its outputs on the calibration tokens; None without calibration.
        experts: of experts, how many there are; None for a linear.
        starved: of experts, how many were binarized from their weights alone, since fewer calibration tokens than
            `experts.conversion.STARVED_TOKENS` were routed to them.
        planes: sign planes of all columns.
        block_size: columns that share a row scale.
        tokens: calibration tokens that reached it (of experts: summed over them).
        held_out_error: as `output_error`, on the calibration sequences that nothing was fitted to; None without such.
        held_out_tokens: how many of their tokens reached it.
        hadamard_gain: by how much a Hadamard transform of its inputs lowers the output error, as far as fits of some of
            its rows tell: it has one where this is above 1. None where none was asked for.
    """

    name: str
    method: str
    layout: str
    weights: int
    bits_per_weight: float
    stored_bytes: int
    weight_error: float | None
    output_error: float | None
    experts: int | None = None
    starved: int = 0
    planes: int = 1
    block_size: int = 128
    tokens: int = 0
    held_out_error: float | None = None
    held_out_tokens: int = 0
    hadamard_gain: float | None = None


@dataclass(frozen=True)
class ModelReport(Result):
    """A binarized model.

    Attributes:
        modules: the binarized modules, in the model's order.
        kept: module (or parameter) that stayed in float -> the reason.
        bits_per_weight: all stored bits of the binarized weights over their number.
        packed_bytes: bytes of the binarized weights.
        model_bytes: bytes of the whole model, embeddings and whatever stayed in float included.
    """

    modules: tuple[ModuleReport, ...]
    kept: dict[str, str]
    bits_per_weight: float
    packed_bytes: int
    model_bytes: int

    @property
    def mean_output_error(self) -> float | None:
        return _mean(module.output_error for module in self.modules)

    @property
    def mean_weight_error(self) -> float | None:
        return _mean(module.weight_error for module in self.modules)

    @property
    def mean_held_out_error(self) -> float | None:
        return _mean(module.held_out_error for module in self.modules)

    @property
    def warnings(self) -> list[LayerWarning]:
        """What looks broken, see `optimum_arb.layer_warnings`."""
        return layer_warnings(self.modules)

    def figures(self) -> dict[str, float | int | None]:
        """What a table of models shows of it: bits, bytes, and means of the modules' relative errors."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "packed_bytes": self.packed_bytes,
            "model_bytes": self.model_bytes,
            "modules": len(self.modules),
            "weight_error": self.mean_weight_error,
            "output_error": self.mean_output_error,
        }

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{len(self.modules)} modules binarized at {self.bits_per_weight:.3f} bits a weight, "
            f"{self.packed_bytes / 2**20:.2f} MiB; the whole model is {self.model_bytes / 2**20:.2f} MiB."
        ]
        if self.mean_output_error is not None:
            lines[0] += f" Mean relative output error {self.mean_output_error:.4f}."
        if self.mean_held_out_error is not None:
            lines[0] += f" On held-out sequences {self.mean_held_out_error:.4f}."
        if experts := [module for module in self.modules if module.experts is not None]:
            counts = " or ".join(map(str, sorted({module.experts or 0 for module in experts})))
            starved = sum(module.starved for module in experts)
            lines.append(
                f"{len(experts)} of the modules are matrices of {counts} experts each; {starved} of "
                f"{sum(module.experts or 0 for module in experts)} such matrices were starved: too few calibration "
                "tokens reached the expert, and they were binarized from their weights alone."
                if starved
                else f"{len(experts)} of the modules are matrices of {counts} experts each."
            )
        # experts have said above what they lacked
        unseen = [module.name for module in self.modules if module.output_error is None and module.experts is None]
        if unseen and self.mean_output_error is not None:
            lines.append(
                f"Without calibration ({len(unseen)}): {', '.join(unseen[:3])}{', ...' * (len(unseen) > 3)}: no "
                "calibration input reached them."
            )
        lines += [f"LOOKS BROKEN: {line}." for line in warning_lines(self.warnings)]
        for reason, count in Counter(self.kept.values()).items():
            names = [name for name, why in self.kept.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"In float ({count}): {shown}: {reason}.")
        return "\n".join(lines)


def model_report(model: nn.Module) -> ModelReport:
    """The report of a model that is binarized now, whether it was binarized on load or loaded so.

    Raises:
        ValueError: the model has no binarized module.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    records: dict[str, Record] = getattr(quantizer, "records", {})
    config = getattr(quantizer, "quantization_config", None)
    default = Record(getattr(config, "method", "unknown"))
    modules = []
    for name, module in model.named_modules():
        if isinstance(module, ARBLinear):
            record = records.get(name, default)
            modules.append(
                ModuleReport(
                    name=name,
                    method=record.method,
                    layout=module.layout_name,
                    weights=module.in_features * module.out_features,
                    bits_per_weight=module.bits_per_weight(),
                    stored_bytes=stored_bytes(module.packed()),
                    weight_error=record.weight_error,
                    output_error=record.output_error,
                    planes=module.layout.planes,
                    block_size=module.block_size,
                    tokens=record.tokens,
                    held_out_error=record.held_out_error,
                    held_out_tokens=record.held_out_tokens,
                    hadamard_gain=record.hadamard_gain,
                )
            )
        elif isinstance(module, ARBExperts):
            for key, form in module.forms.items():
                record = records.get(f"{name}.{key}", default)
                modules.append(
                    ModuleReport(
                        name=f"{name}.{key}",
                        method=record.method,
                        layout=form.layout.name,
                        weights=module.float_matrices[key].weights,
                        bits_per_weight=module.bits_per_weight(key),
                        stored_bytes=stored_bytes(module.packed(key)),
                        weight_error=record.weight_error,
                        output_error=record.output_error,
                        experts=form.experts,
                        starved=record.starved,
                        planes=form.layout.planes,
                        block_size=form.block_size,
                        tokens=record.tokens,
                        held_out_error=record.held_out_error,
                        held_out_tokens=record.held_out_tokens,
                    )
                )
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no binarized module: load it with quantization_config=ARBConfig()."
        )
    packed = sum(module.stored_bytes for module in modules)
    return ModelReport(
        modules=tuple(modules),
        kept=dict(getattr(quantizer, "kept", {})),
        bits_per_weight=packed * 8 / sum(module.weights for module in modules),
        packed_bytes=packed,
        model_bytes=parameter_bytes(model),
    )


def _mean(errors: Iterable[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None
