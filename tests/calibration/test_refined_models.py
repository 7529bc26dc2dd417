"""Refinement as users ask for it: by the configuration, on loading and from disk to disk; and the last pass."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_arb import ARBConfig, ARBLinear, quantize_checkpoint
from optimum_arb.algorithms import output_error
from optimum_arb.calibration import CalibrationWalk, token_batches
from optimum_arb.calibration.progress import Progress
from optimum_arb.calibration.refine_model import divergence, refine_model
from optimum_arb.calibration.tuning import RefineSettings, split_batches
from optimum_arb.conversion import binarize_linear
from optimum_arb.modules import select_modules

IDS = tokens(24, 24)


def config(**changes):
    given = {"refine": "block", "refine_steps": 30, "dataset": IDS, "num_samples": 24, "batch_size": 2}
    given["error_correction"] = 0  # the records are of the weights that were fitted: here, the float model's
    given["refine_learning_rate"] = 0.002  # for few random tokens, which are soon known by heart
    return ARBConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("refinement") / "float", "LlamaForCausalLM")


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    """A refined model and where it was saved."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config())
    path = tmp_path_factory.mktemp("refinement") / "refined"
    model.save_pretrained(path)
    return model, path


def test_a_refined_model_is_saved_and_loads_with_its_norms(source, saved):
    model, path = saved
    again = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert again(IDS).logits.equal(model(IDS).logits)
    norm = again.model.layers[0].input_layernorm.weight
    assert norm.equal(model.model.layers[0].input_layernorm.weight)
    assert not norm.equal(AutoModelForCausalLM.from_pretrained(source).model.layers[0].input_layernorm.weight)
    stored = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (stored["refine"], stored["refine_steps"]) == ("block", 30)
    before, after = stored["calibration"]["refinement"]["layer_loss"]
    assert 0 < after < before
    assert ARBConfig.from_dict(stored).refine == "block"


def test_the_records_are_of_the_refined_weights(source, saved):
    model, _ = saved
    original = AutoModelForCausalLM.from_pretrained(source)
    for name, record in model.hf_quantizer.records.items():
        packed = model.get_submodule(name)
        weight = original.get_submodule(name).weight.detach()
        assert record.weight_error == pytest.approx(output_error(weight, packed.dequantize(), None), rel=1e-5)
        assert record.output_error is not None
        assert record.refined[1] <= record.refined[0]


def test_sequences_that_are_held_out_are_not_trained_on(source):
    """Whatever they are, the model is the same; their errors are those of the refined weights."""
    models = []
    for seed in (1, 2):
        ids = torch.cat([IDS[:22], tokens(2, 24, seed=seed)])
        choices = config(dataset=ids, held_out_samples=2, refine="model", refine_steps=6)
        models.append(AutoModelForCausalLM.from_pretrained(source, quantization_config=choices))
    states = [model.state_dict() for model in models]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    errors = [model.hf_quantizer.records["model.layers.0.mlp.up_proj"].held_out_error for model in models]
    assert errors[0] != errors[1]


