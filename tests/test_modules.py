"""Which modules are binarized, and why the others are not."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import FAMILIES, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.t5.modeling_t5 import T5DenseActDense

from optimum_arb import ARBConfig
from optimum_arb.modules import is_linear, linear_shape, parameter_bytes, reads_weight, resolved_skips, select_modules
from optimum_arb.patterns import matches


def select(model, strict=True, **choices):
    return select_modules(model, ARBConfig(dataset=None, **choices), strict)


def test_output_embedding_stays():
    selection = select(tiny_model("LlamaForCausalLM"))
    assert selection.keep == {"lm_head": "output embedding"}
    assert len(selection.convert) == 14


def test_heads_stay():
    selection = select(tiny_model("RobertaForSequenceClassification"))
    assert selection.keep == {"classifier.dense": "task head", "classifier.out_proj": "task head"}
    masked = select(tiny_model("BertForMaskedLM")).keep
    assert masked["cls.predictions.transform.dense"] == "task head"
    assert masked["cls.predictions.decoder"] == "output embedding"


def test_what_transformers_keeps_in_float32_stays():
    keep = select(tiny_model("T5ForConditionalGeneration")).keep
    assert keep["encoder.block.0.layer.1.DenseReluDense.wo"] == "kept in float32 by transformers"


def test_experts_of_other_forms_are_reported():
    config = transformers.JetMoeConfig(
        hidden_size=64, num_hidden_layers=1, kv_channels=16, num_key_value_heads=4, num_local_experts=4, vocab_size=96
    )
    selection = select(transformers.JetMoeForCausalLM(config))
    assert selection.keep["model.layers.0.mlp.router.layer"] == "router of experts"
    for name in ("mlp.input_linear", "mlp.output_linear", "self_attention.experts.input_linear"):
        assert selection.keep[f"model.layers.0.{name}.weight"] == "a tensor of JetMoeParallelExperts: not supported"
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[0].mlp.experts = nn.Module()
    model.model.layers[0].mlp.experts.w1 = nn.Parameter(torch.zeros(4 * 96, 96))  # as DBRX has it
    assert select(model).keep["model.layers.0.mlp.experts.w1"] == "a tensor of Module: not supported"


def test_routers_stay():
    selection = select(tiny_model("MixtralForCausalLM"))
    assert selection.keep["model.layers.1.mlp.gate"] == "router of experts"
    assert selection.experts["model.layers.0.mlp.experts.gate_up_proj"].parts == 2
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[0].mlp.gate = nn.Linear(96, 4)
    assert select(model).keep["model.layers.0.mlp.gate"] == "router of experts"


def test_weights_that_other_code_reads_stay():
    config = transformers.BambaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=16, mamba_n_groups=1,
    )  # fmt: skip
    selection = select(transformers.BambaForCausalLM(config))
    assert "reads its weight directly" in selection.keep["model.layers.0.mamba.out_proj"]
    assert "model.layers.0.mamba.in_proj" in selection.convert
    assert reads_weight(T5DenseActDense, "wo")
    assert not reads_weight(LlamaAttention, "o_proj")


def test_the_language_part_of_a_composite_model():
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    selection = select(transformers.LlavaForConditionalGeneration(config))
    assert len(selection.convert) == 7
    assert all("language_model" in name for name in selection.convert)
    reasons = {name: reason for name, reason in selection.keep.items() if "vision_tower" in name}
    assert len(reasons) >= 6
    assert set(reasons.values()) == {"vision or audio tower (other_modalities=True binarizes it)"}


def test_what_joins_a_tower_to_the_language_model_is_no_part_of_it():
    """SmolVLM's `connector` and the parts of Granite Speech have no name that says so."""
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama", "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=1, image_token_id=95)
    speech = transformers.GraniteSpeechConfig(
        text_config=text,
        encoder_config={"input_dim": 64, "num_layers": 1, "hidden_dim": 64, "num_heads": 4, "dim_head": 16},
        projector_config={"model_type": "blip_2_qformer", "hidden_size": 64, "encoder_hidden_size": 64,
                          "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96},
    )  # fmt: skip
    with torch.device("meta"):
        models = [
            transformers.SmolVLMForConditionalGeneration(config),
            transformers.SmolVLMModel(config),
            transformers.GraniteSpeechForConditionalGeneration(speech),
        ]
    for model, part in zip(models, ("connector", "connector", "encoder.layers.0"), strict=True):
        selection = select(model)
        assert len(selection.convert) == 7
        assert all(".layers." in name and ("text_model" in name or "language" in name) for name in selection.convert)
        reasons = {reason for name, reason in selection.keep.items() if part in name}
        assert reasons == {"vision or audio tower (other_modalities=True binarizes it)"}
        assert any(part in name for name in select(model, other_modalities=True).convert)
        # a checkpoint of an older version, that has them packed and lists what it has not
        assert any(part in name for name in select_modules(model, ARBConfig(dataset=None), stored=True).convert)


def test_a_model_around_a_vision_language_model():
    """ColPali holds the configuration of PaliGemma, and that the one of the tower."""
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "model_type": "gemma"}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"}  # fmt: skip
    inner = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=64)
    with torch.device("meta"):
        model = transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=inner))
    assert all("language_model.layers" in name for name in select(model).convert)


