"""Checksums of saved models: one flipped bit is an error and not another answer."""

from __future__ import annotations

import json
import logging
import shutil
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_llama import LINEAR, quantization, refusal, weights
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from optimum_arb import ARBConfig, save_model
from optimum_arb.stored.checksums import ENTRY, SKIP_VARIABLE, UNFINISHED, VERSION_ENTRY, seal, tensor_checksums, verify
from optimum_arb.stored.header import read_header, set_metadata


def flip(path, key, byte=0, bit=0):
    """Turns one bit of a tensor round."""
    for file in weights(path):
        tensors, _ = read_header(file)
        if key in tensors:
            content = bytearray(file.read_bytes())
            content[tensors[key].start + byte] ^= 1 << bit
            file.write_bytes(content)
            return
    raise KeyError(key)


# What is written


def test_the_entry_is_as_docs_format_says(saved):
    for path in (saved / "one", saved / "shards"):
        for file in weights(path):
            with safe_open(file, framework="pt") as opened:
                entry = json.loads(opened.metadata()[ENTRY])
                keys = sorted(opened.keys())
            header, _ = read_header(file)
            content = file.read_bytes()
            table = []
            for key in keys:
                tensor = header[key]
                salt = f"{key}\0{tensor.dtype}\0{','.join(map(str, tensor.shape))}\0".encode()
                table.append(f"{zlib.crc32(salt + content[tensor.start : tensor.stop]):08x}")
            assert entry["algorithm"] == "crc32"
            assert entry["tensors"] == "".join(table)
            assert entry["quantization"]["method"] == "arb-hrc"
    models = {json.loads(read_header(file)[1][ENTRY])["model"] for path in saved.iterdir() for file in weights(path)}
    assert len(models) == 1  # the same tensors, in one file or in several


