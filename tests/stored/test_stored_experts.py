"""Checkpoints of experts that lack something, or hold what does not belong there."""

from __future__ import annotations

import json

import pytest
import torch
from binarized_experts import LAYER, binarize, edit, save_packed
from safetensors.torch import load_file
from tiny_experts import save_moe
from tiny_models import outputs, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import model_report

EXPERT = "model.layers.1.block_sparse_moe.experts.2"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("mixtral"), "MixtralForCausalLM")


@pytest.fixture(scope="module")
def packed(mixtral, tmp_path_factory):
    return save_packed(mixtral, tmp_path_factory.mktemp("packed"))


def test_a_missing_expert(packed, tmp_path):
    def drop(tensors):
        del tensors[f"{EXPERT}.w2.weight"]

    with pytest.raises(ValueError, match=r"experts.down_proj: 3 of the tensors .* the model has 4 experts"):
        AutoModelForCausalLM.from_pretrained(edit(packed, tmp_path, drop))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("w2.weight_row_scale", r"layers.1.mlp.experts.down_proj: .*row_scale.* is missing"),
        ("w2.weight", r"experts.*down_proj.* missing in the checkpoint"),
    ],
    ids=["companion", "signs"],
)
def test_what_all_experts_of_a_layer_lack(packed, tmp_path, key, message):
    def drop(tensors):
        for name in list(tensors):
            if ".layers.1." in name and name.endswith(key):
                del tensors[name]

    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edit(packed, tmp_path, drop))


def test_experts_that_differ(packed, tmp_path):
    def cast(tensors):
        tensors[f"{EXPERT}.w1.weight_row_scale"] = tensors[f"{EXPERT}.w1.weight_row_scale"].float()

    with pytest.raises(ValueError, match=r"gate_up_proj: the tensor .* All experts must have the same"):
        AutoModelForCausalLM.from_pretrained(edit(packed, tmp_path, cast))


def test_a_float_expert_where_packed_ones_are_expected(packed, mixtral, tmp_path):
    def unpack(tensors):
        stored = load_file(mixtral / "model.safetensors")
        for key in [key for key in tensors if ".layers.1." in key and ".w2." in key]:
            del tensors[key]
        tensors.update({key: t for key, t in stored.items() if ".layers.1." in key and ".w2." in key})

    with pytest.raises(ValueError, match=r"experts.down_proj: the quantization_config says .* F32"):
        AutoModelForCausalLM.from_pretrained(edit(packed, tmp_path, unpack))


def test_a_changed_layout(packed, tmp_path):
    target = edit(packed, tmp_path, lambda tensors: None)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["overrides"] = {"experts.down_proj": {"planes": 2}}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"down_proj'? ?.*planes-2-col"):
        AutoModelForCausalLM.from_pretrained(target)


def test_a_shape_that_does_not_belong(mixtral, tmp_path):
    def cut(tensors):
        for key in [key for key in tensors if key.endswith("w2.weight")]:
            tensors[key] = tensors[key][:, :32].contiguous()

    with pytest.raises(ValueError, match=r"experts.down_proj: it is \[4, 64, 32\] in the checkpoint and \[4, 64, 96\]"):
        binarize(edit(mixtral, tmp_path, cut))


def test_experts_whose_bias_is_missing_stay_in_float(tmp_path):
    """transformers initializes it, which it could not in a packed module."""
    source = save_moe(tmp_path / "float", "GptOssForCausalLM")

    def drop(tensors):
        del tensors[f"{LAYER.format(1)}.down_proj_bias"]

    model = binarize(edit(source, tmp_path / "cut", drop))
    for name in ("gate_up_proj", "down_proj"):
        assert model_report(model).kept[f"{LAYER.format(1)}.{name}"] == "not in the checkpoint"
    assert torch.isfinite(outputs(model, tokens(1, 8))).all()


def test_nan_on_load(mixtral, tmp_path):
    def poison(tensors):
        tensors["model.layers.0.block_sparse_moe.experts.2.w2.weight"][0, 0] = torch.nan

    source = edit(mixtral, tmp_path, poison)
    with pytest.raises(ValueError, match=r"experts.down_proj, expert 2: the weight holds NaN"):
        binarize(source)
