"""`target_bits_per_weight` and `method="auto"` through transformers: within the budget, recorded, reproducible."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import outputs, save_tiny, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM

from optimum_arb import ARBConfig, ARBLinear
from optimum_arb.budget import trials
from optimum_arb.budget.trials import candidates, divided, measured, stored_bits
from optimum_arb.calibration.sensitivity import divergences
from optimum_arb.checkpoint.estimate import estimate
from optimum_arb.checkpoint.quantize import quantize_checkpoint
from optimum_arb.conversion import binarize_linear
from optimum_arb.format.packing import stored_bytes
from optimum_arb.nn import ARBFactorizedLinear

QUICK = {"num_iterations": 3, "num_samples": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": tokens(), **QUICK, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ARBLinear)}


def true_bits(model):
    found = linears(model).values()
    stored = sum(8 * stored_bytes(module.packed()) for module in found)
    return Fraction(stored, sum(module.in_features * module.out_features for module in found))


def test_a_linear_with_one_size_takes_it():
    """A gate of 9 rows has rank 8 at all sizes that are tried."""
    config = ARBConfig(method="arb-dbf", target_bits_per_weight=1.2)
    shapes = {"gate": (9, 576), "up": (576, 576)}
    forms = {name: candidates(config, *shape, 1.2, ["arb-dbf"]) for name, shape in shapes.items()}
    weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
    damages = {"gate": [0.1], "up": [0.3, 0.2, 0.1]}
    found = divided(forms, damages, weights, int(1.2 * sum(weights.values())))
    assert found["gate"].settings == {"rank": 8}
    assert found["up"].settings["rank"] > 200


@pytest.mark.parametrize(
    ("method", "target", "slack"), [("arb-hrc", 2.1, 0.1), ("arb-dbf", 1.9, 0.05), ("auto", 2.2, 0.05)]
)
def test_under_the_budget_recorded_and_made_again(llama, tmp_path, capfd, method, target, slack):
    model = binarize(llama, method=method, target_bits_per_weight=target)
    assert target - slack < true_bits(model) <= target
    assert "bits a weight, divided by" in capfd.readouterr().err
    forms = {module.bits_per_weight() for module in linears(model).values()}
    assert len(forms) > 1
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["target_bits_per_weight"] == target
    assert sorted(stored["overrides"]) == sorted(linears(model))
    assert stored["method"] == ("arb-hrc" if method == "auto" else method)
    ids = tokens(1, 8)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    again = binarize(llama, method=method, target_bits_per_weight=target)
    assert torch.equal(outputs(again, ids), outputs(model, ids))
    # what was recorded is all that it takes
    same = binarize(llama, method=stored["method"], overrides=stored["overrides"])
    assert torch.equal(outputs(same, ids), outputs(model, ids))
    kinds = {type(module) for module in linears(model).values()}
    assert kinds <= {ARBLinear, ARBFactorizedLinear}


@pytest.mark.parametrize("method", ["arb-hrc", "arb-dbf"])
def test_scales_that_float16_does_not_hold_count_with_all_their_bits(tmp_path, method):
    model = tiny_model("LlamaForCausalLM")
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[0] *= 3e-4  # as a unit that training has switched off
        layer.mlp.up_proj.weight.data *= 1e7
        layer.self_attn.k_proj.weight.data *= 1e7
    model.save_pretrained(tmp_path)
    model = binarize(tmp_path, method=method, target_bits_per_weight=2.1)
    scales = {t.dtype for m in linears(model).values() for name, t in m.packed().items() if name.endswith("scale")}
    assert scales == {torch.float16, torch.float32}
    assert 2.0 < true_bits(model) <= 2.1


def test_auto_gives_planes_a_transform_and_factors_none(llama, tmp_path):
    model = binarize(llama, method="auto", hadamard=64, scale_bits=8, admm_iterations=4, target_bits_per_weight=1.6)
    assert true_bits(model) <= 1.6
    found = linears(model).values()
    assert any(isinstance(module, ARBFactorizedLinear) for module in found)
    assert any(module.hadamard for module in found if not isinstance(module, ARBFactorizedLinear))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 8)
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    config = ARBConfig.from_dict(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    again = binarize(llama, hadamard=64, scale_bits=8, admm_iterations=4, overrides=config.overrides)
    assert torch.equal(outputs(again, ids), outputs(model, ids))


def test_a_budget_that_is_exceeded_after_all_is_told(tmp_path, caplog):
    model = tiny_model("LlamaForCausalLM")
    every = {"re:.*": {"planes": 1}}
    model.save_pretrained(tmp_path / "usual")
    target = float(true_bits(binarize(tmp_path / "usual", overrides=every)))
    binarize(tmp_path / "usual", target_bits_per_weight=target + 1e-6, overrides=every)
    assert "is exceeded" not in caplog.text
    model.model.layers[1].mlp.up_proj.weight.data *= 1e7
    model.save_pretrained(tmp_path / "wide")
    found = float(true_bits(binarize(tmp_path / "wide", target_bits_per_weight=target + 1e-6, overrides=every)))
    assert f"is exceeded: the model has {found:.4f} bits a weight, because float16 does not hold" in caplog.text


def test_what_has_an_override_keeps_it_within_the_budget(llama):
    overrides = {"down_proj": {"planes": 1}, "layers.0.self_attn.v_proj": {"planes": 3}}
    model = binarize(llama, target_bits_per_weight=2.1, overrides=overrides)
    assert true_bits(model) <= 2.1
    found = linears(model)
    assert {m.layout.planes for n, m in found.items() if n.endswith("down_proj")} == {1}
    assert found["model.layers.0.self_attn.v_proj"].layout.planes == 3
    assert any(m.layout.planes > 1 for n, m in found.items() if not n.endswith(("down_proj", "v_proj")))
    # all chosen: nothing is measured, and the budget still holds
    every = {name: {"planes": module.layout.planes} for name, module in found.items()}
    again = binarize(llama, target_bits_per_weight=2.1, overrides=every)
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))
    with pytest.raises(ValueError, match="less than what the overrides give to 14 modules"):
        binarize(llama, target_bits_per_weight=1.2, overrides=every)


def test_on_disk_it_is_as_in_memory(llama, tmp_path):
    config = ARBConfig(target_bits_per_weight=2.1, dataset=tokens(), **QUICK)
    made = quantize_checkpoint(llama, tmp_path / "out", config)
    assert made.report.bits_per_weight <= 2.1
    ids = tokens(1, 8)
    expected = outputs(binarize(llama, target_bits_per_weight=2.1), ids)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), expected)
    # what one run chose, another one streams
    streamed = ARBConfig(overrides=made.config.overrides, dataset=tokens(), **QUICK)
    quantize_checkpoint(llama, tmp_path / "streamed", streamed)
    one, two = (load_file(tmp_path / part / "model.safetensors") for part in ("out", "streamed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", ["arb-hrc", "arb-dbf"])
def test_what_matters_more_gets_more(tmp_path, method):
    """The second layer's feed-forward is silenced: nothing that it computes reaches the logits."""
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e-3)
    model.save_pretrained(tmp_path)
    modules = linears(binarize(tmp_path, method=method, target_bits_per_weight=2.1))
    found = {name: module.bits_per_weight() for name, module in modules.items()}
    kinds = ("gate_proj", "up_proj", "down_proj")
    heard, silenced = ([found[f"model.layers.{layer}.mlp.{kind}"] for kind in kinds] for layer in (0, 1))
    # forms are few: where the labels drawn leave one linear of the first layer at the same least form, others have more
    assert all(less <= more for less, more in zip(silenced, heard, strict=True))
    assert sum(silenced) < 0.8 * sum(heard)