def test_subclasses_of_linear_stay():
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = tiny_model("LlamaForCausalLM")
    model.model.layers[0].mlp.up_proj = Other(96, 160)
    assert "Other" in select(model).keep["model.layers.0.mlp.up_proj"]


def test_shared_modules_stay():
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert select(model).keep["model.layers.0.mlp.up_proj"] == "module shared by several parents"


def test_conv1d_counts_with_its_shape_turned():
    model = tiny_model("GPT2LMHeadModel")
    assert len(select(model).convert) == 8
    c_fc = model.transformer.h[0].mlp.c_fc
    assert is_linear(c_fc)
    assert linear_shape(c_fc) == (160, 96)
    assert linear_shape(nn.Linear(96, 160)) == (160, 96)


def test_patterns_and_overrides():
    selection = select(
        tiny_model("LlamaForCausalLM"),
        modules_to_not_convert=["q_proj", r"re:.*layers\.1\.mlp\..*"],
        overrides={"down_proj": {"planes": 2}, "layers.0.self_attn.k_proj": {"skip": True}},
    )
    assert selection.convert["model.layers.0.mlp.down_proj"].planes == 2
    assert selection.convert["model.layers.0.mlp.up_proj"].planes == 1
    assert selection.keep["model.layers.0.self_attn.q_proj"] == "modules_to_not_convert: 'q_proj'"
    assert selection.keep["model.layers.0.self_attn.k_proj"] == "overrides: skip"
    assert "model.layers.1.self_attn.k_proj" in selection.convert
    assert "model.layers.1.mlp.down_proj" in selection.keep


def test_a_rank_of_more_bits_than_the_weight_has():
    """Its fit ended for want of memory."""
    model = tiny_model("LlamaForCausalLM")
    assert len(select(model, method="arb-dbf", rank=400).convert) == 14
    with pytest.raises(
        ValueError, match=r"q_proj: rank=100000 would take 2,.* bits a weight of \[96, 96\].* at most 16"
    ):
        select(model, method="arb-dbf", rank=100000)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: rank=5000"):
        select(model, overrides={"layers.1.mlp.up_proj": {"method": "arb-dbf", "rank": 5000}})
    assert len(select(model, strict=False, method="arb-dbf", rank=100000).convert) == 14


def test_patterns_that_match_nothing_are_an_error_only_when_strict():
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match="matches none"):
        select(model, modules_to_not_convert=["nothing"])
    assert len(select(model, strict=False, modules_to_not_convert=["nothing"]).convert) == 14


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choices", [{}, {"modules_to_not_convert": [r"re:.*\.1\..*"]}], ids=["default", "skips"])
def test_resolved_skips_say_the_same_in_fewer_words(family, choices):
    selection = select(tiny_model(family), **choices)
    skips = resolved_skips(selection)
    assert len(skips) <= len(selection.keep)
    for name in selection.keep:
        assert any(matches(skip, name) for skip in skips)
    for name in selection.convert:
        assert not any(matches(skip, name) for skip in skips)


def test_selection_needs_no_weights():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_model("LlamaForCausalLM").config)
    assert len(select(model).convert) == 14


def test_bytes_count_shared_tensors_once():
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    assert parameter_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    plain = nn.BatchNorm1d(4)
    assert parameter_bytes(plain) == 4 * 4 * 4 + 8
