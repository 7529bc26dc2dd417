"""The experts of one layer: calibrated per expert, or from the weights alone."""

from __future__ import annotations

import pytest
import torch
from tiny_experts import experts_of, routing
from torch import nn

from optimum_arb import ARBConfig
from optimum_arb.calibration.experts import LayerStatistics, RoutedInputs
from optimum_arb.conversion import binarize_linear
from optimum_arb.experts.conversion import STARVED_TOKENS, binarize_experts, binarize_matrix, fixed_salient
from optimum_arb.experts.matrices import expert_matrices
from optimum_arb.nn import ARBExperts


def config(**choices) -> ARBConfig:
    return ARBConfig(**{"block_size": 64, **choices})


def both(choices: ARBConfig) -> dict[str, ARBConfig]:
    return dict.fromkeys(("gate_up_proj", "down_proj"), choices)


def routed_inputs(tokens: int = 200, skewed: bool = False) -> tuple[RoutedInputs, torch.Tensor, torch.Tensor]:
    """Inputs in three runs; if skewed, expert 3 gets 2 of them and expert 1 none."""
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    index, _ = routing(tokens, 4)
    if skewed:
        index = torch.tensor([[0, 2]]).repeat(tokens, 1)
        index[5, 0] = index[9, 0] = 3
    routed = RoutedInputs(4)
    for part, where in zip(x.split(70), index.split(70), strict=True):
        routed.add(part, where)
    return routed, x, index


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.detach().clone()
    return linear


def test_inputs_of_each_expert_in_their_order():
    routed, x, index = routed_inputs()
    for expert in range(4):
        assert torch.equal(routed.rows(expert), x[(index == expert).any(1)])
    assert routed.tokens() == [int((index == expert).sum()) for expert in range(4)]
    assert sum(routed.tokens()) == index.numel()


def test_nothing_was_routed():
    assert RoutedInputs(4).tokens() == [0] * 4


def test_hooks_gather_what_the_module_receives():
    module = experts_of("MixtralForCausalLM")
    linear = nn.Linear(64, 64, bias=False)
    x, (index, weights) = torch.randn(6, 64), routing(6, 4)
    with LayerStatistics({"experts": module, "linear": linear}) as statistics, torch.no_grad():
        module(x, index, weights)
        statistics.end_batch()
        module(linear(x), top_k_index=index, top_k_weights=weights)
    module(x, index, weights)  # outside: not gathered
    routed = statistics.experts["experts"]
    assert routed.tokens() == [2 * int((index == expert).sum()) for expert in range(4)]
    mine = (index == 2).any(1)
    assert torch.equal(routed.rows(2), torch.cat([x[mine], linear(x)[mine]]))
    torch.testing.assert_close(statistics.linears.hessian("linear"), x.T @ x)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("method", ["arb-hrc", "arb-rc"])
def test_each_expert_is_binarized_as_a_linear_under_its_own_inputs(family, method):
    """gate and up under the inputs that were routed to the expert, down under what the expert makes of them."""
    module = experts_of(family)
    choices = config(method=method, **({"salient_columns": 3, "num_iterations": 2} if method == "arb-rc" else {}))
    routed, x, index = routed_inputs()
    packed, records = binarize_experts("experts", module, routed, both(choices))
    lost = {"gate_up_proj": [0.0, 0.0], "down_proj": [0.0, 0.0]}
    for expert in range(4):
        rows = x[(index == expert).any(1)]
        up, down = module.gate_up_proj[expert], module.down_proj[expert]
        if family == "GptOssForCausalLM":
            middle = module._apply_gate(rows @ up + module.gate_up_proj_bias[expert])
            parts, down = [up.T], down.T
        else:
            middle = module._apply_gate(rows @ up.T)
            parts = list(up.chunk(2))
        for name, inputs, matrices in (("gate_up_proj", rows, parts), ("down_proj", middle, [down])):
            hessian = (inputs.T @ inputs).detach()
            for part, matrix in enumerate(matrices):
                expected, record = binarize_linear("linear", linear_of(matrix), choices, hessian, len(rows))
                found = packed.binarized(name, expert, part).dequantize()
                # sums over the inputs in another order may turn a sign that hardly matters
                assert (found != expected.dequantize()).float().mean() < 0.02
                energy = float(((matrix @ hessian) * matrix).sum().detach())
                lost[name][0] += record.output_error * energy
                lost[name][1] += energy
    for name, record in records.items():
        assert record.method == method
        assert (record.experts, record.starved, record.tokens) == (4, 0, 400)
        assert record.output_error == pytest.approx(lost[name][0] / lost[name][1], rel=0.02)
        assert 0 < record.weight_error < 1


