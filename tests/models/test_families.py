"""Each model family: binarized on load, saved, reloaded, run."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import CAUSAL, ENCODERS, FAMILIES, outputs, save_tiny, tokens

from optimum_arb import ARBConfig, ARBLinear, model_report

LINES = [
    pytest.param(family, data, id=f"{family}-{data}") for family in FAMILIES for data in ("data-free", "calibrated")
]


def load(family: str, path, **kwargs):
    return getattr(transformers, family).from_pretrained(path, **kwargs)


@pytest.mark.parametrize(("family", "data"), LINES)
def test_binarize_on_load_save_reload(tmp_path, family, data):
    source = save_tiny(tmp_path / "float", family)
    config = ARBConfig(block_size=64, dataset=tokens() if data == "calibrated" else None, num_samples=4)
    model = load(family, source, quantization_config=config)
    report = model_report(model)
    assert len(report.modules) == FAMILIES[family][2]
    assert all((m.output_error is not None) == (data == "calibrated") for m in report.modules)
    assert not any(p.is_meta for p in model.parameters())

    ids = tokens(2, 16, seed=1)
    expected = outputs(model, ids)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, outputs(load(family, source), ids))

    model.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    reloaded = load(family, tmp_path / "packed")
    assert torch.equal(outputs(reloaded, ids), expected)
    assert model_report(reloaded).bits_per_weight == report.bits_per_weight
    assert model_report(reloaded).kept.keys() == report.kept.keys()
    assert reloaded.config.quantization_config.bits_per_weight == report.bits_per_weight

    plain = reloaded.dequantize()
    assert not any(isinstance(module, ARBLinear) for module in plain.modules())
    # the packed product sums in another order than a float one
    torch.testing.assert_close(outputs(plain, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_generate(tmp_path, family):
    model = load(family, save_tiny(tmp_path, family), quantization_config=ARBConfig(dataset=None, block_size=64))
    ids = tokens(2, 6)
    dynamic = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert dynamic.shape[1] > ids.shape[1]
    assert torch.equal(dynamic, static)
    without_cache = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(dynamic, without_cache)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_dequantize_gives_the_classes_of_the_float_model(tmp_path, family):
    source = save_tiny(tmp_path, family)
    packed = load(family, source, quantization_config=ARBConfig(dataset=None, block_size=64))
    plain = packed.dequantize()
    original = load(family, source)
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    shapes = {name: p.shape for name, p in original.named_parameters()}
    assert {name: p.shape for name, p in plain.named_parameters()} == shapes
    assert not hasattr(plain.config, "quantization_config")
