"""Whether a configuration is one that this package takes. Every message names the key, its value and what may be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..custom_data import CalibrationInputs, CalibrationTexts, CalibrationTokens
from ..format.layout import GROUP_BITMAPS, MAX_PLANES
from ..format.packing import FORMAT_VERSION, check_block_size
from ..format.scales import SCALE_BITS
from ..patterns import check_pattern
from ..version import FIRST_READERS, __version__
from .choices import (
    AUTO,
    BACKENDS,
    BITMAP_METHODS,
    COMPENSATIONS,
    HADAMARD_BLOCKS,
    METHODS,
    OVERRIDABLE,
    REFINEMENTS,
    SIZES,
    SPLIT_METRICS,
)
from .overrides import with_choices

if TYPE_CHECKING:
    from .arb_config import ARBConfig


def check_config(config: ARBConfig) -> None:
    """
    Raises:
        ValueError, TypeError: a value that there is not, or that does nothing with the method.
    """
    _check_general(config)
    _check_bitmap(config)
    _check_planes(config)
    _check_search(config)
    _check_factors(config)
    _check_scale_bits(config)
    _check_error_correction(config)
    _check_refine(config)
    _check_target(config)
    _check_mappings(config)
    _check_patterns(config)


def _check_general(config: ARBConfig) -> None:
    """What every method has."""
    _one_of("method", config.method, (*METHODS, AUTO))
    _one_of("compensation", config.compensation, COMPENSATIONS)
    _one_of("split_metric", config.split_metric, SPLIT_METRICS)
    _one_of("backend", config.backend, BACKENDS)
    _integer("planes", config.planes, 1, MAX_PLANES)
    for name in ("num_samples", "sequence_length"):
        _integer(name, getattr(config, name), 1)
    for name in ("num_iterations", "batch_size"):
        if getattr(config, name) is not None:
            _integer(name, getattr(config, name), 1)
    if not isinstance(config.seed, int) or isinstance(config.seed, bool):
        raise TypeError(f"seed={config.seed!r} is no whole number.")
    if not isinstance(config.max_memory, (dict, type(None))):
        raise TypeError(
            f"max_memory={config.max_memory!r} is no table: give one of devices and sizes, such as "
            "{0: '20GB', 'cpu': '60GB'}."
        )
    if not isinstance(config.act_order, (bool, type(None))):
        raise TypeError(f"act_order={config.act_order!r} must be True, False or None.")
    _integer("held_out_samples", config.held_out_samples, 0, config.num_samples - 1)
    if config.held_out_samples and config.dataset is None:
        raise ValueError(f"held_out_samples={config.held_out_samples} needs a dataset, of which they are a part.")
    if not isinstance(config.block_size, int) or isinstance(config.block_size, bool):
        raise TypeError(f"block_size={config.block_size!r} is no whole number.")
    check_block_size(config.block_size)
    damping = config.resolved_damp_percent
    if not isinstance(damping, (int, float)) or not 0 <= damping < 10:
        raise ValueError(f"damp_percent={config.damp_percent!r} must be a number from 0 to 10; 0.01 is usual.")
    given = (str, CalibrationTexts, CalibrationTokens, CalibrationInputs)
    if config.dataset is not None and not isinstance(config.dataset, given):
        raise TypeError(
            f"dataset={config.dataset!r} must be a name, a path, a list of strings or of model inputs, a tensor of "
            "token ids, or None."
        )
    for name in ("other_modalities", "verify_checksums"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name}={getattr(config, name)!r} must be True or False.")
    if not isinstance(config.modules_to_not_convert, (list, tuple, type(None))):
        raise TypeError(f"modules_to_not_convert={config.modules_to_not_convert!r} must be a list of patterns.")


def _check_bitmap(config: ARBConfig) -> None:
    """The splits of the papers' methods."""
    if config.method not in BITMAP_METHODS:
        for name in ("group_bitmap", "salient_columns"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} does nothing with method={config.method!r}: "
                    f"only {', '.join(BITMAP_METHODS)} have it."
                )
    if config.group_bitmap is not None:
        _one_of("group_bitmap", config.group_bitmap, GROUP_BITMAPS)
    if config.salient_columns is not None and config.salient_columns != "search":
        _integer("salient_columns", config.salient_columns, 0, 64 if config.block_size == 64 else 127)


