"""Binarized checkpoints that somebody changed: refused with the tensor's name before anything of them is allocated."""

from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, LlamaModel

from optimum_arb import ARBConfig
from optimum_arb.format.packing import FORMAT_VERSION
from optimum_arb.inspection import inspect_model
from optimum_arb.stored.header import MAX_HEADER
from optimum_arb.version import FIRST_READERS, __version__

LINEAR = "model.layers.1.mlp.up_proj"


def make(folder, **choices):
    source = save_tiny(folder / "float", "LlamaForCausalLM")
    config = ARBConfig(**{"dataset": tokens(), "num_samples": 4, "block_size": 64, "act_order": True, **choices})
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def salient(tmp_path_factory):
    """A model with salient columns."""
    return make(tmp_path_factory.mktemp("salient"), method="arb-rc", dataset=None)


@pytest.fixture
def packed(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "packed")


def change_tensors(path, changes):
    file = path / "model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


def change_header(path, change):
    """Rewrites the header of a file by itself; the data stay."""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def change_config(path, changes, inner=True):
    config = json.loads((path / "config.json").read_text())
    (config["quantization_config"] if inner else config).update(changes)
    (path / "config.json").write_text(json.dumps(config))


def refusal(path, *patterns, model_class=LlamaForCausalLM):
    with pytest.raises((ValueError, TypeError)) as error:
        model_class.from_pretrained(path)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), error.value
    assert "\n" not in str(error.value)


# Tensors that do not belong there


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.evil",
        "model.layers.7.mlp.up_proj.weight",
        "model.layers.7.mlp.up_proj.weight_row_scale",
        f"{LINEAR}.weight_zero_point",
        "a\nb\x1b[31m",
    ],
)
def test_extra_tensors(packed, key):
    change_tensors(packed, {key: torch.zeros(3, 3, dtype=torch.uint8)})
    refusal(packed, re.escape(repr(key)), "LlamaForCausalLM does not have")
    if "\n" not in key:
        return
    # another class of model may lack what it does not need, and does not run it
    assert isinstance(LlamaModel.from_pretrained(packed), LlamaModel)


def test_a_companion_of_another_layout(packed):
    change_tensors(packed, {f"{LINEAR}.weight_salient_columns": torch.zeros(1, 3, dtype=torch.int16)})
    refusal(packed, rf"'{LINEAR}\.weight_salient_columns', which the layout planes-1-col")


@pytest.mark.parametrize("name", ["weight", "weight_row_scale", "weight_permutation", "weight_salient_columns"])
def test_scalars(packed, name):
    dtype = {"weight": torch.uint8, "weight_row_scale": torch.float16}.get(name, torch.int16)
    change_tensors(packed, {f"{LINEAR}.{name}": torch.ones((), dtype=dtype)})
    refusal(packed, rf"{LINEAR}: .*'{LINEAR}\.{name}'")