def test_stored_bits_are_those_that_are_stored():
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(160, 72, bias=False)
    module.weight.data.normal_(generator=generator)
    inputs = torch.randn(400, 160, generator=generator)
    hessian = inputs.T @ inputs
    config = ARBConfig(num_iterations=2)
    for base in (config, ARBConfig(num_iterations=2, scale_bits=8), ARBConfig(num_iterations=2, act_order=True)):
        for form in candidates(base, 72, 160, 2.0, ["arb-hrc"]):
            choices = ARBConfig(num_iterations=2, scale_bits=base.scale_bits, act_order=base.act_order, **form.settings)
            packed, _ = binarize_linear("linear", module, choices, hessian)
            assert form.bits == stored_bits(choices, 72, 160) == 8 * stored_bytes(packed.packed())
    for form in candidates(ARBConfig(method="arb-dbf"), 72, 160, 1.8, ["arb-dbf"])[:3]:
        choices = ARBConfig(method="arb-dbf", num_iterations=2, **form.settings)
        packed, _ = binarize_linear("linear", module, choices, hessian)
        assert form.bits == stored_bits(choices, 72, 160) == 8 * stored_bytes(packed.packed())


@pytest.mark.parametrize("group_bitmap", ["none", "non-salient", "all"])
@pytest.mark.parametrize("method", ["billm", "arb-rc"])
def test_stored_bits_of_an_override_with_salient_columns(method, group_bitmap):
    """They are in no budget but as overrides of some modules, which keep what they take."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(160, 72, bias=False)
    module.weight.data.normal_(generator=generator)
    for columns in (5, 127, None):
        choices = ARBConfig(method=method, num_iterations=1, group_bitmap=group_bitmap, salient_columns=columns)
        packed, _ = binarize_linear("linear", module, choices, None)
        bits = 8 * stored_bytes(packed.packed())
        assert stored_bits(choices, 72, 160) == bits if columns else stored_bits(choices, 72, 160) >= bits


def test_divergence_is_that_of_the_model_with_the_error():
    """Against the KL divergence itself, of small errors, where the second order is all there is."""
    model = tiny_model("LlamaForCausalLM")
    batches = [one[None] for one in tokens(24, 24)]
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    kept = module.weight.data.clone()
    packed, _ = binarize_linear(name, module, ARBConfig(dataset=None, planes=3))

    with torch.no_grad():
        before = [model(batch).logits.double().log_softmax(-1) for batch in batches]
        module.weight.data.copy_(packed.dequantize())
        after = [model(batch).logits.double().log_softmax(-1) for batch in batches]
    module.weight.data.copy_(kept)
    each = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]
    expected = float(torch.stack(each).mean())
    requires = [parameter.requires_grad for parameter in model.parameters()]
    found = divergences(model, {name: [packed]}, batches, "cpu", seed=0)[name][0]
    assert found == pytest.approx(expected, rel=0.3)
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
    assert all(parameter.grad is None for parameter in model.parameters())
    assert divergences(model, {name: [packed]}, batches, "cpu", seed=0)[name][0] == found


def test_refused(llama, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give target_bits_per_weight"):
        ARBConfig(method="auto")
    with pytest.raises(ValueError, match="'arb-rc' has one size"):
        ARBConfig(method="arb-rc", target_bits_per_weight=2.0)
    with pytest.raises(ValueError, match="give a dataset"):
        ARBConfig(dataset=None, target_bits_per_weight=2.0)
    with pytest.raises(ValueError, match="both decide the bits"):
        ARBConfig(planes=2, target_bits_per_weight=2.0)
    with pytest.raises(ValueError, match="both decide the bits"):
        ARBConfig(method="arb-dbf", factor_bits=1.5, target_bits_per_weight=2.0)
    for value in (0, -1.0, True, "2", 17):
        with pytest.raises(ValueError, match="must be a number of bits"):
            ARBConfig(target_bits_per_weight=value)
    with pytest.raises(ValueError, match=r"method='auto'|unknown"):
        ARBConfig(overrides={"down_proj": {"method": "auto"}})
    with monkeypatch.context() as patch:  # told before the trials
        patch.setattr(trials, "measured", None)
        with pytest.raises(ValueError, match=r"=1.0 is less than the 1\.3334 that the smallest choices .*: raise it"):
            binarize(llama, target_bits_per_weight=1.0)
    with pytest.raises(ValueError, match="does not read"):
        estimate(str(llama), ARBConfig(target_bits_per_weight=2.0))
    with pytest.raises(ValueError, match="experts"):
        binarize(save_tiny(tmp_path / "experts", "MixtralForCausalLM"), target_bits_per_weight=2.0)
    config = ARBConfig(target_bits_per_weight=2.1, dataset=tokens(), **QUICK)
    with pytest.raises(ValueError, match="puts out no logits"):
        AutoModel.from_pretrained(llama, quantization_config=config)
    broken = tiny_model("LlamaForCausalLM")
    broken.lm_head.weight.data[3] = float("nan")  # which is not binarized
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="LlamaForCausalLM puts out NaN or Inf, so that bits cannot be divided"):
        binarize(tmp_path / "broken", target_bits_per_weight=2.1)


def test_uniform_where_nothing_counts_by_itself():
    """Tempered to nothing, and with the same error at the same bits, every linear gets the same."""
    config = ARBConfig(method="arb-dbf")
    shapes = {"a": (256, 256), "b": (1024, 256), "c": (256, 512)}
    forms = {name: candidates(config, *shape, 1.5, ["arb-dbf"]) for name, shape in shapes.items()}
    weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
    damages = {
        name: [scale * weights[name] * 2 ** (-2 * f.bits / weights[name]) for f in forms[name] if f.tried]
        for name, scale in zip(shapes, (1.0, 30.0, 0.01), strict=True)
    }
    budget = int(1.5 * sum(weights.values()))
    even = divided(forms, damages, weights, budget, temper=0.0)
    assert all(abs(choice.bits / weights[name] - 1.5) < 0.2 for name, choice in even.items())
    bits = {name: choice.bits / weights[name] for name, choice in divided(forms, damages, weights, budget).items()}
    assert bits["c"] < bits["a"] < bits["b"]


def test_trials_leave_the_model_as_it_was():
    model = tiny_model("LlamaForCausalLM")
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    configs = dict.fromkeys(names, ARBConfig(**QUICK))
    shapes = [model.get_submodule(name).weight.shape for name in names]
    forms = {
        name: candidates(configs[name], *shape, 2.0, ["arb-hrc"]) for name, shape in zip(names, shapes, strict=True)
    }
    found, wide = measured(model, forms, configs, [tokens()], "cpu", 0)
    assert not any(scales for kinds in wide.values() for scales in kinds.values())
    assert all(one > two > three > 0 for one, two, three in found.values())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