def _check_planes(config: ARBConfig) -> None:
    """The form of the planes of "arb-hrc"."""
    if config.planes > 1 and config.method != "arb-hrc":
        raise ValueError(f"planes={config.planes} needs method='arb-hrc': {config.method!r} has a fixed form.")
    if config.refinement_sweeps is not None:
        _integer("refinement_sweeps", config.refinement_sweeps, 0)
        if config.method != "arb-hrc":
            raise ValueError(
                f"refinement_sweeps={config.refinement_sweeps} needs method='arb-hrc': {config.method!r} has none."
            )
    if config.col_scale is not None:
        if not isinstance(config.col_scale, bool):
            raise TypeError(f"col_scale={config.col_scale!r} must be True, False or None.")
        if config.method != "arb-hrc":
            raise ValueError(
                f"col_scale={config.col_scale} needs method='arb-hrc': {config.method!r} has a fixed form."
            )


def _check_scale_bits(config: ARBConfig) -> None:
    if config.scale_bits is not None and (type(config.scale_bits) is not int or config.scale_bits not in SCALE_BITS):
        raise ValueError(f"scale_bits={config.scale_bits!r} must be 16 or 8.")
    if config.scale_bits == 8 and config.method in BITMAP_METHODS:
        raise ValueError(
            f"scale_bits=8 needs method 'rtn', 'arb-hrc' or 'arb-dbf': the scales of {config.method!r} may be "
            "negative, or are means."
        )


def _check_mappings(config: ARBConfig) -> None:
    for name in ("overrides", "calibration", "base_model", "perplexity"):
        if not isinstance(getattr(config, name), (dict, type(None))):
            raise TypeError(f"{name}={getattr(config, name)!r} must be a dictionary.")


def _check_patterns(config: ARBConfig) -> None:
    """Overrides, each with what it makes of the configuration, and modules that stay in float."""
    for pattern, choices in config.overrides.items():
        check_pattern(pattern)
        if not isinstance(choices, dict):
            raise TypeError(f"overrides[{pattern!r}]={choices!r} must be a dictionary of choices.")
        unknown = sorted(set(choices) - set(OVERRIDABLE) - {"skip"})
        if unknown:
            raise ValueError(
                f"overrides[{pattern!r}] has the unknown key {unknown[0]!r}: it may change "
                f"{', '.join(OVERRIDABLE)} or say skip."
            )
        if not isinstance(choices.get("skip", False), bool):
            raise TypeError(f"overrides[{pattern!r}]['skip']={choices['skip']!r} must be True or False.")
        if not choices.get("skip"):
            with_choices(config, choices)
    for pattern in config.modules_to_not_convert or ():
        check_pattern(pattern)


def _check_search(config: ARBConfig) -> None:
    """How the planes of "arb-hrc" are found, and under what."""
    if config.admm_iterations is not None:
        _integer("admm_iterations", config.admm_iterations, 0)
    shrinkage = config.resolved_shrinkage
    if not isinstance(shrinkage, (int, float)) or isinstance(shrinkage, bool) or not 0 <= shrinkage < 1:
        raise ValueError(f"shrinkage={config.shrinkage!r} must be a number from 0 to below 1; 0.05 is usual.")
    if type(config.hadamard) is not int or config.hadamard not in HADAMARD_BLOCKS:
        raise ValueError(f"hadamard={config.hadamard!r} is unknown: use 64, 128 or 256, or 0 for none.")
    for name in ("admm_iterations", "hadamard"):
        if getattr(config, name) and config.method not in ("arb-hrc", AUTO):
            raise ValueError(f"{name}={getattr(config, name)} needs method='arb-hrc': {config.method!r} has none.")
    if config.hadamard and config.dataset is None:
        raise ValueError(f"hadamard={config.hadamard} does nothing without calibration: give a dataset.")


def _check_error_correction(config: ARBConfig) -> None:
    strength = config.error_correction
    if strength is None:
        return
    if not isinstance(strength, (int, float)) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise ValueError(f"error_correction={strength!r} must be a number from 0 to 1; 0.75 is usual.")
    if strength and config.dataset is None:
        raise ValueError(f"error_correction={strength} does nothing without calibration: give a dataset.")