def test_a_tensor_in_two_files(packed):
    tensors = load_file(packed / "model.safetensors")
    key = f"{LINEAR}.weight"
    (packed / "model.safetensors").unlink()
    for number, part in ((1, tensors), (2, {key: tensors[key]})):
        save_file(part, packed / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {key: "model-00002-of-00002.safetensors"}
    (packed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refusal(packed, rf"The tensor '{key}' is in .*model-00002-of-00002\.safetensors and in another file")


# Tensors with other contents


@pytest.mark.parametrize(
    "change",
    [lambda p: p[0, 0].fill_(30000), lambda p: p[0, 0].fill_(-1), lambda p: p[0, 0].copy_(p[0, 1])],
    ids=["too large", "negative", "twice"],
)
def test_permutations(packed, change):
    permutation = load_file(packed / "model.safetensors")[f"{LINEAR}.weight_permutation"]
    change(permutation)
    change_tensors(packed, {f"{LINEAR}.weight_permutation": permutation})
    refusal(packed, rf"^{LINEAR}: the tensor '{LINEAR}\.weight_permutation' is no order of the 96 columns")


@pytest.mark.parametrize("change", [lambda c: c.flip(1), lambda c: c + 96, lambda c: c - 97, lambda c: c.clamp(max=0)])
def test_salient_columns(salient, tmp_path, change):
    path = shutil.copytree(salient, tmp_path / "packed")
    key = next(key for key, t in load_file(path / "model.safetensors").items() if "columns" in key and t.shape[1] > 1)
    columns = load_file(path / "model.safetensors")[key]
    change_tensors(path, {key: change(columns).contiguous()})
    refusal(path, rf"'{key}' is no list of columns of \d+ in ascending order")


def test_a_dropped_permutation_is_told_by_the_configuration(packed):
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{LINEAR}.weight_permutation"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    refusal(packed, rf"{LINEAR}: the tensor '{LINEAR}\.weight_permutation' is missing")
    calibration = json.loads((packed / "config.json").read_text())["quantization_config"]["calibration"]
    assert calibration["unreached"] == []
    # a linear that no calibration token reached has none, and says so
    change_config(packed, {"calibration": {**calibration, "unreached": [LINEAR]}})
    assert torch.isfinite(outputs(LlamaForCausalLM.from_pretrained(packed), tokens(1, 8))).all()


@pytest.mark.parametrize("names", [[float("nan")], [None, 7], [[LINEAR]]])
def test_names_that_are_none(packed, names):
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{LINEAR}.weight_permutation"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    calibration = json.loads((packed / "config.json").read_text())["quantization_config"]["calibration"]
    change_config(packed, {"calibration": {**calibration, "unreached": names}})
    refusal(packed, rf"{LINEAR}: the tensor '{LINEAR}\.weight_permutation' is missing")


@pytest.mark.parametrize(
    ("tensor", "shown"), [(torch.zeros(7), r"F32 \[7\]"), (torch.zeros(96, dtype=torch.int64), r"I64 \[96\]")]
)
def test_float_tensors(packed, tensor, shown):
    change_tensors(packed, {"model.norm.weight": tensor})
    refusal(packed, rf"The tensor 'model\.norm\.weight' is {shown} in the checkpoint, but")


def test_a_head_of_another_size_may_be_asked_for(tmp_path):
    source = save_tiny(tmp_path / "float", "RobertaForSequenceClassification")
    config = ARBConfig(dataset=None, block_size=64)
    model = AutoModelForSequenceClassification.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    load = AutoModelForSequenceClassification.from_pretrained
    if Version(transformers.__version__) >= Version("5.23"):  # older ones give a binarized model no new head
        loaded = load(tmp_path / "packed", num_labels=7, ignore_mismatched_sizes=True)
        assert loaded.classifier.out_proj.weight.shape[0] == 7
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "packed", num_labels=7)
    with pytest.raises(ValueError, match=r"'classifier\.out_proj\.\w+' is F32"):
        load(tmp_path / "packed", num_labels=5000, ignore_mismatched_sizes=True)


# Sizes that were never meant to be allocated


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"vocab_size": 10**12}, "lm_head.weight|model.embed_tokens.weight"),
        ({"hidden_size": 96 * 10**9}, "weight"),
        ({"intermediate_size": 160 * 10**9}, "mlp.(down|gate|up)_proj.weight"),
    ],
)
@pytest.mark.parametrize("model_class", [LlamaForCausalLM, LlamaModel])
def test_absurd_sizes_in_the_configuration(packed, changes, tensor, model_class):
    change_config(packed, changes, inner=False)
    refusal(packed, rf"'[\w.]*({tensor})' is", "in the checkpoint, but", model_class=model_class)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planes": 99}, "planes=99 must be a whole number from 1 to 3"),
        ({"planes": "2"}, "planes='2' must be"),
        ({"planes": 3}, r"'model\.layers\.\d\.[\w.]+\.weight' is U8 .* layout planes-3-col"),
        ({"overrides": {"up_proj": {"planes": 2}}}, r"up_proj\.weight' is U8 .* layout planes-2-col"),
        ({"overrides": [1]}, r"overrides=\[1\] must be a dictionary"),
        ({"overrides": {"up_proj": "skip"}}, "must be a dictionary of choices"),
        ({"calibration": "x"}, "calibration='x' must be a dictionary"),
        ({"block_size": 128 * 10**15}, "block_size=128000000000000000"),
        ({"block_size": "64"}, "block_size='64' is no whole number"),
        ({"method": "rtn"}, "which the layout planes-1 of method='rtn' does not have"),
        ({"modules_to_not_convert": ["re:("]}, "is no regular expression"),
        ({"format_version": "1"}, "format_version='1' .* is no format"),
        ({"format_version": [1]}, r"format_version=\[1\] .* is no format"),
        ({"format_version": 1.0}, "format_version=1.0 .* is no format"),
        ({"format_version": None}, "format_version=None .* is no format"),
        ({"format_version": 0}, "format_version=0 .* is no format"),
    ],
)
def test_configurations(packed, changes, message):
    change_config(packed, changes)
    refusal(packed, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40, 2**40]}, "overflow"),
        ({"shape": [1000, 1000]}, "shape"),
        ({"shape": [-1, 12]}, "-1"),
        ({"dtype": "ZZ"}, "ZZ"),
        ({"data_offsets": [10**12, 10**12 + 1920]}, "invalid offset for tensor"),
        ({"data_offsets": [0, 1920]}, "invalid offset for tensor"),
    ],
)
def test_headers(packed, change, message):
    change_header(packed, lambda header: header[f"{LINEAR}.weight"].update(change))
    refusal(packed, r"model\.safetensors is no intact safetensors file", message)


