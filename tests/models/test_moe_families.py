"""Each family with experts: binarized on load, saved, reloaded, run."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_experts import MOE, save_moe
from tiny_models import outputs, tokens

from optimum_arb import ARBConfig, ARBExperts, ARBLinear, model_report

LINES = [pytest.param(family, data, id=f"{family}-{data}") for family in MOE for data in ("data-free", "calibrated")]


def load(family: str, path, **kwargs):
    return getattr(transformers, family).from_pretrained(path, **kwargs)


def files(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


@pytest.mark.parametrize(("family", "data"), LINES)
def test_binarize_on_load_save_reload(tmp_path, family, data):
    source = save_moe(tmp_path / "float", family)
    config = ARBConfig(block_size=64, dataset=tokens() if data == "calibrated" else None, num_samples=4)
    model = load(family, source, quantization_config=config)
    report = model_report(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, ARBExperts)]
    matrices = {module.name: module for module in report.modules if module.experts}
    assert list(matrices) == [f"{name}.{key}" for name in layers for key in ("gate_up_proj", "down_proj")]
    assert all(module.experts == MOE[family][2] for module in matrices.values())
    assert all((module.output_error is not None) == (data == "calibrated") for module in report.modules)
    assert all(0 < module.weight_error < 1 for module in matrices.values())
    assert not any("expert" in name and "router" not in why for name, why in report.kept.items())
    assert not any(p.is_meta for p in model.parameters())

    ids = tokens(2, 16, seed=1)
    expected = outputs(model, ids)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, outputs(load(family, source), ids))

    model.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
    stored = files(tmp_path / "packed")
    assert len(stored) > 1
    tensors = {key: t for name in stored for key, t in load_file(tmp_path / "packed" / name).items()}
    key = MOE[family][3]
    assert tensors[key].dtype == torch.uint8
    assert (
        tensors[key].dim() == tensors[f"{key}_row_scale"].dim() == (2 if ".1." in key.partition("layers.1")[2] else 3)
    )
    assert report.model_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    packed = sum(t.numel() * t.element_size() for name, t in tensors.items() if is_packed(name, tensors))
    assert report.packed_bytes == packed
    assert report.bits_per_weight == packed * 8 / sum(module.weights for module in report.modules)

    reloaded = load(family, tmp_path / "packed")
    assert torch.equal(outputs(reloaded, ids), expected)
    again = model_report(reloaded)
    assert again.bits_per_weight == report.bits_per_weight
    assert [module.name for module in again.modules if module.experts] == list(matrices)
    assert again.kept == report.kept
    reloaded.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert files(tmp_path / "again") == stored
    generated = reloaded.generate(ids[:, :6], max_new_tokens=6, do_sample=False)
    assert generated.shape[1] > 6
    assert torch.equal(generated, model.generate(ids[:, :6], max_new_tokens=6, do_sample=False))

    plain = reloaded.dequantize()
    assert not any(isinstance(module, (ARBLinear, ARBExperts)) for module in plain.modules())
    assert [type(m) for m in plain.modules()] == [type(m) for m in load(family, source).modules()]
    # the packed product sums in another order than a float one
    torch.testing.assert_close(outputs(plain, ids), expected, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) == set(load_file(source / "model.safetensors"))


def is_packed(name: str, tensors) -> bool:
    """By its bytes, or as a companion of such a tensor."""
    stems = {key for key, tensor in tensors.items() if tensor.dtype == torch.uint8 and "salient" not in key}
    return any(name == stem or (name.startswith(f"{stem}_") and not name.endswith("_bias")) for stem in stems)