def test_every_way_of_saving_records_them(binarized, tmp_path):
    save_model(binarized, None, tmp_path / "a")
    LlamaForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    LlamaForCausalLM.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "b", max_shard_size="60KB")  # over it
    LlamaModel.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")  # other names
    for name in "abc":
        found = verify(weights(tmp_path / name), quantization(tmp_path / name))
        assert found is not None
        assert found.tensors == sum(len(read_header(file)[0]) for file in weights(tmp_path / name)) > 40
    assert not (tmp_path / "b" / "model.safetensors").exists()
    expected = outputs(binarized, tokens(1, 8))
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "b"), tokens(1, 8)), expected)


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GraniteMoeForCausalLM"])
def test_experts(tmp_path, family):
    """One tensor for each expert, and one for all."""
    save_moe(tmp_path / "float", family)
    config = ARBConfig(dataset=None, block_size=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    size = len(model.state_dict())
    model.save_pretrained(tmp_path / "packed", max_shard_size="200KB")
    found = verify(weights(tmp_path / "packed"), quantization(tmp_path / "packed"))
    assert found is not None
    assert found.tensors >= size
    key = next(k for file in weights(tmp_path / "packed") for k in read_header(file)[0] if k.endswith("_row_scale"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    flip(tmp_path / "packed", key)
    with pytest.raises(ValueError, match=rf"the tensor '{key}' in .* is not what was saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_room_is_made_in_place_and_found_again(one):
    """What a file's entry holds while it is saved is as long as what takes its place: nothing is written twice."""
    file = one / "model.safetensors"
    before, inode = file.stat().st_size, file.stat().st_ino
    seal([file], quantization(one))
    assert (file.stat().st_size, file.stat().st_ino) == (before, inode)
    assert verify([file]) is not None


@pytest.mark.parametrize("length", [0, 10, 5000, 100_001])
def test_metadata_of_any_length(one, length):
    file = one / "model.safetensors"
    before = load_file(file)
    set_metadata(file, {"more": "ü" * length})
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["more"] == "ü" * length
    assert all(tensor.start % 8 == 0 for tensor in list(read_header(file)[0].values())[:1])
    after = load_file(file)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [entry.name for entry in one.iterdir() if entry.name.startswith(".")] == []
    assert verify([file], quantization(one)) is not None


def test_threads_agree_with_one(one, monkeypatch):
    expected = tensor_checksums(one / "model.safetensors")
    monkeypatch.setattr("optimum_arb.stored.checksums._RUN", 1000)
    monkeypatch.setattr("optimum_arb.stored.checksums._CHUNK", 7)
    assert tensor_checksums(one / "model.safetensors") == expected


# What is found


@pytest.mark.parametrize(
    "key",
    [
        *(f"{LINEAR}.weight", f"{LINEAR}.weight_row_scale", f"{LINEAR}.weight_col_scale"),
        *("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_one_flipped_bit(one, key):
    flip(one, key, byte=5, bit=2)
    module = LINEAR if key.startswith(LINEAR) else key.removesuffix(".weight")
    refusal(one, rf"^{module}: the tensor '{key}' in .* is not what was saved", r".*verify_checksums=False")


def test_equal_shapes_swapped_between_layers(one):
    tensors = load_file(one / "model.safetensors")
    with safe_open(one / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, one / "model.safetensors", metadata=metadata)
    refusal(one, r"mlp\.up_proj\.weight' in .* is not what was saved")


def test_files_of_two_models(saved, shards, tmp_path):
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM", seed=1)
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    other = LlamaForCausalLM.from_pretrained(source, quantization_config=config)
    other.save_pretrained(tmp_path / "other", max_shard_size="60KB")
    name = weights(shards)[1].name
    assert (tmp_path / "other" / name).exists()
    shutil.copy(tmp_path / "other" / name, shards / name)
    refusal(shards, "are not the files of one saved model")


def test_a_file_without_checksums_among_others(shards):
    file = weights(shards)[1]
    save_file(load_file(file), file, metadata={"format": "pt"})
    refusal(shards, rf"{file.name} records no checksums, which other files of the model do")


def test_a_save_that_was_interrupted(shards):
    set_metadata(weights(shards)[2], {ENTRY: UNFINISHED + " " * 50})
    refusal(shards, r"is not finished: saving it was interrupted")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, r"seed=7, but the weights in .* were saved with 0"),
        ({"block_size": 64, "num_samples": 5}, "num_samples=5"),
        ({"overrides": {"re:nothing": {"planes": 2}}}, "overrides="),
        ({"calibration": None}, "calibration=None"),
    ],
)
def test_a_configuration_of_another_model(one, change, message):
    config = json.loads((one / "config.json").read_text())
    config["quantization_config"] |= change
    (one / "config.json").write_text(json.dumps(config))
    refusal(one, message)


def test_what_may_change_in_a_configuration(one):
    """A measured perplexity, a choice of each load, and what a version that is newer than the model adds."""
    config = json.loads((one / "config.json").read_text())
    config["quantization_config"] |= {"perplexity": {"perplexity": 7.0}, "backend": "reference", "act_order": None}
    (one / "config.json").write_text(json.dumps(config))
    LlamaForCausalLM.from_pretrained(one)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{}", "the checksums in its header are damaged"),
        ("[" * 50_000, "the checksums in its header are damaged"),
        ('{"algorithm": "sha0", "tensors": "", "model": "", "quantization": {}}', "of the kind 'sha0'"),
        ('{"algorithm": "crc32", "tensors": "", "model": "", "quantization": {}}', "records 0 checksums for"),
    ],
)
def test_a_damaged_entry(one, entry, message):
    set_metadata(one / "model.safetensors", {ENTRY: entry})
    refusal(one, message)


def test_a_changed_entry(one):
    file = one / "model.safetensors"
    entry = json.loads(read_header(file)[1][ENTRY])
    entry["model"] = "0" * 16
    set_metadata(file, {ENTRY: json.dumps(entry)})
    refusal(one, "the checksums in its header were changed")


@pytest.mark.parametrize("name", [ENTRY, VERSION_ENTRY])
def test_an_entry_whose_name_was_changed(one, name):
    file = one / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(f'"{name}"'.encode(), f'"{name[:-1]}#"'.encode()))
    refusal(one, "the checksums in its header are damaged")


# What is not compared


def test_skipping_them(one, monkeypatch):
    flip(one, f"{LINEAR}.weight")
    LlamaForCausalLM.from_pretrained(one, quantization_config=ARBConfig(verify_checksums=False))
    LlamaForCausalLM.from_pretrained(one, quantization_config=ARBConfig(verify_checksums=False, backend="reference"))
    monkeypatch.setenv(SKIP_VARIABLE, "1")
    LlamaForCausalLM.from_pretrained(one)
    monkeypatch.setenv(SKIP_VARIABLE, "0")
    refusal(one, "is not what was saved")


def test_a_checkpoint_cannot_ask_for_it(one):
    config = json.loads((one / "config.json").read_text())
    assert "verify_checksums" not in config["quantization_config"]
    config["quantization_config"]["verify_checksums"] = False
    (one / "config.json").write_text(json.dumps(config))
    flip(one, f"{LINEAR}.weight")
    refusal(one, "is not what was saved")


def test_the_choice_is_checked():
    with pytest.raises(TypeError, match="verify_checksums='no' must be True or False"):
        ARBConfig(verify_checksums="no")


def test_metadata_that_are_null(one):
    """The library takes them for none, which would be a file without checksums."""
    path = one / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = None
    path.write_bytes(content[:8] + json.dumps(header).encode().ljust(length) + content[8 + length :])
    with pytest.raises(ValueError, match="no intact safetensors file: its metadata are no table"):
        LlamaForCausalLM.from_pretrained(one)


def test_a_model_of_an_older_version(one, binarized, caplog):
    save_file(load_file(one / "model.safetensors"), one / "model.safetensors", metadata={"format": "pt"})
    assert verify(weights(one)) is None
    with caplog.at_level(logging.INFO, logger="optimum_arb"):
        model = LlamaForCausalLM.from_pretrained(one)
    assert [r.getMessage().count("records no checksums") for r in caplog.records if "checksum" in r.getMessage()] == [1]
    assert torch.equal(outputs(model, tokens(1, 8)), outputs(binarized, tokens(1, 8)))
