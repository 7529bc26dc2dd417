import copy
import shutil

import numpy as np
import pytest
import torch
from gguf_models import VOCABULARY, binarize, save_model
from tiny_models import save_tiny

from optimum_arb import ARBConfig
from optimum_arb.export import export_gguf
from optimum_arb.export.architecture import rotary_order
from optimum_arb.export.blocks import decode_blocks

gguf = pytest.importorskip("gguf")
TOKENS = torch.randint(2, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))


def values(path):
    """Every tensor of a file as float32, by its name there."""
    result = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name == "Q1_0":
            result[tensor.name] = decode_blocks(np.asarray(tensor.data), "Q1_0")
        else:
            result[tensor.name] = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    return result


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_the_preset_exports_every_value(llama, tokenizer, tmp_path):
    report = export_gguf(llama, tokenizer, tmp_path / "m.gguf")
    assert report.exact
    assert report.bits_per_weight == 1.125
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size
    binarized = [tensor for tensor in report.tensors if tensor.binarized]
    assert len(binarized) == 14
    assert {tensor.kind for tensor in binarized} == {"Q1_0"}
    stored = values(tmp_path / "m.gguf")
    assert set(stored) == {tensor.name for tensor in report.tensors}
    layer = llama.model.layers[1]
    order = rotary_order(256, 4)
    assert np.array_equal(stored["blk.1.attn_q.weight"], layer.self_attn.q_proj.dequantize()[order].numpy())
    assert np.array_equal(stored["blk.1.attn_v.weight"], layer.self_attn.v_proj.dequantize().numpy())
    assert np.array_equal(stored["blk.1.ffn_down.weight"], layer.mlp.down_proj.dequantize().numpy())
    assert np.array_equal(stored["blk.1.ffn_norm.weight"], layer.post_attention_layernorm.weight.detach().numpy())
    assert np.array_equal(stored["token_embd.weight"], llama.model.embed_tokens.weight.detach().numpy())


def test_rotary_order_pairs_the_halves_of_a_head():
    assert rotary_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_metadata(llama, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    export_gguf(llama, tokenizer, tmp_path / "m.gguf", name="tiny")
    found = fields(tmp_path / "m.gguf")
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == "tiny"
    assert found["general.file_type"] == 40
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.feed_forward_length"] == 384
    assert found["llama.rope.dimension_count"] == 64
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"]
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["arb.method"] == "arb-hrc"


def test_without_a_tokenizer(llama, tmp_path):
    export_gguf(llama, None, tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "no_vocab"


def test_columns_that_128_does_not_divide_take_more_bits_and_stay_exact(tokenizer, tmp_path):
    directory = save_model(tmp_path / "float", hidden_size=96, intermediate_size=136, head_dim=24)
    report = export_gguf(binarize(directory), tokenizer, tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.kind for tensor in report.tensors}
    assert report.exact
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # 136 columns are not whole blocks of 32 either
    assert {tensor.reason for tensor in report.tensors if tensor.kind == "Q4_0"} == {
        "its 96 columns are not a multiple of 128"
    }


def test_types_of_what_stays_in_float(llama, tmp_path):
    with pytest.raises(ValueError, match=r"2 of 21 tensors would not be exact, .*embed_tokens|lm_head"):
        export_gguf(llama, None, tmp_path / "m.gguf", embedding_type="Q8_0")
    assert not list(tmp_path.iterdir())
    report = export_gguf(llama, None, tmp_path / "m.gguf", embedding_type="Q8_0", allow_lossy=True)
    lossy = {tensor.name: tensor.difference for tensor in report.tensors if tensor.difference}
    assert set(lossy) == {"token_embd.weight", "output.weight"}
    assert all(1e-3 < difference < 1e-2 for difference in lossy.values())
    stored = values(tmp_path / "m.gguf")["output.weight"]
    error = np.linalg.norm(stored - llama.lm_head.weight.detach().numpy()) / np.linalg.norm(stored)
    assert error == pytest.approx(lossy["output.weight"], rel=0.01)


def test_bfloat16_embeddings_stay_bfloat16_where_float16_loses(llama, tmp_path):
    model = copy.deepcopy(llama)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.bfloat16().float()
    model.lm_head.weight.data = model.lm_head.weight.data.half().float()
    model.model.embed_tokens.weight.data[0, 0] = 2**-60
    report = export_gguf(model, None, tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.kind for tensor in report.tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("BF16", "F16")
    assert report.exact


def test_embeddings_that_q8_0_holds_take_no_more(llama, tmp_path):
    model = copy.deepcopy(llama)
    stored = gguf.quants.quantize(model.lm_head.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    model.lm_head.weight.data = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0))
    report = export_gguf(model, None, tmp_path / "m.gguf")
    assert {t.name: t.kind for t in report.tensors}["output.weight"] == "Q8_0"
    assert report.exact


def test_tied_embeddings_are_written_once(tokenizer, tmp_path):
    directory = save_model(tmp_path / "float", tie_word_embeddings=True, num_hidden_layers=1)
    report = export_gguf(binarize(directory), tokenizer, tmp_path / "m.gguf")
    assert "output.weight" not in {tensor.name for tensor in report.tensors}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"col_scale": True}, "it has column scales"),
        ({"act_order": True}, "its columns are permuted"),
        ({"planes": 2}, "its layout planes-2 is more than one plane"),
    ],
)
def test_what_is_not_exact_is_refused_or_measured(llama_directory, tmp_path, changes, reason):
    model = binarize(llama_directory, ARBConfig.for_gguf(dataset=TOKENS, **changes))
    exact = "permuted" in reason  # one plane has float16 values, whatever the order of its columns
    if not exact:
        with pytest.raises(ValueError, match=reason) as caught:
            export_gguf(model, None, tmp_path / "m.gguf")
        assert "--allow-lossy" in str(caught.value)
    report = export_gguf(model, None, tmp_path / "m.gguf", allow_lossy=True)
    wide = [tensor for tensor in report.tensors if reason in tensor.reason]
    assert {tensor.kind for tensor in wide} == {"F16"}
    assert report.exact == exact
    assert max(tensor.difference for tensor in wide) < 1e-3
    layer = model.model.layers[0]
    expected = layer.self_attn.v_proj.dequantize()
    stored = torch.from_numpy(values(tmp_path / "m.gguf")["blk.0.attn_v.weight"])
    assert float((stored - expected).norm() / expected.norm()) < 1e-3
    report = export_gguf(model, None, tmp_path / "f32.gguf", float_type="F32")
    assert report.exact
    assert {tensor.kind for tensor in report.tensors if reason in tensor.reason} == {"F32"}
    stored = torch.tensor(values(tmp_path / "f32.gguf")["blk.0.ffn_up.weight"])
    order = layer.mlp.down_proj.binarized().permutation
    expected = layer.mlp.up_proj.dequantize()
    assert torch.equal(stored, expected if order is None else expected[order])


