"""Models whose linears mix their inputs by a Hadamard transform, through transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, algorithms, conversion, model_report
from optimum_arb.inspection import inspect_model
from optimum_arb.nn import ARBLinear


@pytest.fixture(autouse=True, scope="module")
def it_pays():
    """Whatever the quick fits tell: these tests are about what follows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "hadamard_gain", lambda weight, hessian, config: 1.5)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


def binarize(path, **choices):
    given = {"dataset": tokens(), "num_samples": 4, "block_size": 64, "hadamard": 64, **choices}
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=ARBConfig(**given))


@pytest.fixture(scope="module")
def packed(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed")
    binarize(llama).save_pretrained(path)
    return path


@pytest.mark.parametrize("choices", [{}, {"planes": 2, "act_order": True, "scale_bits": 8}], ids=["plain", "ordered"])
def test_round_trip(llama, tmp_path, choices):
    model = binarize(llama, **choices)
    layers = [module for module in model.modules() if isinstance(module, ARBLinear)]
    assert len(layers) == 14
    assert all(layer.hadamard == 64 for layer in layers)
    assert all((layer.weight_permutation is not None) if choices else True for layer in layers)
    together = model.model.layers[0].self_attn.q_proj.shared_input
    assert together is not None  # one seed for all: query, key and value have the same signs
    ids = tokens(1, 8)
    expected = outputs(model, ids)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["hadamard"], saved["format_version"]) == (64, 2)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(outputs(again, ids), expected)
    report = model_report(model)
    found = inspect_model(tmp_path)
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    names = {module.layout for module in report.modules}
    assert (
        names == {module.layout for module in found.modules} == {f"planes-{choices.get('planes', 1)}-col-hadamard-64"}
    )
    assert torch.allclose(outputs(again.dequantize(), ids), expected, rtol=1e-3, atol=1e-4)


def test_what_is_measured_is_what_runs(llama):
    """The error that was measured of the weight is that of the layer that runs."""
    model = binarize(llama)
    plain = binarize(llama, hadamard=0)
    errors = [model_report(each).mean_output_error for each in (model, plain)]
    assert 0 < errors[0] < 2 * errors[1]
    assert errors[0] < 1
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 96)
    assert torch.allclose(layer(x), x @ layer.dequantize().T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("found", ["by some rows", "by all"])
def test_where_it_does_not_pay(llama, tmp_path, monkeypatch, found):
    """The linears that go without are listed, so that signs which are missing elsewhere are noticed."""
    gain = 0.9 if found == "by some rows" else 1.5
    monkeypatch.setattr(conversion, "hadamard_gain", lambda weight, *_: gain if len(weight) > 96 else 1.5)
    if found == "by all":
        monkeypatch.setattr(algorithms, "rounding_is_better", lambda weight, *_: len(weight) > 96)
    model = binarize(llama)
    block = model.model.layers[0]
    assert (block.mlp.up_proj.hadamard, block.self_attn.q_proj.hadamard) == (0, 64)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(saved["calibration"]["untransformed"]) == 4
    assert "model.layers.0.mlp.up_proj" in saved["calibration"]["untransformed"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))
    assert {module.layout for module in inspect_model(tmp_path).modules} == {"planes-1-col", "planes-1-col-hadamard-64"}


def test_without(llama, tmp_path):
    binarize(llama, hadamard=0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "hadamard" not in saved
    assert saved["format_version"] == 1


def test_per_module(llama, tmp_path):
    model = binarize(llama, hadamard=0, overrides={"down_proj": {"hadamard": 128}})
    block = model.model.layers[0].mlp
    assert (block.down_proj.hadamard, block.up_proj.hadamard) == (128, 0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))


def test_experts_go_without(tmp_path):
    path = save_tiny(tmp_path / "float", "MixtralForCausalLM")
    model = binarize(path)
    assert model.model.layers[0].self_attn.q_proj.hadamard == 64
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(again, tokens(1, 8)), outputs(model, tokens(1, 8)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "weight_input_signs' is missing in the checkpoint"),
        (torch.zeros(1, 11, dtype=torch.uint8), r"weight_input_signs' is U8 \[1, 11\] .* U8 \[1, 12\] follows"),
        (torch.zeros(1, 12), r"weight_input_signs' is F32"),
    ],
)
def test_changed_files(packed, tmp_path, changed, message):
    tensors = load_file(packed / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight_input_signs"
    del tensors[key]
    if changed is not None:
        tensors[key] = changed
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_without_it(packed, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]["hadamard"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds 'model.layers.0.*weight_input_signs', which the layout"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_gguf(packed, tmp_path):
    pytest.importorskip("gguf")
    from optimum_arb.export import export_gguf

    with pytest.raises(ValueError, match="would not be exact"):
        export_gguf(AutoModelForCausalLM.from_pretrained(packed), None, tmp_path / "model.gguf")


@pytest.mark.parametrize("value", [1, 100, 512, True, "128"])
def test_choices(value):
    with pytest.raises(ValueError, match="is unknown: use 64, 128 or 256, or 0 for none"):
        ARBConfig(hadamard=value)


def test_trials_ask_for_no_comparison(monkeypatch):
    """Fits that tell whether a transform pays take longer than a trial itself."""

    def never(*_):
        raise AssertionError("compared with a fit without the transform")

    monkeypatch.setattr(conversion, "hadamard_gain", never)
    linear, config = torch.nn.Linear(96, 64, bias=False), ARBConfig(block_size=64, hadamard=64)
    hessian = torch.eye(96) + 0.1
    packed, record = conversion.binarize_linear("trial", linear, config, hessian, 10, hadamard_must_pay=False)
    assert packed.hadamard in (0, 64)
    assert record.hadamard_gain is None
    assert record.output_error < 1
    with pytest.raises(AssertionError, match="compared"):
        conversion.binarize_linear("fit", linear, config, hessian, 10)
