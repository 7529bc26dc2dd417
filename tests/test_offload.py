"""Prequantized models whose parts are on different devices: as much of it as a CPU, files and accelerate's hooks show.

With a GPU in the map: `test_devices_gpu.py`.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.nn import ARBExperts, ARBLinear

FAMILIES = ("LlamaForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM")
IDS = tokens(2, 9)


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (save_tiny if request.param.startswith("Llama") else save_moe)(folder / "float", request.param)
    config = ARBConfig(dataset=tokens(8, 24), num_samples=8, block_size=64)
    AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config).save_pretrained(
        folder / "packed"
    )
    return folder / "packed"


def layers_on(path, *devices) -> dict[str, str]:
    """A device map: the layers on `devices`, the rest on the CPU."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(path, quantization_config=None))
    names = {f"model.{name}": "cpu" for name, _ in model.named_children() if name != "layers"}
    return {**names, "lm_head": "cpu", **{f"model.layers.{index}": device for index, device in enumerate(devices)}}


def load(path, tmp_path, device_map, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        path, device_map=device_map, offload_folder=tmp_path / "offload", **kwargs
    )


def packed_modules(model) -> list:
    return [module for module in model.modules() if isinstance(module, (ARBLinear, ARBExperts))]


@pytest.mark.parametrize("devices", [("cpu", "disk"), ("disk", "disk")], ids="-".join)
@pytest.mark.parametrize("backend", ["auto", "dequantize"])
def test_layers_on_disk_compute_generate_and_save_the_same(packed, tmp_path, devices, backend):
    own = {"quantization_config": ARBConfig(backend=backend)} if backend != "auto" else {}
    whole = AutoModelForCausalLM.from_pretrained(packed, **own)
    device_map = layers_on(packed, *devices)
    model = load(packed, tmp_path, device_map, **own)
    assert model.hf_device_map == device_map
    offloaded = [module for module in packed_modules(model) if module._hf_hook.offload]
    assert 0 < len(offloaded) <= len(packed_modules(model))
    assert all(parameter.is_meta for module in offloaded for parameter in module.parameters(recurse=False))
    for _ in range(2):  # the second time with whatever the first one kept
        assert torch.equal(outputs(model, IDS), outputs(whole, IDS))
    answers = [each.generate(IDS, max_new_tokens=4, do_sample=False) for each in (model, whole)]
    assert torch.equal(*answers)
    # a call leaves nothing behind in memory
    assert all(parameter.is_meta for module in offloaded for parameter in module.parameters(recurse=False))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="is offloaded: load the model without offloading"):
        model.dequantize()


def test_a_memory_limit_counts_packed_bytes(tmp_path):
    """What fits into the limit stays in memory, and the rest goes to disk. accelerate keeps room for one layer."""
    save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=6)
    config = ARBConfig(dataset=None, block_size=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    packed = tmp_path / "packed"
    whole = AutoModelForCausalLM.from_pretrained(packed)
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    model = load(packed, tmp_path, "auto", max_memory={"cpu": size * 2})
    assert not any(parameter.is_meta for parameter in model.parameters())
    model = load(packed, tmp_path, "auto", max_memory={"cpu": size * 2 // 3})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    kept = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    assert kept <= size * 2 // 3
    assert torch.equal(outputs(model, IDS), outputs(whole, IDS))


def test_the_cpu_alone_needs_no_hooks(packed):
    for device_map in ("cpu", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert not any(hasattr(module, "_hf_hook") for module in packed_modules(model))
