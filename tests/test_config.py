import copy
import json

import pytest
import torch

from optimum_arb import ARBConfig


@pytest.mark.parametrize(
    "config",
    [
        ARBConfig(),
        ARBConfig(method="arb-rc", group_bitmap="non-salient", salient_columns=5, block_size=-1, act_order=True),
        ARBConfig.as_published("billm"),
        ARBConfig(dataset=None, overrides={"down_proj": {"planes": 3}, "re:.*q_proj": {"skip": True}}),
        ARBConfig.for_gguf(),
    ],
)
def test_json_round_trip(config):
    stored = json.loads(json.dumps(config.to_dict()))
    again = ARBConfig.from_dict(stored)
    assert again.to_dict() == config.to_dict()
    assert again.layout is config.layout


def test_the_users_texts_are_neither_copied_nor_written():
    config = ARBConfig(dataset=["some text", "more"])
    assert copy.deepcopy(config).dataset is config.dataset
    assert config.to_dict()["dataset"] == "custom"
    tokens = ARBConfig(dataset=torch.arange(12).view(2, 6))
    assert copy.deepcopy(tokens).dataset is tokens.dataset


def test_defaults_of_the_methods():
    ours, published = ARBConfig(planes=2), ARBConfig.as_published("arb-rc")
    assert (ours.resolved_act_order, ours.resolved_damp_percent, ours.resolved_refinement_sweeps) == (False, 0.02, 2)
    assert (ours.resolved_admm_iterations, ours.resolved_shrinkage) == (25, 0.05)
    by_block = ARBConfig(planes=2, admm_iterations=0)
    assert (by_block.resolved_act_order, by_block.resolved_refinement_sweeps) == (True, 1)
    assert ARBConfig(dataset=None).resolved_refinement_sweeps == 0
    assert ARBConfig(admm_iterations=0).resolved_refinement_sweeps == 0
    assert (published.compensation, published.split_metric) == ("diagonal", "score")
    assert (published.resolved_act_order, published.resolved_damp_percent) == (False, 0.01)
    assert published.resolved_group_bitmap == "all"
    assert ARBConfig(method="billm").resolved_group_bitmap == "non-salient"
    assert ARBConfig(dataset=None).resolved_act_order is False


def test_the_preset_for_gguf_has_nothing_but_signs_and_row_scales():
    config = ARBConfig.for_gguf(num_samples=4)
    assert (config.layout.name, config.block_size, config.resolved_act_order) == ("planes-1", 128, False)
    assert config.num_samples == 4
    assert config.for_module("q_proj").layout.name == "planes-1"
    assert ARBConfig(overrides={"q_proj": {"col_scale": False}}).for_module("q_proj").layout.name == "planes-1"
    assert ARBConfig.for_gguf(overrides={"q_proj": {"method": "rtn"}}).for_module("q_proj").col_scale is None
    with pytest.raises(TypeError, match="col_scale=1"):
        ARBConfig(col_scale=1)


def test_overrides_by_suffix_and_pattern():
    config = ARBConfig(
        overrides={
            "down_proj": {"planes": 2},
            "re:.*layers\\.0\\..*": {"planes": 3, "block_size": 64},
            "k_proj": {"skip": True},
            "v_proj": {"method": "rtn"},
        }
    )
    assert config.for_module("model.layers.1.mlp.down_proj").planes == 2
    assert config.for_module("model.layers.0.mlp.down_proj").planes == 3  # later entries win
    assert config.for_module("model.layers.0.mlp.down_proj").block_size == 64
    assert config.for_module("model.layers.1.mlp.cross_down_proj").planes == 1  # a suffix counts at a dot alone
    assert config.for_module("model.layers.1.self_attn.k_proj") is None
    assert config.for_module("model.layers.1.self_attn.v_proj").layout.name == "planes-1"
    assert config.for_module("model.layers.1.mlp.up_proj").to_dict() == ARBConfig().to_dict()
    assert config.planes == 1


def test_override_to_another_method_drops_what_that_method_lacks():
    config = ARBConfig(method="arb-hrc", planes=2, refinement_sweeps=3, overrides={"q_proj": {"method": "billm"}})
    module = config.for_module("q_proj")
    assert (module.planes, module.refinement_sweeps, module.layout.salient) == (1, None, True)
    bitmap = ARBConfig(method="arb-rc", salient_columns=4, overrides={"q_proj": {"method": "arb-hrc", "planes": 2}})
    assert bitmap.for_module("q_proj").layout.name == "planes-2-col"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"refinement_sweeps": 2, "method": "arb"}, "refinement_sweeps=2 needs method='arb-hrc'"),
        ({"refinement_sweeps": -1}, "refinement_sweeps=-1"),
        ({"damp_percent": -0.5}, "damp_percent=-0.5"),
        ({"col_scale": False, "method": "rtn"}, "col_scale=False needs method='arb-hrc'"),
        ({"planes": 2, "method": "rtn"}, "planes=2 needs method='arb-hrc'"),
        ({"group_bitmap": "all"}, "group_bitmap='all' does nothing with method='arb-hrc'"),
        ({"salient_columns": 128, "method": "billm"}, "salient_columns=128"),
        ({"overrides": {"q_proj": {"plane": 2}}}, "unknown key 'plane'"),
        ({"overrides": {"q_proj": {"planes": 5}}}, "planes=5"),
        ({"overrides": {"re:(": {"planes": 2}}}, "no regular expression"),
    ],
)
def test_choices_that_do_not_fit(choices, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        ARBConfig(**choices)


@pytest.mark.parametrize(
    "choices",
    [
        {"overrides": {"q_proj": {"skip": "no"}}},
        {"act_order": "no"},
        {"overrides": {"q_proj": {"act_order": "no"}}},
        {"seed": "a"},
        {"seed": None},
        {"hadamard": 64.0},
        {"scale_bits": 8.0},
    ],
)
def test_choices_of_another_type(choices):
    with pytest.raises((TypeError, ValueError), match=r"skip|act_order|seed|hadamard|scale_bits"):
        ARBConfig(**choices)


@pytest.mark.parametrize("memory", ["8GB", 8, ["8GB"]])
def test_max_memory_is_a_table(memory):
    with pytest.raises(TypeError, match=r"max_memory=.* is no table: give one of devices and sizes"):
        ARBConfig(max_memory=memory)
    assert ARBConfig(max_memory={"cpu": "8GB"}).max_memory == {"cpu": "8GB"}


@pytest.mark.parametrize("patterns", [7, "lm_head", {"lm_head": 1}])
def test_patterns_are_a_list(patterns):
    with pytest.raises(TypeError, match="must be a list of patterns"):
        ARBConfig(modules_to_not_convert=patterns)
