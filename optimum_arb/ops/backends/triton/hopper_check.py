"""The fused product on sm_90 compared with a product that is right, before it is used."""

from __future__ import annotations

import torch

from ..packed import PackedWeight
from .gemm_config import GemmConfig, split_of
from .hopper_plan import HopperPlan
from .launch import tensor_class
from .native_launch import prepare
from .outputs import current_stream
from .ready_launches import memory_of


def error(packed: PackedWeight, x: torch.Tensor, expected: torch.Tensor, config: GemmConfig) -> torch.Tensor:
    """The relative error of a product by Triton's own launch, which compiles, and by a native one, if any.

    Args:
        packed: the weight, which "hopper" is written for.
        x: float16 or bfloat16 `[M, K]`, contiguous.
        expected: float64 `[M, N]`.
        config: how.

    Returns:
        A scalar; NaN where anything was not written, infinite where the launches differ in a bit.
    """
    device = x.device
    with torch.cuda.device(device):
        tokens, columns = x.shape
        kind, split_k = tensor_class(x), split_of(config, packed)
        plan = HopperPlan(packed, tokens, columns, kind, x.dtype, None, device, split_k, config)
        # memory that torch hands out may hold what the run before left there, which is right
        outs = [torch.full_like(expected, torch.nan, dtype=x.dtype) for _ in range(2)]
        memory = [x.new_full((plan.scratch,), 255, dtype=torch.uint8) for _ in range(2)]  # NaN, whatever is read
        _launch(plan, x, outs[0], memory[0])
        native = prepare(plan.ready(), device)
        if native is None:
            _launch(plan, x, outs[1], memory[1])
        else:
            addresses = x.data_ptr(), outs[1].data_ptr(), 0, memory[1].data_ptr()
            native.run(current_stream(device.index), *addresses)
        relative = (outs[0].double() - expected).norm() / expected.norm()
        return torch.where((outs[0] == outs[1]).all() | relative.isnan(), relative, torch.inf)


def _launch(plan: HopperPlan, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
    for launch, args in plan.launches(x, None, out, memory_of(scratch)):
        launch(args)
