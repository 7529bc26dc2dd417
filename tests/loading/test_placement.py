from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny, tiny_model
from transformers import LlamaForCausalLM

from optimum_arb import ARBConfig, model_report
from optimum_arb.loading.placement import calibration_device, check_no_disk, place_model


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"": torch.device("cpu")}, {"a": "cpu", "b": "cpu"}])
def test_calibration_on_the_cpu(device_map):
    assert calibration_device(device_map) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device_map", "device"),
    [
        ({"": 1}, "cuda:1"),
        ({"": "cuda:0"}, "cuda:0"),
        ({"": torch.device("cuda", 2)}, "cuda:2"),
        ({"a": "cpu", "b": 0}, "cuda:0"),
        ({"": "xpu:0"}, "xpu:0"),
    ],
)
def test_calibration_on_the_first_accelerator_of_the_map(device_map, device):
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "cuda":
        pytest.skip("device numbers stand for another kind here")
    assert calibration_device(device_map) == torch.device(device)


def test_automatic_maps_use_what_there_is():
    found = calibration_device("auto")
    assert found.type == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")


def test_a_model_that_would_go_to_disk_is_refused():
    check_no_disk(None)
    check_no_disk("auto")
    check_no_disk({"": "cpu"})
    with pytest.raises(ValueError, match="offloaded to disk"):
        place_model(tiny_model("LlamaForCausalLM"), "auto", {"cpu": 100_000})


def test_placing_by_size_counts_packed_weights(tmp_path):
    """A model that fits only once it is packed is not spread."""
    save_tiny(tmp_path, "LlamaForCausalLM")
    config = ARBConfig(dataset=None, block_size=64)
    packed = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    quantizer = packed.hf_quantizer
    report = model_report(packed)
    model = tiny_model("LlamaForCausalLM")
    size = sum(p.numel() * quantizer.param_element_size(model, name, p) for name, p in model.named_parameters())
    assert size == pytest.approx(report.model_bytes)
