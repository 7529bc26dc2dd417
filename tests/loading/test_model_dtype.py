"""The dtype of models in which a packed linear comes before any float parameter."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum_arb import ARBConfig, ARBLinear

X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))


class ProjectedConfig(PreTrainedConfig):
    model_type = "arb_test_projected"


class Projected(PreTrainedModel):
    """As the encoders of sound do, it begins with a linear, not with an embedding, and casts its inputs."""

    config_class = ProjectedConfig
    main_input_name = "features"

    def __init__(self, config):
        super().__init__(config)
        self.project = nn.Linear(64, 128, bias=False)
        self.norm = nn.LayerNorm(128)
        self.post_init()

    def forward(self, features):
        return self.norm(self.project(features.to(self.dtype)))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("projected")
    Projected(ProjectedConfig()).save_pretrained(path)
    return path


@pytest.mark.parametrize("dataset", [None, [{"features": X}]], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scales_are_not_taken_for_it(source, tmp_path, dtype, dataset):
    model = Projected.from_pretrained(
        source, dtype=dtype, quantization_config=ARBConfig(dataset=dataset, block_size=64)
    )
    assert isinstance(model.project, ARBLinear)
    assert model.dtype == dtype
    expected = model(X)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = Projected.from_pretrained(tmp_path)
    assert again.dtype == again.norm.weight.dtype == dtype
    assert torch.equal(again(X), expected)
    assert again.dequantize().project.weight.dtype == dtype


def test_a_compiled_forward_may_ask_for_it(source):
    model = Projected.from_pretrained(source, quantization_config=ARBConfig(dataset=None, block_size=64))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(X), model(X))


def test_of_a_float_model_it_is_as_before(source):
    model = Projected.from_pretrained(source)
    assert model.dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
