"""What the vLLM plug-in refuses of binarized experts, by vLLM's own descriptions of them; without an engine."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optimum_arb import ARBConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: scripts/vllm_tests.sh"
)

PREFIX = "model.layers.3.mlp.experts"


def method_and_layer(parallel: dict[str, Any], experts: dict[str, Any], layer: dict[str, Any]):
    """Of four experts, as vLLM makes them but for what is said."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    from optimum_arb.integrations.vllm.experts import ARBExpertsMethod

    activation = MoEActivation(layer.pop("activation", "silu"))
    moe = FusedMoEConfig(
        num_experts=4,
        experts_per_token=2,
        hidden_dim=64,
        intermediate_size=128,
        num_local_experts=4,
        num_logical_experts=4,
        activation=activation,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=replace(FusedMoEParallelConfig.make_no_parallel(), **parallel),
        in_dtype=torch.float32,
        **experts,
    )
    config = ARBConfig(method="rtn", dataset=None)
    described = {"swiglu_limit": None, "apply_router_weight_on_input": False, "global_num_experts": 4, **layer}
    module = torch.nn.Module()
    module.__dict__.update(SimpleNamespace(activation=activation, **described).__dict__)
    return ARBExpertsMethod(moe, PREFIX, {"w13": config, "w2": config}), module


def create(method, layer) -> None:
    method.create_weights(layer, 4, 64, 128, torch.float32)


def test_what_is_run():
    method, layer = method_and_layer({}, {}, {})
    create(method, layer)
    assert layer.arb_experts == [0, 1, 2, 3]
    assert layer.w13_weight.weight_loader is not None


@pytest.mark.parametrize(
    ("parallel", "experts", "layer", "obstacle"),
    [
        ({}, {"has_bias": True}, {}, "their linears have biases"),
        ({"dp_size": 2, "tp_size": 2}, {}, {}, "the data parallel size is 2 (tensor_parallel_size divides them)"),
        (
            {"dp_size": 2, "ep_size": 2, "use_ep": True},
            {},
            {},
            "the data parallel size is 2 (tensor_parallel_size divides them)",
        ),
        ({}, {}, {"activation": "swigluoai"}, "their activation is swigluoai"),
        ({}, {}, {"swiglu_limit": 7.0}, "their activation is clamped"),
        ({}, {}, {"apply_router_weight_on_input": True}, "their inputs are weighted, not their outputs"),
        (
            {"dp_size": 4, "tp_size": 4},
            {"has_bias": True},
            {},
            "their linears have biases, the data parallel size is 4 (tensor_parallel_size divides them)",
        ),
    ],
)
def test_what_is_refused(parallel, experts, layer, obstacle):
    method, module = method_and_layer(parallel, experts, layer)
    with pytest.raises(
        ValueError, match=rf"^{PREFIX}: .*: {re.escape(obstacle)}\. .*modules_to_not_convert=\['experts'\]"
    ):
        create(method, module)
    assert not dict(module.named_parameters())


def test_load_balancing_is_refused_by_vllm():
    method, _ = method_and_layer({}, {}, {})
    assert not method.supports_eplb