def mlp(stored, layer, x):
    gate, up, down = (torch.from_numpy(stored[f"blk.{layer}.ffn_{name}.weight"]) for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_the_order_of_down_proj_moves_into_gate_and_up(llama_directory, tmp_path):
    config = ARBConfig.for_gguf(dataset=TOKENS, overrides={"down_proj": {"act_order": True}})
    model = binarize(llama_directory, config)
    assert model.model.layers[0].mlp.down_proj.binarized().permutation is not None
    report = export_gguf(model, None, tmp_path / "m.gguf")
    assert report.exact
    assert {tensor.kind for tensor in report.tensors if tensor.binarized} == {"Q1_0"}
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.layers[1].mlp(x)
    torch.testing.assert_close(mlp(values(tmp_path / "m.gguf"), 1, x), expected, rtol=1e-4, atol=1e-5)


def test_the_column_scales_of_down_proj_move_into_up(llama_directory, tmp_path):
    config = ARBConfig.for_gguf(dataset=TOKENS, overrides={"down_proj": {"act_order": True, "col_scale": True}})
    model = binarize(llama_directory, config)
    with pytest.raises(ValueError, match="column scales of the linear after it are folded in"):
        export_gguf(model, None, tmp_path / "m.gguf")
    report = export_gguf(model, None, tmp_path / "m.gguf", allow_lossy=True)
    assert {tensor.kind for tensor in report.tensors if tensor.binarized} == {"Q1_0"}
    lossy = {tensor.source for tensor in report.tensors if tensor.difference}
    assert lossy == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)}
    assert max(tensor.difference for tensor in report.tensors) <= 2**-11  # rounding to float16
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.layers[1].mlp(x)
    found = mlp(values(tmp_path / "m.gguf"), 1, x)
    assert float((found - expected).norm() / expected.norm()) < 2**-11
    model.model.layers[1].mlp.up_proj.weight_row_scale.data.fill_(6e4)  # times a column scale above 1: no float16
    report = export_gguf(model, None, tmp_path / "m.gguf", allow_lossy=True, overwrite=True)
    kinds = {tensor.source: tensor.kind for tensor in report.tensors}
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "Q1_0"
    assert kinds["model.layers.1.mlp.down_proj.weight"] == "F16"
    assert all(bool(np.isfinite(tensor).all()) for tensor in values(tmp_path / "m.gguf").values())


def test_a_full_disk_is_told_with_the_file(llama, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"mine")

    def full(self):
        raise OSError("4608 requested and 0 written")  # what numpy makes of it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match=r"m\.gguf could not be written \(4608 .*\): the disk may be full"):
        export_gguf(llama, None, tmp_path / "m.gguf", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_bad_input(llama, llama_directory, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    with pytest.raises(FileExistsError, match="is a directory"):
        export_gguf(llama, None, tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="already exists"):
        export_gguf(llama, None, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="embedding_type='Q4_K' is unknown"):
        export_gguf(llama, None, tmp_path / "n.gguf", embedding_type="Q4_K")
    plain = AutoModelForCausalLM.from_pretrained(llama_directory)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no binarized module"):
        export_gguf(plain, None, tmp_path / "n.gguf")
    other = copy.deepcopy(llama)
    other.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        export_gguf(other, None, tmp_path / "n.gguf")
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight_row_scale"):
        broken = copy.deepcopy(llama)
        broken.get_parameter(name).data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=f"^{name} holds NaN or Inf, and is not exported"):
            export_gguf(broken, None, tmp_path / "n.gguf", float_type="F32", allow_lossy=True)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", lambda self: None)
    with pytest.raises(OSError, match="cannot be read back"):
        export_gguf(llama, None, tmp_path / "m.gguf", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_an_architecture_that_is_not_known(tmp_path):
    model = binarize(save_tiny(tmp_path / "float", "OPTForCausalLM"), ARBConfig.for_gguf(dataset=None))
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be exported to GGUF: the export knows Llama"):
        export_gguf(model, None, tmp_path / "m.gguf")
    shutil.rmtree(tmp_path / "float")
    assert not list(tmp_path.iterdir())