def test_from_disk_to_disk_the_bytes_are_the_same_and_an_interrupted_run_goes_on(source, saved, tmp_path):
    class Interrupted(Progress):
        def linear(self, name, seconds, errors):
            if name.startswith("model.layers.1."):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", config(), progress=Interrupted())
    assert not (tmp_path / "out").exists()
    result = quantize_checkpoint(source, tmp_path / "out", config(), resume=True)
    assert result.resumed_layers == 1
    _, path = saved
    expected, found = (load_file(directory / "model.safetensors") for directory in (path, tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    configs = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (path, tmp_path / "out")]
    assert configs[0]["calibration"] == configs[1]["calibration"]
    assert not list(tmp_path.glob(".*"))  # neither a work directory nor hidden states are left


def test_the_last_pass_on_loading_and_in_memory_from_disk_to_disk(source, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config(refine="model"))
    before, after = model.config.quantization_config.calibration["refinement"]["divergence"]
    assert 0 < after <= before
    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(source, tmp_path / "out", config(refine="model"))
    assert "all of its layers at once" in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert again(IDS).logits.equal(model(IDS).logits)


@pytest.fixture
def binarized():
    """A binarized tiny model, its float original, and the walk that followed that."""
    model = tiny_model("LlamaForCausalLM")
    selection = select_modules(model, ARBConfig(dataset=None))

    def binarize(name, module, hessian, count):
        return binarize_linear(name, module, selection.convert[name], hessian, count)[0], None

    walk = CalibrationWalk(model, selection.modules(), binarize, token_batches(tokens(24, 24), 2), follow_float=True)
    walk.run()
    return model, tiny_model("LlamaForCausalLM"), walk


def test_the_last_pass_measures_the_divergence_from_the_float_model(binarized):
    """Against the float model itself, which the pass does not have."""
    model, original, walk = binarized
    packed = {name: module for name, module in model.named_modules() if isinstance(module, ARBLinear)}
    signs = {name: module.weight.clone() for name, module in packed.items()}
    head = model.lm_head.weight.detach().clone()
    settings = RefineSettings(steps=30, learning_rate=0.005, evaluations=6)
    expected = of_held_out(model, original, walk)
    result = refine_model(model, walk.chain, walk.batches, walk.float_outputs, settings)
    assert result.before == pytest.approx(expected, rel=1e-4)
    assert result.after < result.before
    assert result.after == pytest.approx(of_held_out(model, original, walk), rel=1e-4)
    assert all(model.get_submodule(name) is module for name, module in packed.items())
    assert all(module.weight.equal(signs[name]) for name, module in packed.items())
    assert model.lm_head.weight.equal(head)
    assert not model.model.norm.weight.equal(original.model.norm.weight)
    assert all("forward" not in layer.__dict__ for layer in walk.chain.modules)


def of_held_out(model, original, walk):
    held = split_batches(len(walk.batches), RefineSettings.held_out)[1]
    with torch.no_grad():
        losses = [divergence(model(walk.batches[b]).logits, original(walk.batches[b]).logits) for b in held]
    return float(sum(losses)) / len(losses)


def test_the_divergence_is_that_of_distributions_and_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=wanted), torch.distributions.Categorical(logits=found)
    )
    torch.testing.assert_close(divergence(found, wanted), exact.mean())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = exact[mask.bool()].mean()
    torch.testing.assert_close(divergence(found, wanted, {"attention_mask": mask}), expected)


def test_what_cannot_be_refined_is_refused_before_the_work(tmp_path):
    path = save_tiny(tmp_path / "opt", "OPTForCausalLM")
    with pytest.raises(ValueError, match=r"refine='model' needs the float model's .*project.*refine='block'"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=config(refine="model"))
    path = save_tiny(tmp_path / "t5", "T5ForConditionalGeneration")
    from transformers import T5ForConditionalGeneration

    with pytest.raises(ValueError, match="cannot be refined by the outputs of its layers"):
        T5ForConditionalGeneration.from_pretrained(path, quantization_config=config())
    path = save_tiny(tmp_path / "llama", "LlamaForCausalLM")
    with pytest.raises(ValueError, match="at least two calibration batches"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=config(batch_size=24))
    with pytest.raises(ValueError, match="at least two calibration batches"):
        quantize_checkpoint(path, tmp_path / "out", config(batch_size=24))


def test_a_classifier_is_refined_by_its_layers(tmp_path):
    path = save_tiny(tmp_path / "roberta", "RobertaForSequenceClassification")
    model = AutoModelForSequenceClassification.from_pretrained(path, quantization_config=config())
    before, after = model.config.quantization_config.calibration["refinement"]["layer_loss"]
    assert after <= before


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"refine": "all"}, "refine='all' is unknown: use one of block, model"),
        ({"refine": "block", "dataset": None}, "needs a calibration text"),
        ({"refine_steps": 10}, "refine_steps=10 does nothing without refine"),
        ({"refine": "block", "refine_steps": 0}, "refine_steps=0"),
        ({"refine": "block", "refine_learning_rate": 2.0}, "refine_learning_rate=2.0"),
        ({"refine": "block", "refine_signs": 1}, "refine_signs=1"),
    ],
)
def test_choices_that_make_no_sense_are_refused(choices, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ARBConfig(**choices)
