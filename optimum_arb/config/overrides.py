"""What an entry of `overrides` makes of a configuration."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .choices import BITMAP_METHODS

if TYPE_CHECKING:
    from .arb_config import ARBConfig


def with_choices(base: ARBConfig, choices: dict[str, Any]) -> ARBConfig:
    """A configuration with an override's choices, and without those of its own that the chosen method does not have.

    Raises:
        ValueError, TypeError: what comes of it is none that `ARBConfig` takes.
    """
    config = copy.copy(base)
    config.overrides = {}
    if choices:
        config.target_bits_per_weight = None  # of all linears together
    config.__dict__.update({key: value for key, value in choices.items() if key != "skip"})
    if "method" in choices and choices["method"] not in BITMAP_METHODS:
        config.group_bitmap = choices.get("group_bitmap")
        config.salient_columns = choices.get("salient_columns")
    if "method" in choices and choices["method"] != "arb-hrc":
        none = {"refinement_sweeps": None, "col_scale": None, "admm_iterations": None, "hadamard": 0, "planes": 1}
        config.__dict__.update({name: value for name, value in none.items() if name not in choices})
    if "method" in choices and choices["method"] != "arb-dbf":
        config.rank, config.factor_bits = choices.get("rank"), choices.get("factor_bits")
    if choices.get("method") in BITMAP_METHODS and "scale_bits" not in choices:
        config.scale_bits = None
    if choices.get("method") == "arb-dbf" and "act_order" not in choices:
        config.act_order = None
    for name, other in (("rank", "factor_bits"), ("factor_bits", "rank")):
        if name in choices and other not in choices:
            setattr(config, other, None)  # one decides, and the entry says which
    if choices:
        config.post_init()
    return config
