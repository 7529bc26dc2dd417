"""Each kind of bad input: one clear error, and nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, text, tiny_model, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimum_arb import ARBConfig, check_output_directory, save_model

LINEAR = "model.layers.1.mlp.up_proj"


def binarize(path, **choices):
    config = ARBConfig(**{"dataset": None, "block_size": 64, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", tokenizer=True)


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    binarize(llama, dataset=tokens(), num_samples=4, act_order=True).save_pretrained(path)
    return path


@pytest.fixture
def packed(saved, tmp_path):
    """A saved binarized model that a test may damage."""
    return shutil.copytree(saved, tmp_path / "packed")


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


# Choices


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "arb-zz"}, "method='arb-zz' is unknown"),
        ({"blok_size": 64}, "Unknown key 'blok_size'"),
        ({"block_size": 100}, "block_size=100 cannot be packed"),
        ({"overrides": {"q_proj": {"plane": 2}}}, "unknown key 'plane'"),
    ],
)
def test_unknown_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        ARBConfig(**choices)


@pytest.mark.parametrize(
    ("choices", "where"),
    [
        ({"modules_to_not_convert": ["qproj"]}, "modules_to_not_convert: the pattern 'qproj'"),
        ({"modules_to_not_convert": [r"re:layers\.9\..*"]}, "modules_to_not_convert: the pattern"),
        ({"overrides": {"self_attn": {"planes": 2}}}, "overrides: the pattern 'self_attn'"),
    ],
)
def test_a_pattern_that_matches_nothing(llama, choices, where):
    with pytest.raises(ValueError, match=where) as error:
        binarize(llama, **choices)
    assert "down_proj, gate_proj" in str(error.value)


def test_a_pattern_that_matches_what_stays_in_float_anyway(llama):
    assert binarize(llama, modules_to_not_convert=["lm_head"]).config.quantization_config.bits_per_weight > 1


def test_nothing_left_to_binarize(llama):
    with pytest.raises(ValueError, match="has no module to binarize"):
        binarize(llama, modules_to_not_convert=["re:.*"])


# Calibration data


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([""], "is empty"),
        ([], "is empty"),
        (["w5 w6 w7"], "has 3 tokens, fewer than one sequence of 16"),
        ("no-such-set", "neither a file nor a known name"),
        (torch.full((2, 16), 4000), "made with another tokenizer"),
    ],
)
def test_calibration_data(llama, dataset, message):
    with pytest.raises(ValueError, match=message):
        binarize(llama, dataset=dataset, sequence_length=16)


def test_empty_and_binary_files(llama, tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="is empty"):
        binarize(llama, dataset=str(tmp_path / "empty.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00w5")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        binarize(llama, dataset=str(tmp_path / "binary.txt"))


@pytest.mark.parametrize(
    ("tensor", "error"),
    [(torch.zeros(3, dtype=torch.int64), ValueError), (torch.zeros(2, 3), TypeError)],
)
def test_calibration_tokens_of_the_wrong_form(tensor, error):
    with pytest.raises(error, match="dataset"):
        ARBConfig(dataset=tensor)


def test_text_without_a_tokenizer(tmp_path):
    source = save_tiny(tmp_path, "LlamaForCausalLM")
    with pytest.raises(ValueError, match="No tokenizer was found"):
        binarize(source, dataset=[text(100)], sequence_length=16)


# Weights and activations


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dataset", [None, tokens()], ids=["data-free", "calibrated"])
def test_weights_that_are_not_finite(tmp_path, value, dataset):
    model = tiny_model("LlamaForCausalLM")
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj: the weight holds NaN or Inf"):
        binarize(tmp_path, dataset=dataset, num_samples=4)


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("inf"), torch.float32), (6e4, torch.float16)], ids=["a weight", "overflow of float16"]
)
def test_activations_that_are_not_finite(tmp_path, value, dtype):
    model = tiny_model("LlamaForCausalLM").to(dtype)
    model.model.layers[1].input_layernorm.weight.data[0] = value
    assert dtype == torch.float32 or all(parameter.isfinite().all() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: the activations"):
        binarize(tmp_path, dataset=tokens(), num_samples=4)


# A saved model


@pytest.mark.parametrize("more", [{}, {"something": "new"}, {"method": "newest"}])
def test_newer_format(packed, more):
    change_config(packed, format_version=99, optimum_arb_version="9.9", **more)
    with pytest.raises(ValueError, match=r"format version 99 .*optimum_arb 9\.9.*pip install -U"):
        LlamaForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("name", ["weight", "weight_row_scale", "weight_col_scale", "weight_permutation"])
def test_missing_tensor_of_a_packed_module(packed, name):
    change_tensors(packed, lambda tensors: tensors.pop(f"{LINEAR}.{name}"))
    with pytest.raises(ValueError, match=rf"{LINEAR}: the tensor '{LINEAR}\.{name}' is missing"):
        LlamaForCausalLM.from_pretrained(packed)


def test_missing_module(packed):
    def remove(tensors):
        for key in [key for key in tensors if key.startswith(LINEAR)]:
            del tensors[key]

    change_tensors(packed, remove)
    with pytest.raises(ValueError, match=rf"{LINEAR}: the tensor '{LINEAR}\.weight' is missing"):
        LlamaForCausalLM.from_pretrained(packed)
    with pytest.raises(ValueError, match="is missing"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_missing_float_tensor(packed):
    change_tensors(packed, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm: the tensor 'model\.norm\.weight' is missing"):
        LlamaForCausalLM.from_pretrained(packed)


def test_missing_bias(tmp_path):
    source = save_tiny(tmp_path / "float", "OPTForCausalLM")
    binarize(source).save_pretrained(tmp_path / "packed")
    key = "model.decoder.layers.0.fc1.bias"
    change_tensors(tmp_path / "packed", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("name", ["weight", "weight_row_scale", "weight_col_scale", "weight_permutation"])
def test_tensor_of_the_wrong_shape(packed, name):
    key = f"{LINEAR}.{name}"
    change_tensors(packed, lambda tensors: tensors.update({key: tensors[key][..., :-1].contiguous()}))
    with pytest.raises(ValueError, match=rf"{LINEAR}: the tensor '{key}' is .* but .* follows"):
        LlamaForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("weight", torch.int8), ("weight", torch.float32), ("weight_row_scale", torch.bfloat16),
     ("weight_permutation", torch.float32)],
)  # fmt: skip
def test_tensor_of_the_wrong_dtype(packed, name, dtype):
    key = f"{LINEAR}.{name}"
    change_tensors(packed, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{LINEAR}: the tensor '{key}' is"):
        LlamaForCausalLM.from_pretrained(packed)


def test_float_weight_where_a_packed_one_belongs(packed):
    def replace(tensors):
        for key in [key for key in tensors if key.startswith(LINEAR)]:
            del tensors[key]
        tensors[f"{LINEAR}.weight"] = torch.zeros(160, 96)

    change_tensors(packed, replace)
    with pytest.raises(ValueError, match=rf"{LINEAR}: the quantization_config says that it is binarized"):
        LlamaForCausalLM.from_pretrained(packed)


def test_config_that_does_not_fit_the_tensors(packed):
    change_config(packed, planes=2)
    with pytest.raises(ValueError, match="planes-2-col"):
        LlamaForCausalLM.from_pretrained(packed)


def test_file_cut_short(packed):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no intact safetensors file"):
        LlamaForCausalLM.from_pretrained(packed)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("choices", [{}, {"method": "rtn"}, {"backend": "reference", "planes": 2}])
def test_binarizing_twice(packed, choices):
    with pytest.raises(ValueError, match=r"already binarized with method='arb-hrc'.* cannot be binarized again"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config=ARBConfig(**choices))


def test_offloading_to_disk(llama, tmp_path):
    devices = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    devices["model.rotary_emb"] = "cpu"
    config = ARBConfig(dataset=None, block_size=64)
    with pytest.raises(ValueError, match="offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(
            llama, quantization_config=config, device_map=devices, offload_folder=tmp_path
        )


# The output directory


def test_directory_of_another_model(llama, packed):
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    model = binarize(llama)
    for attempt in (lambda: check_output_directory(packed), lambda: save_model(model, None, packed)):
        with pytest.raises(FileExistsError, match="already holds a model"):
            attempt()
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]


def test_path_that_is_a_file(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            save_model(binarize(llama), None, path)
    assert (tmp_path / "file").read_text() == "mine"


def test_directory_that_is_not_writable(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("optimum_arb.saving.tempfile.TemporaryFile", refuse)  # tests may run as root
    with pytest.raises(PermissionError, match="is not writable"):
        check_output_directory(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_failure_while_saving_leaves_everything_as_it_was(llama, packed, monkeypatch):
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    model = binarize(llama)
    tokenizer = tiny_tokenizer()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tokenizer, packed, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tokenizer, packed.parent / "new")
    assert {file.name: file.read_bytes() for file in packed.iterdir()} == before
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]
