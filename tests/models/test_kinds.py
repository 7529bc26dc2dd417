"""Kinds of models besides decoders of text: encoders, encoder-decoders, speech, vision, vision with language."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tokens
from torch import nn

from optimum_arb import ARBConfig, ARBLinear, model_report

VOCABULARY = 96
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT_OF_LLAVA = {"model_type": "llama", **_TEXT}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = 5  # the token in whose place an image's features are put


@dataclass(frozen=True)
class Kind:
    """A tiny model of a kind.

    Attributes:
        config: class of its configuration and its arguments.
        binarized: number of linears that are binarized by default.
        kept: a module that stays in float -> a part of the reason.
        inputs: what it runs on besides token ids.
        towers: number of linears that `other_modalities` adds.
        generates: whether it generates text.
    """

    config: tuple[str, dict[str, Any]]
    binarized: int
    kept: dict[str, str] = field(default_factory=dict)
    inputs: str = "tokens"
    towers: int = 0
    generates: bool = False


KINDS = {
    "ModernBertForMaskedLM": Kind(
        ("ModernBertConfig", {**_TEXT, "num_hidden_layers": 3, "local_attention": 8, "global_attn_every_n_layers": 2}),
        12,
        {"head.dense": "task head", "decoder": "output embedding"},
    ),
    "BartForConditionalGeneration": Kind(
        (
            "BartConfig",
            {
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "max_position_embeddings": 64,
                "vocab_size": VOCABULARY,
                "forced_eos_token_id": None,
            },
        ),
        32,
        {"lm_head": "output embedding"},
        generates=True,
    ),
    "T5ForConditionalGeneration": Kind(
        (
            "T5Config",
            {
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 96,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 4,
                "vocab_size": VOCABULARY,
                "feed_forward_proj": "gated-gelu",
                "decoder_start_token_id": 0,
            },
        ),
        32,
        {"encoder.block.0.layer.1.DenseReluDense.wo": "float32", "lm_head": "output embedding"},
        generates=True,
    ),
    "WhisperForConditionalGeneration": Kind(
        (
            "WhisperConfig",
            {
                "d_model": 64,
                "num_mel_bins": 8,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "max_source_positions": 32,
                "max_target_positions": 32,
                "vocab_size": VOCABULARY,
                "decoder_start_token_id": 1,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
            },
        ),
        32,
        {"proj_out": "output embedding"},
        inputs="sound",
        generates=True,
    ),
    "ViTForImageClassification": Kind(("ViTConfig", _VISION), 12, {"classifier": "task head"}, inputs="image"),
    "LlavaForConditionalGeneration": Kind(
        (
            "LlavaConfig",
            {
                "text_config": _TEXT_OF_LLAVA,
                "vision_config": {"model_type": "clip_vision_model", **_VISION},
                "image_token_index": IMAGE,
                "vision_feature_layer": -1,
            },
        ),
        14,
        {"model.multi_modal_projector.linear_1": "other_modalities=True"},
        inputs="image and tokens",
        towers=14,
        generates=True,
    ),
    "Qwen2VLForConditionalGeneration": Kind(
        (
            "Qwen2VLConfig",
            {
                "text_config": {**_TEXT, "rope_parameters": _MROPE},
                "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4},
                "image_token_id": IMAGE,
            },
        ),
        14,
        {"model.visual.blocks.0.mlp.fc1": "other_modalities=True"},
        towers=8,
        generates=True,
    ),
}


def build(name: str) -> transformers.PreTrainedModel:
    config_class, arguments = KINDS[name].config
    special = {} if "vision_config" in arguments or name.startswith("ViT") else _SPECIAL
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**special, **arguments})
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.6 / parameter.shape[1] ** 0.5)
    return model


def inputs(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of two, as the model's `forward` takes it."""
    kind = KINDS[name]
    ids = tokens(2, 12, seed=seed) + 1  # none of them is IMAGE
    ids = ids.clamp(max=VOCABULARY - 1)
    generator = torch.Generator().manual_seed(seed)
    if kind.inputs == "sound":
        return {
            "input_features": torch.randn(2, 8, 64, generator=generator),
            "decoder_input_ids": ids,
        }
    image = torch.randn(2, 3, 16, 16, generator=generator)
    if kind.inputs == "image":
        return {"pixel_values": image}
    if kind.inputs == "image and tokens":
        ids[:, 1:5] = IMAGE
        return {"input_ids": ids, "pixel_values": image}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if "Conditional" in name and kind.towers == 0 else {})}


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model(**batch).logits


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Directories of the float models, made when first asked for."""
    made = {}

    def source(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(made[name])
        return made[name]

    return source


def load(name: str, path, **kwargs):
    return getattr(transformers, name).from_pretrained(path, **kwargs)


@pytest.mark.parametrize("data", ["data-free", "calibrated"])
@pytest.mark.parametrize("name", KINDS)
def test_binarize_save_reload_run(sources, tmp_path, name, data):
    kind = KINDS[name]
    dataset: Any = None
    if data == "calibrated":
        dataset = tokens() if kind.inputs == "tokens" else [inputs(name, seed) for seed in range(1, 4)]
    source = sources(name)
    model = load(name, source, quantization_config=ARBConfig(dataset=dataset, num_samples=4, block_size=64))
    report = model_report(model)
    assert len(report.modules) == kind.binarized
    assert all((module.output_error is not None) == (data == "calibrated") for module in report.modules)
    for module, reason in kind.kept.items():
        assert reason in report.kept[module]
        assert type(model.get_submodule(module)) is nn.Linear
    batch = inputs(name)
    expected = logits(model, batch)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, logits(load(name, source), batch))

    model.save_pretrained(tmp_path)
    again = load(name, tmp_path)
    assert torch.equal(logits(again, batch), expected)
    assert model_report(again).kept.keys() == report.kept.keys()
    if kind.generates:
        first = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
        generated = [m.generate(**first, max_new_tokens=4, do_sample=False) for m in (model, again)]
        assert torch.equal(*generated)
        assert generated[0].shape[0] == 2
    plain = again.dequantize()
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.towers])
def test_towers_by_choice(sources, tmp_path, name):
    kind = KINDS[name]
    dataset = [inputs(name, 1)] if "image" in kind.inputs else tokens()
    config = ARBConfig(dataset=dataset, other_modalities=True, block_size=64, num_samples=4)
    model = load(name, sources(name), quantization_config=config)
    report = model_report(model)
    assert len(report.modules) == kind.binarized + kind.towers
    unseen = [module.name for module in report.modules if module.output_error is None]
    if "image" in kind.inputs:
        assert not [name for name in unseen if "layers" in name]
    else:  # text calibrates the language model alone
        assert len(unseen) == kind.towers
        assert f"Without calibration ({kind.towers})" in report.summary()
    assert not any("other_modalities" in reason for reason in report.kept.values())
    model.save_pretrained(tmp_path)
    assert model.config.to_dict()["quantization_config"]["other_modalities"] is True
    again = load(name, tmp_path)
    batch = inputs(name)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_weight_that_is_read_from_further_up_stays_in_float(sources):
    """Qwen2-VL takes the dtype of its images from `self.blocks[0].mlp.fc2.weight`."""
    config = ARBConfig(dataset=None, other_modalities=True, block_size=64)
    model = load(
        "Qwen2VLForConditionalGeneration", sources("Qwen2VLForConditionalGeneration"), quantization_config=config
    )
    assert "reads its weight" in model_report(model).kept["model.visual.blocks.0.mlp.fc2"]
    assert isinstance(model.model.visual.blocks[0].mlp.fc1, ARBLinear)
    pixels = torch.randn(16, 3 * 2 * 4 * 4)
    ids = inputs("Qwen2VLForConditionalGeneration")["input_ids"][:1]
    ids[:, 1:5] = IMAGE
    batch = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    batch["mm_token_type_ids"] = (ids == IMAGE).int()
    assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize(
    ("name", "main"),
    [("WhisperForConditionalGeneration", "input_features"), ("ViTForImageClassification", "pixel_values")],
)
def test_text_does_not_calibrate_what_runs_on_something_else(sources, name, main):
    with pytest.raises(ValueError, match=rf"{name} runs on '{main}', not on text.*dataset=None"):
        load(name, sources(name), quantization_config=ARBConfig(dataset=tokens(), block_size=64))


def test_inputs_that_the_model_does_not_take(sources):
    name = "WhisperForConditionalGeneration"
    config = ARBConfig(dataset=[{"decoder_input_ids": tokens()}], block_size=64)
    with pytest.raises(ValueError, match=r"does not run on 'decoder_input_ids' .*processor"):
        load(name, sources(name), quantization_config=config)


def test_given_inputs_are_recorded_and_not_copied(sources, tmp_path):
    name = "WhisperForConditionalGeneration"
    config = ARBConfig(dataset=[inputs(name, seed) for seed in range(3)], num_samples=2, block_size=64)
    model = load(name, sources(name), quantization_config=config)
    saved = model.config.to_dict()["quantization_config"]
    assert saved["dataset"] == "custom"
    assert saved["calibration"]["samples"] == 2
    assert len(saved["calibration"]["fingerprint"]) == 64
    assert config.to_dict()["dataset"] == "custom"
    assert len(config.dataset) == 3
    other = ARBConfig(dataset=[inputs(name, 7)])
    assert other.dataset.fingerprint() != config.dataset.fingerprint()


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([{"input_features": torch.ones(1)}, "text"], TypeError, r"dataset\[1\] is a str"),
        ([{"input_features": [1.0]}], ValueError, r"dataset\[0\] holds no tensor"),
    ],
)
def test_bad_inputs(dataset, error, message):
    with pytest.raises(error, match=message):
        ARBConfig(dataset=dataset)