def test_starved_experts_are_binarized_from_their_weights_alone_and_counted():
    module = experts_of("MixtralForCausalLM")
    choices = config(method="arb-hrc", act_order=True)
    packed, records = binarize_experts("experts", module, routed_inputs(skewed=True)[0], both(choices))
    assert [records[name].starved for name in both(choices)] == [2, 2]
    free = ARBExperts(module)
    for name, matrix in expert_matrices(module).items():
        binarize_matrix(name, matrix, module.get_parameter(name), config(method="arb-hrc", dataset=None), free)
        for expert in range(4):
            same = torch.equal(packed.dequantize(name)[expert], free.dequantize(name)[expert])
            assert same == (expert in (1, 3))
    # the others have a permutation; theirs leaves the columns where they are
    assert torch.equal(packed.gate_up_proj_permutation[3, 1], torch.arange(64, dtype=torch.int16))


def test_the_bound_for_starving():
    module = experts_of("MixtralForCausalLM")
    x = torch.randn(2 * STARVED_TOKENS - 1, 64)
    routed = RoutedInputs(4)
    index = torch.tensor([[0]] * STARVED_TOKENS + [[1]] * (STARVED_TOKENS - 1))
    routed.add(x, index)
    _, records = binarize_experts("experts", module, routed, {"down_proj": config(method="rtn")})
    assert list(records) == ["down_proj"]
    assert records["down_proj"].starved == 3


@pytest.mark.parametrize("method", ["billm", "arb", "arb-x", "arb-rc"])
def test_a_searched_number_of_salient_columns_is_one_for_all(method):
    module = experts_of("MixtralForCausalLM")
    choices = config(method=method, num_iterations=1)
    assert choices.resolved_salient_columns == "search"
    packed, _ = binarize_experts("experts", module, routed_inputs()[0], both(choices))
    per_block = packed.gate_up_proj_salient_columns.shape[-1]
    assert 1 <= per_block < 50
    # 96 columns are a block of 64 and one of 32
    assert packed.down_proj_salient_columns.shape[-1] % 2 == 0
    matrix = expert_matrices(module)["gate_up_proj"]
    samples = [(module.gate_up_proj[expert].detach(), None) for expert in range(4)]
    assert isinstance(fixed_salient(choices, matrix, iter(samples)).salient_columns, int)
    assert choices.salient_columns is None


def test_a_given_number_of_salient_columns_is_taken():
    module = experts_of("MixtralForCausalLM")
    choices = config(method="arb-rc", salient_columns=5, num_iterations=1)
    packed, _ = binarize_experts("experts", module, routed_inputs()[0], both(choices))
    assert packed.gate_up_proj_salient_columns.shape == (4, 2, 5)
    assert packed.down_proj_salient_columns.shape == (4, 1, 10)
    none = config(method="arb-rc", salient_columns=0, num_iterations=1)
    packed, _ = binarize_experts("experts", module, routed_inputs()[0], both(none))
    assert not any("salient" in name for name in packed.packed_names())


def test_nan_names_the_expert():
    module = experts_of("MixtralForCausalLM")
    routed, x, index = routed_inputs()
    bad = RoutedInputs(4)
    bad.add(torch.where((index == 2).any(1)[:, None], torch.nan, x), index)
    with pytest.raises(ValueError, match=r"layer.gate_up_proj, expert [0-3]: the activations .* NaN or Inf"):
        binarize_experts("layer", module, bad, both(config()))
    module.down_proj.data[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer.down_proj, expert 3: the weight holds NaN or Inf"):
        binarize_experts("layer", module, routed, {"down_proj": config(method="rtn")})