def _check_refine(config: ARBConfig) -> None:
    """The choices of refinement by output."""
    for name in ("refine_steps", "refine_learning_rate", "refine_signs"):
        if getattr(config, name) is not None and config.refine is None:
            raise ValueError(f"{name}={getattr(config, name)!r} does nothing without refine='block' or 'model'.")
    if config.refine is None:
        return
    _one_of("refine", config.refine, REFINEMENTS)
    if config.dataset is None:
        raise ValueError(f"refine={config.refine!r} needs a calibration text: give a dataset.")
    if config.refine_steps is not None:
        _integer("refine_steps", config.refine_steps, 1)
    rate = config.refine_learning_rate
    if rate is not None and (not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < 1):
        raise ValueError(f"refine_learning_rate={rate!r} must be a number between 0 and 1; 0.005 is usual.")
    if not isinstance(config.refine_signs, (bool, type(None))):
        raise TypeError(f"refine_signs={config.refine_signs!r} must be True, False or None.")


def _check_target(config: ARBConfig) -> None:
    """The budget of bits that is divided among the linears."""
    target = config.target_bits_per_weight
    if target is None:
        if config.method == AUTO:
            raise ValueError("method='auto' compares methods at equal bits: give target_bits_per_weight.")
        return
    if not isinstance(target, (int, float)) or isinstance(target, bool) or not 0 < target <= 16:
        raise ValueError(f"target_bits_per_weight={target!r} must be a number of bits, above 0 and at most 16.")
    if config.method not in SIZES:
        raise ValueError(
            f"target_bits_per_weight={target} needs method {', '.join(map(repr, SIZES))}: {config.method!r} has one "
            "size, and nothing to choose."
        )
    if config.dataset is None:
        raise ValueError(f"target_bits_per_weight={target} is divided by what calibration tells: give a dataset.")
    for name, usual in (("planes", 1), ("rank", None), ("factor_bits", None)):
        if getattr(config, name) != usual:
            raise ValueError(
                f"{name}={getattr(config, name)} and target_bits_per_weight={target} both decide the bits: give one "
                "of them, or the former as an override of some modules."
            )


def _check_factors(config: ARBConfig) -> None:
    """The choices of "arb-dbf"."""
    for name in ("rank", "factor_bits"):
        if getattr(config, name) is not None and not config.factorized:
            raise ValueError(
                f"{name}={getattr(config, name)!r} needs method='arb-dbf': {config.method!r} has no factors."
            )
    if config.rank is not None:
        _integer("rank", config.rank, 1)
    bits = config.factor_bits
    if bits is not None and (not isinstance(bits, (int, float)) or isinstance(bits, bool) or not 0 < bits <= 16):
        raise ValueError(f"factor_bits={bits!r} must be a number of bits a weight, above 0 and at most 16.")
    if config.rank is not None and bits is not None:
        raise ValueError(f"rank={config.rank} and factor_bits={bits} both decide the rank: give one of them.")
    if config.factorized and config.act_order:
        raise ValueError("act_order=True does nothing with method='arb-dbf', which orders no columns.")


def check_format(version: Any, requires: Any, written_by: Any) -> None:
    """Whether this package reads a format.

    Raises:
        ValueError: it does not; the message says which version does, as far as the model says so in a form that can be
            trusted in a command.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format_version={version!r} in the quantization_config is no format of optimum_arb's.")
    if version in FIRST_READERS:
        return
    needed = requires if re.fullmatch(r"optimum-arb>=[0-9][0-9A-Za-z.]*", str(requires)) else None
    if needed is None and re.fullmatch(r"[0-9][0-9A-Za-z.]*", str(written_by)):
        needed = f"optimum-arb>={written_by}"
    raise ValueError(
        f"This model has format version {version} (written by optimum_arb {written_by or 'unknown'}); the installed "
        f"optimum_arb {__version__} reads up to {FORMAT_VERSION}. Upgrade it: pip install -U "
        + (f'"{needed}"' if needed else "optimum-arb")
    )


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}.")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name}={value!r} must be a whole number {bound}.")