@pytest.mark.parametrize("length", [2**62, MAX_HEADER + 1])
def test_huge_headers_are_not_read(packed, length):
    file = packed / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refusal(packed, rf"its header would have {length:,} bytes")


@pytest.mark.parametrize("content", [b"", b"12345", struct.pack("<Q", 8) + b"not json", b"\x80\x04K\x01."])
def test_files_of_another_kind(packed, content):
    (packed / "model.safetensors").write_bytes(content)
    refusal(packed, r"model\.safetensors is no intact safetensors file")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": [1]}'])
def test_an_index_of_another_kind(packed, content):
    (packed / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        inspect_model(packed)


# A newer format


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        ({"requires": "optimum-arb>=2.5", "optimum_arb_version": "3.0"}, 'pip install -U "optimum-arb>=2.5"'),
        ({"requires": "optimum-arb; rm -rf ~", "optimum_arb_version": "3.0"}, 'pip install -U "optimum-arb>=3.0"'),
        ({"requires": 7, "optimum_arb_version": "$(evil)"}, "pip install -U optimum-arb"),
    ],
)
def test_a_newer_format_names_the_version_that_reads_it(packed, recorded, command):
    change_config(packed, {"format_version": FORMAT_VERSION + 1, "new_key": 1, **recorded})
    refusal(packed, re.escape(command) + "$", rf"the installed optimum_arb {re.escape(__version__)} reads up to")


def test_saved_models_say_what_reads_them(saved):
    recorded = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert recorded["requires"] == f"optimum-arb>={FIRST_READERS[recorded['format_version']]}"
    assert max(FIRST_READERS) == FORMAT_VERSION


# Experts


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    save_moe(folder / "float", "MixtralForCausalLM")
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64, act_order=True)
    AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config).save_pretrained(
        folder / "packed"
    )
    return folder / "packed"


def test_tensors_of_experts(experts, tmp_path):
    tensors = load_file(experts / "model.safetensors")
    key = next(key for key in tensors if ".experts.1." in key and key.endswith("weight_permutation"))
    for number, (name, tensor, message) in enumerate(
        [
            (key, tensors[key].clamp(max=5), f"'{key}' is no order of the "),
            (key.replace("experts.1.", "experts.77."), tensors[key], "experts"),
            (key.replace("_permutation", "_zero_point"), tensors[key], "does not have"),
        ]
    ):
        path = shutil.copytree(experts, tmp_path / str(number))
        change_tensors(path, {name: tensor.contiguous()})
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(path)


def test_the_card_counts_experts(experts):
    bits = inspect_model(experts)
    assert f"{bits.bits_per_weight:.4f}, over {bits.weights:,} binarized weights" in (experts / "README.md").read_text()
