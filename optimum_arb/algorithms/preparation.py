"""What a fit makes of its calibration matrix without looking at the weight: for several weights once, and wherever
there is time for it.

    H  ->  damped and factorized  ->  with arb-hrc's search of all blocks at once, rho (H + rho I)^-1 of each rho
"""

from __future__ import annotations

import torch

from ..config import ARBConfig
from .admm import pull_parts
from .hessian import PreparedHessian, prepare_hessian
from .shared_work import Part, share


def prepared_part(hessian: torch.Tensor, config: ARBConfig, act_order: bool | None = None) -> Part[PreparedHessian]:
    """The calibration matrix, made ready for a fit by any method but arb-dbf, without a Hadamard transform.

    Args:
        hessian: `[K, K]`.
        config: the choices, overrides applied.
        act_order: whether columns are permuted; as `config` says unless given.
    """
    whole = bool(config.resolved_admm_iterations)  # only fits of one block after the other look at the inverse
    ordered = config.resolved_act_order if act_order is None else act_order
    options = config.resolved_damp_percent, ordered, config.resolved_shrinkage, not whole

    def make() -> PreparedHessian:
        prepared = prepare_hessian(hessian, *options)
        if config.method == "arb-hrc":
            # here and not at its first use: other fits, on streams of their own, wait for what is made here alone
            share(prepared.damped)
        return prepared

    return Part(hessian, options, make)


def parts_of_damped(damped: torch.Tensor, config: ARBConfig) -> list[Part[torch.Tensor]]:
    """What the same fit makes of the damped matrix `[K, K]` then, each from it alone, in the order of their use."""
    iterations = config.resolved_admm_iterations
    return pull_parts(damped, iterations, config.resolved_col_scale) if iterations else []
