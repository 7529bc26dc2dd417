"""Binarized checkpoints under other classes, dtypes, heads and configurations than they were saved with."""

from __future__ import annotations

import pytest
import torch
from binarized_models import binarize
from tiny_models import outputs, save_tiny, tokens
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from optimum_arb import ARBConfig, ARBLinear, model_report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_loading_leaves_the_packed_tensors_alone(packed, dtype):
    reference = dict(LlamaForCausalLM.from_pretrained(packed).named_parameters())
    model = LlamaForCausalLM.from_pretrained(packed, dtype=dtype)
    for name, parameter in model.named_parameters():
        packed_tensor = isinstance(model.get_submodule(name.rpartition(".")[0]), ARBLinear)
        assert parameter.dtype == (reference[name].dtype if packed_tensor else dtype)
        if packed_tensor:
            assert torch.equal(parameter, reference[name])
            assert not parameter.requires_grad
    assert torch.isfinite(outputs(model, tokens(1, 8))).all()


def test_without_the_head(packed):
    whole = LlamaForCausalLM.from_pretrained(packed)
    base = AutoModel.from_pretrained(packed)
    ids = tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    assert len(model_report(base).modules) == 14


def test_a_new_head_on_a_binarized_body(packed):
    model = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert "score" in model_report(model).kept
    assert outputs(model, tokens(1, 8)).shape == (1, 3)


def test_an_encoder_saved_without_its_pooler(tmp_path):
    source = save_tiny(tmp_path / "float", "BertForMaskedLM")
    config = ARBConfig(dataset=None, block_size=64)
    masked = AutoModelForMaskedLM.from_pretrained(source, quantization_config=config)
    masked.save_pretrained(tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed")
    assert model_report(base).kept["pooler.dense"] == "not in the checkpoint"
    ids = tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, masked.bert(ids).last_hidden_state)


def test_full_names_in_patterns_do_not_bind_the_saved_model_to_its_class(llama, tmp_path):
    choices = {
        "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", r"re:model\.layers\.1\.mlp\..*"],
        "overrides": {r"re:model\.layers\.0\.mlp\..*": {"planes": 2}, "o_proj": {"skip": True}},
    }
    model = binarize(llama, dataset=tokens(), num_samples=4, **choices)
    report = {module.name: module for module in model_report(model).modules}
    assert report.keys() == {
        *(f"model.layers.0.self_attn.{x}_proj" for x in "kv"),
        *(f"model.layers.1.self_attn.{x}_proj" for x in "qkv"),
        *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert report["model.layers.0.mlp.up_proj"].layout == "planes-2-col"
    assert report["model.layers.0.self_attn.k_proj"].layout == "planes-1-col"
    assert model_report(model).kept["model.layers.0.self_attn.o_proj"] == "overrides: skip"
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert {f"model.{module.name}" for module in model_report(base).modules} == report.keys()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 8)
    assert torch.equal(outputs(model, ids), outputs(again, ids))
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, again.model(ids).last_hidden_state)


def test_backend_is_chosen_at_load(packed):
    config = ARBConfig(backend="reference")
    with pytest.warns(UserWarning, match="backend"):
        model = LlamaForCausalLM.from_pretrained(packed, quantization_config=config)
    assert {m.backend for m in model.modules() if isinstance(m, ARBLinear)} == {"reference"}
    ids = tokens(1, 8)
    torch.testing.assert_close(
        outputs(model, ids), outputs(LlamaForCausalLM.from_pretrained(packed), ids), rtol=1e-4, atol=1e-4
    )


def test_the_same_config_again_is_no_second_binarization(packed):
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = LlamaForCausalLM.from_pretrained(packed, quantization_config=config)
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(LlamaForCausalLM.from_pretrained(packed), tokens(1, 8)))
