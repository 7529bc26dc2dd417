"""Refinement of a layer by its output, on tiny random models."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model, tokens

from optimum_arb import ARBConfig, ARBLinear
from optimum_arb.calibration import CalibrationWalk, token_batches, tuning
from optimum_arb.calibration.refine import Objective, refine_layer
from optimum_arb.calibration.tuning import RefineSettings, split_batches
from optimum_arb.conversion import binarize_linear
from optimum_arb.experts.conversion import binarize_experts
from optimum_arb.modules import select_modules

FAST = RefineSettings(steps=24, evaluations=4, learning_rate=0.01, sign_learning_rate=0.05)
# for a thousand random tokens, which are soon known by heart
GENTLE = RefineSettings(steps=40, evaluations=10, patience=10, learning_rate=0.003, sign_learning_rate=0.01)


def refined(family="LlamaForCausalLM", settings=FAST, after=None, config=None, samples=12, dtype=None, prepare=None):
    """A tiny model whose layers are binarized and refined; what refinement said of each."""
    model = tiny_model(family).to(dtype)
    if prepare is not None:
        prepare(model)
    config = config or ARBConfig(dataset=None)
    selection = select_modules(model, config)
    results = {}

    def binarize(name, module, hessian, count):
        packed, record = binarize_linear(name, module, selection.convert[name], hessian, count)
        return packed, record.output_error

    def binarize_layer(name, module, routed):
        return binarize_experts(name, module, routed, selection.of_experts(name))[0], []

    def tune(turn):
        results[turn.name] = refine_layer(turn, settings)
        if after is not None:
            after(turn, results[turn.name])

    batches = token_batches(tokens(samples, 24), 2)
    CalibrationWalk(
        model, selection.modules(), binarize, batches, "cpu", binarize_layer, after_layer=tune, follow_float=True
    ).run()
    return model, results


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(states[0][key].equal(states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    "config",
    [
        ARBConfig(dataset=None),
        ARBConfig(method="arb-dbf", factor_bits=2.0, num_iterations=5),
        ARBConfig(method="arb-x", num_iterations=1),
    ],
    ids=["planes", "factors", "bitmaps"],
)
def test_the_held_out_loss_falls_and_is_that_of_what_is_stored(config):
    def look(turn, result):
        """The loss by its definition, from the packed layer, on the batch that was held out."""
        held = split_batches(len(turn.inputs), GENTLE.held_out)[1]
        mean = torch.cat(turn.references).square().sum(-1).mean()
        with torch.no_grad():
            errors = {b: (turn.run(b) - turn.references[b]).square().sum(-1) for b in held}
            losses = [
                ((error / turn.references[b].square().sum(-1)).mean() + error.mean() / mean) / 2
                for b, error in errors.items()
            ]
        assert float(sum(losses)) / len(losses) == pytest.approx(result.after, rel=1e-3)

    model, results = refined(after=look, config=config, samples=32, settings=GENTLE)
    assert list(results) == ["model.layers.0", "model.layers.1"]
    for result in results.values():
        assert result.after < result.before
        assert 0 < result.steps <= GENTLE.steps
    assert results["model.layers.0"].flipped > 0 or config.method == "arb-x"
    assert sum(isinstance(module, ARBLinear) for module in model.modules()) == 14


def test_same_seed_same_bytes_and_another_seed_others():
    one, other = refined()[0], refined()[0]
    assert same(one, other)
    assert not same(one, refined(settings=RefineSettings(**{**vars(FAST), "seed": 1}))[0])


def test_without_signs_they_stay():
    def signs(settings):
        model, results = refined(settings=settings)
        packed = {name: m for name, m in model.named_modules() if isinstance(m, ARBLinear)}
        return {name: m.weight for name, m in packed.items() if name.startswith("model.layers.0")}, results

    settings = RefineSettings(**{**vars(FAST), "sign_learning_rate": 0.0})
    kept, results = signs(settings)
    binarized, _ = signs(RefineSettings(steps=0))
    assert all(kept[name].equal(binarized[name]) for name in binarized)
    assert all(result.flipped == 0 for result in results.values())
    assert results["model.layers.0"].after < results["model.layers.0"].before


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_what_tuning_spoils_is_not_kept(rate):
    """Learning rates that ruin the layer, or make its outputs infinite: it stays as it was binarized, byte for byte."""
    model, results = refined(settings=RefineSettings(steps=8, learning_rate=rate, sign_learning_rate=rate))
    plain, untouched = refined(settings=RefineSettings(steps=0))
    for name, result in results.items():
        assert result.after == result.before == untouched[name].before
        assert result.flipped == 0
    assert same(model, plain)


NORM = "model.layers.0.post_attention_layernorm.weight"


def test_steps_are_relative_to_what_they_change():
    """Norm weights of channels with massive activations are thousands of times smaller than the others."""

    def prepare(model):
        with torch.no_grad():
            model.get_parameter(NORM)[:2] = torch.tensor([1e-4, 0.0])

    # of few tokens the first steps may be the best ones, and then nothing has moved far
    settings = RefineSettings(**{**vars(FAST), "sign_learning_rate": 0.0})
    model, results = refined(prepare=prepare, samples=160, settings=settings)
    assert results["model.layers.0"].after < results["model.layers.0"].before
    small, zero, *others = model.get_parameter(NORM).tolist()
    assert 0.01 < max(abs(other - 1) for other in others) < 0.3
    assert max(abs(zero), abs(small)) > 10 * 1e-4


def test_rates_fall_where_the_usual_ones_spoil_it(monkeypatch):
    """A rate that gains nothing at first, and that may fall until it does: in seven draws to 0.7 to 4.1 % less."""
    settings = RefineSettings(steps=60, evaluations=30, patience=2, learning_rate=0.3, sign_learning_rate=0.0)
    monkeypatch.setattr(tuning, "LEAST_RATE", 1e-3)
    mended = refined(settings=settings, samples=32)[1]["model.layers.0"]
    monkeypatch.setattr(tuning, "LEAST_RATE", 1.0)
    given_up = refined(settings=settings, samples=32)[1]["model.layers.0"]
    assert mended.after < given_up.after == given_up.before == mended.before
    assert given_up.steps < mended.steps


def test_gradients_flow_into_what_is_listed_alone():
    model, _ = refined(samples=32)
    before = tiny_model("LlamaForCausalLM")
    names = {name for name, parameter in model.named_parameters() if not parameter.dtype.is_floating_point}
    changed = {
        name
        for name, parameter in before.named_parameters()
        if name not in names and not parameter.equal(model.get_parameter(name))
    }
    norms = {f"model.layers.{i}.{norm}_layernorm.weight" for i in (0, 1) for norm in ("input", "post_attention")}
    assert changed == norms
    assert all(
        p.requires_grad == (p.is_floating_point() and "_proj.weight" not in n) for n, p in model.named_parameters()
    )
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "family", ["GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM", "Gemma3ForCausalLM", "BertForMaskedLM"]
)
def test_families(family):
    """Biases, transposed weights, layers that return tuples or take masks by position."""
    model, results = refined(family, RefineSettings(steps=10, evaluations=2), samples=6)
    assert len(results) == 2
    assert all(result.after <= result.before for result in results.values())
    if family == "GPT2LMHeadModel":
        name = "transformer.h.0.mlp.c_fc.bias"
        assert not model.get_parameter(name).equal(tiny_model(family).get_parameter(name))


def test_experts_stay_and_their_layer_is_tuned_around_them():
    model, results = refined("MixtralForCausalLM", GENTLE, samples=24)
    plain, _ = refined("MixtralForCausalLM", RefineSettings(steps=0), samples=24)
    state, untouched = model.state_dict(), plain.state_dict()
    first = [name for name in state if name.startswith("model.layers.0.")]
    experts = [name for name in first if ".experts." in name]
    assert experts
    assert all(state[name].equal(untouched[name]) for name in experts)
    assert results["model.layers.0"].after < results["model.layers.0"].before
    assert any(not state[name].equal(untouched[name]) for name in first if name not in experts)


def test_bfloat16_layers_are_tuned_in_float32_and_stored_in_bfloat16():
    model, results = refined(dtype=torch.bfloat16)
    assert results["model.layers.0"].after < results["model.layers.0"].before
    norm = model.model.layers[0].input_layernorm.weight
    assert norm.dtype == torch.bfloat16
    assert not norm.equal(tiny_model("LlamaForCausalLM").to(torch.bfloat16).model.layers[0].input_layernorm.weight)
    assert model.model.layers[0].self_attn.q_proj.weight_row_scale.dtype == torch.float16


def test_outputs_that_are_not_finite_are_named():
    def spoil(turn):
        turn.references[0][0, 0, 0] = math.nan
        turn.references[3][0, 0, 0] = math.nan
        with pytest.raises(ValueError, match=r"model\.layers\.0: .*nan.*refine=None"):
            refine_layer(turn, FAST)
        assert sum(isinstance(module, ARBLinear) for module in turn.layer.modules()) == 7
        raise InterruptedError

    model = tiny_model("LlamaForCausalLM")
    selection = select_modules(model, ARBConfig(dataset=None))

    def binarize(name, module, hessian, count):
        return binarize_linear(name, module, selection.convert[name], hessian, count)[0], None

    walk = CalibrationWalk(
        model, selection.modules(), binarize, token_batches(tokens(8), 2), after_layer=spoil, follow_float=True
    )
    with pytest.raises(InterruptedError):
        walk.run()


def test_dead_linears_do_no_harm():
    """A linear of zeros gives 0 * sign: no gradient for its signs, and nothing that is not finite."""

    def zero(model):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.model.layers[0].self_attn.v_proj.weight[3] = 0

    model, results = refined(prepare=zero)
    assert all(result.after <= result.before for result in results.values())
    for module in model.modules():
        if isinstance(module, ARBLinear):
            assert torch.isfinite(module.dequantize()).all()


def test_the_float_model_is_followed():
    """References are its hidden states, whatever the binarized layers do; what comes out at the end is too."""
    found = {}
    model = tiny_model("LlamaForCausalLM")
    float_model = tiny_model("LlamaForCausalLM")
    selection = select_modules(model, ARBConfig(dataset=None))

    def binarize(name, module, hessian, count):
        with torch.no_grad():
            module.weight.mul_(0.1)
        return module, None

    def keep(turn):
        found[turn.name] = [reference.clone() for reference in turn.references]

    ids = tokens(4)
    walk = CalibrationWalk(
        model, selection.modules(), binarize, token_batches(ids, 2), after_layer=keep, follow_float=True
    )
    walk.run()
    with torch.no_grad():
        states = float_model(ids, output_hidden_states=True).hidden_states
        last = float_model.model(ids).last_hidden_state
    torch.testing.assert_close(torch.cat(found["model.layers.0"]), states[1])
    torch.testing.assert_close(float_model.model.norm(torch.cat(walk.float_outputs)), last)


def test_models_of_another_form_are_refused():
    model = tiny_model("T5ForConditionalGeneration")
    names = select_modules(model, ARBConfig(dataset=None)).modules()
    walk = CalibrationWalk(model, names, lambda *given: pytest.fail("binarized"), [tokens(2)], follow_float=True)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot be refined"):
        walk.run()


def test_the_objective_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(2, 3, 5, generator=generator) for _ in range(3)]
    targets[0][:, 0] *= 100  # a first token that is much longer than the others
    output = targets[0] + 0.1 * torch.randn(2, 3, 5, generator=generator)
    error = (output - targets[0]).square().sum(-1)
    by_token = (error / targets[0].square().sum(-1)).mean()
    of_all = error.mean() / torch.cat(targets).square().sum(-1).mean()
    assert float(Objective(targets)(output, targets[0])) == pytest.approx(float(by_token + of_all) / 2, rel=1e-4)
    lost = targets[0].clone()
    lost[:, 0] = 0.0
    assert float(Objective(targets)(lost, targets[0])) > 0.5


def test_a_token_of_no_size_does_not_outweigh_all_others():
    targets = [torch.ones(1, 4, 2)]
    targets[0][0, 1] = 1e-12
    assert float(Objective(targets)(targets[0] + 1e-3, targets[0])) < 1.0
