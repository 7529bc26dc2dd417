"""Binarizing from disk to disk: the same files as through memory, with one layer in memory at a time."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from itertools import pairwise

import pytest
import torch
import transformers
from tiny_experts import save_moe
from tiny_models import FAMILIES, save_tiny, text, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb import ARBConfig, model_report, quantize_checkpoint
from optimum_arb.calibration.fitting import Fitting
from optimum_arb.checkpoint import source as source_module
from optimum_arb.checkpoint.digests import SourceDigests
from optimum_arb.checkpoint.work import WorkDirectory

CALIBRATED = [
    "LlamaForCausalLM",
    "OPTForCausalLM",  # linears outside the layers
    "Gemma3ForCausalLM",  # tied embeddings, a mask for each kind of layer
    "GPT2LMHeadModel",  # transposed weights
    "BertModel",  # a pooler after the layers
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",  # layers of two kinds
    "GptOssForCausalLM",
]
OTHERS = ["T5ForConditionalGeneration"]


def save(path, family, **changes):
    return (save_tiny if family in FAMILIES else save_moe)(path, family, **changes)


def in_memory(source, out, config, family, **options):
    model = getattr(transformers, family).from_pretrained(source, quantization_config=config)
    model.save_pretrained(out, **options)
    return model


def assert_same_files(found, expected):
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    for name in names - {"README.md"}:  # which has the directory's name
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("family", [*CALIBRATED, *OTHERS])
def test_the_same_files_as_through_memory(tmp_path, family):
    save(tmp_path / "float", family)
    config = ARBConfig(dataset=tokens(), block_size=64)
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    model = in_memory(tmp_path / "float", tmp_path / "memory", config, family)
    assert_same_files(tmp_path / "out", tmp_path / "memory")
    assert result.report == model_report(model)
    assert result.config.to_dict() == model.config.quantization_config.to_dict()
    assert set(result.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def set_threads():
    """Sets torch's threads for a test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["BertModel", "OPTForCausalLM"])
def test_linears_outside_the_layers_with_several_threads(tmp_path, set_threads, family):
    """Layers are loaded for a run of the whole model and let go of behind it: two runs at once would crash."""
    set_threads(4)
    save(tmp_path / "float", family)
    config = ARBConfig(dataset=tokens(8), block_size=64, admm_iterations=2)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    in_memory(tmp_path / "float", tmp_path / "memory", config, family)
    assert_same_files(tmp_path / "out", tmp_path / "memory")


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "BertModel"])
def test_without_calibration(tmp_path, family):
    save(tmp_path / "float", family)
    config = ARBConfig(dataset=None, block_size=64, planes=2)
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    model = in_memory(tmp_path / "float", tmp_path / "memory", config, family)
    assert_same_files(tmp_path / "out", tmp_path / "memory")
    assert result.report == model_report(model)


@pytest.mark.parametrize("threads", [1, 4])
def test_hidden_states_on_disk(tmp_path, set_threads, threads):
    """With several threads, which read the file at once."""
    set_threads(threads)
    save(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(6), block_size=64, batch_size=2)
    quantize_checkpoint(tmp_path / "float", tmp_path / "a", config)
    quantize_checkpoint(tmp_path / "float", tmp_path / "b", config, activations_on_disk=True)
    quantize_checkpoint(tmp_path / "float", tmp_path / "c", config, activations_on_disk=tmp_path / "fast")
    assert_same_files(tmp_path / "b", tmp_path / "a")
    assert_same_files(tmp_path / "c", tmp_path / "a")
    assert list((tmp_path / "fast").iterdir()) == []


def test_shards_in_and_out(tmp_path):
    """Read from several files, written into several, in the naming and the split of `save_pretrained`."""
    model = transformers.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "whole", "LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "float", max_shard_size="100kB")
    assert (tmp_path / "float" / "model.safetensors.index.json").exists()
    config = ARBConfig(dataset=tokens(), block_size=64)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", config, max_shard_size="50kB")
    in_memory(tmp_path / "float", tmp_path / "memory", config, "LlamaForCausalLM", max_shard_size="50kB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert_same_files(tmp_path / "out", tmp_path / "memory")


def test_another_dtype(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(), block_size=64)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", config, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "memory")
    assert_same_files(tmp_path / "out", tmp_path / "memory")


def test_what_the_checkpoint_holds_twice_and_alike_is_tied(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "float", "LlamaForCausalLM", tie_word_embeddings=True)
    stored = load_file(tmp_path / "float" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    config = ARBConfig(dataset=tokens(), block_size=64)
    for dataset in (tokens(), None):
        config = ARBConfig(dataset=dataset, block_size=64)
        quantize_checkpoint(tmp_path / "float", tmp_path / f"out{dataset is None}", config)
        in_memory(tmp_path / "float", tmp_path / f"memory{dataset is None}", config, "LlamaForCausalLM")
        assert_same_files(tmp_path / f"out{dataset is None}", tmp_path / f"memory{dataset is None}")


def test_saves_the_tokenizer_and_loads_with_it(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM", tokenizer=True)
    config = ARBConfig(dataset=[text(400)], num_samples=4, sequence_length=24, block_size=64)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    assert "config.json" not in {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(**tokenizer("w5 w6 w7", return_tensors="pt")).logits.isfinite().all()
    assert "arb-hrc" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "dataset", "steps"), [("LlamaForCausalLM", tokens(), 4), ("MixtralForCausalLM", None, 1)]
)
def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch, family, dataset, steps):
    """In each step of a layer: query, key and value; output; gate and up; down."""
    save(tmp_path / "float", family, num_hidden_layers=4)
    seen = []
    binarize_all = Fitting.binarize

    def look(self, names, *args):
        layers = self.model.model.layers
        here = [i for i, layer in enumerate(layers) if not any(p.is_meta for p in layer.parameters())]
        gone = [i for i, layer in enumerate(layers) if all(p.is_meta for p in layer.parameters())]
        seen.append((here, gone, self.model.model.embed_tokens.weight.is_meta, self.model.lm_head.weight.is_meta))
        return binarize_all(self, names, *args)

    monkeypatch.setattr(Fitting, "binarize", look)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", ARBConfig(dataset=dataset, block_size=64))
    assert seen == [([i], [j for j in range(4) if j != i], True, True) for i in range(4) for _ in range(steps)]


def test_each_layer_is_read_once(tmp_path, monkeypatch):
    """And the first of its kind a second time, for the short run that shows how layers are called."""
    save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=3)
    parts = []
    load = source_module.CheckpointSource.load
    monkeypatch.setattr(
        source_module.CheckpointSource,
        "load",
        lambda self, part, leave_out=(): (parts.append(part), load(self, part, leave_out)),
    )
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", ARBConfig(dataset=tokens(), block_size=64))
    layers = [part for part in parts if part]
    assert layers == [f"model.layers.{index}" for index in (0, 0, 1, 2)]


def test_the_next_layer_is_read_and_the_last_one_written_while_one_is_at_work(tmp_path, monkeypatch):
    """Writing waits for the next layer's first fit here: one after the other, the run would not end."""
    save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=3)
    events, late = [], []
    fitted = [threading.Event() for _ in range(3)]
    fit, write, load = Fitting.binarize, WorkDirectory.write_piece, source_module.CheckpointSource.load
    begin, fingerprint = SourceDigests.begin, source_module.CheckpointSource.fingerprint
    names = [f"model.layers.{index}" for index in range(3)]

    def fits(self, targets, *args):
        fitted[int(targets[0].split(".")[2])].set()
        return fit(self, targets, *args)

    def writes(self, part, *args):
        following = names.index(part) + 1
        if following < 3 and not fitted[following].wait(60):
            late.append(part)
        write(self, part, *args)

    patches = (
        (Fitting, "binarize", fits),
        (WorkDirectory, "write_piece", writes),
        (SourceDigests, "begin", lambda self, part: (events.append(("read", part)), begin(self, part))[1]),
        (
            source_module.CheckpointSource,
            "load",
            lambda self, part, leave_out=(): (events.append(("load", part)), load(self, part, leave_out))[1],
        ),
        (
            source_module.CheckpointSource,
            "fingerprint",
            lambda self, part, *check: (events.append(("hash", part)), fingerprint(self, part, *check))[1],
        ),
    )
    with monkeypatch.context() as patch:
        for owner, name, function in patches:
            patch.setattr(owner, name, function)
        config = ARBConfig(dataset=tokens(), block_size=64)
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    assert late == []
    for before, name in pairwise(names):
        assert events.index(("read", name)) < events.index(("load", before))
    hashed = [part for event, part in events if event == "hash"]
    assert sorted(hashed) == ["", *names]  # each once
    in_memory(tmp_path / "float", tmp_path / "memory", config, "LlamaForCausalLM")
    assert_same_files(tmp_path / "out", tmp_path / "memory")


def test_a_model_that_is_no_chain_says_so(tmp_path, caplog):
    save_tiny(tmp_path / "float", "T5ForConditionalGeneration")
    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", ARBConfig(dataset=tokens(), block_size=64))
    assert "T5ForConditionalGeneration hand on more than their hidden states: it is binarized with all" in caplog.text


def test_a_checkpoint_that_lacks_a_tensor_is_binarized_in_memory(tmp_path, caplog):
    """transformers initializes it at random, and says so."""
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", ARBConfig(dataset=tokens(), block_size=64))
    assert "lacks 'model.norm.weight'" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens()).logits.isfinite().all()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_refused_writes_nothing(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(), block_size=64)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="already holds a model"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    with pytest.raises(ValueError, match="is already quantized"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", config)
    with pytest.raises(ValueError, match="matches none"):
        quantize_checkpoint(
            tmp_path / "float", tmp_path / "again", ARBConfig(dataset=tokens(), overrides={"nothing": {"planes": 2}})
        )
    shutil.copytree(tmp_path / "float", tmp_path / "strange")
    stored = json.loads((tmp_path / "strange" / "config.json").read_text())
    (tmp_path / "strange" / "config.json").write_text(json.dumps({**stored, "architectures": ["Nobody"]}))
    quantize_checkpoint(tmp_path / "strange", tmp_path / "by-model-type", config)  # its model_type says enough
    assert {path.name for path in tmp_path.iterdir()} == {"float", "out", "strange", "by-model-type"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_nan_in_a_weight_names_the_module(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(stored, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", ARBConfig(dataset=None, block_size=64))
    assert not (tmp_path / "out").exists()


def test_files_are_those_of_the_model(tmp_path):
    """They are what is uploaded: the user's own in the directory are not."""
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    written = set()
    for name, choices in (("streamed", {}), ("in memory", {"target_bits_per_weight": 1.6})):
        out = tmp_path / name
        out.mkdir()
        (out / ".env").write_text("KEY=secret")
        (out / "notes.txt").write_text("mine")
        config = ARBConfig(dataset=tokens(4), **choices)
        result = quantize_checkpoint(tmp_path / "float", out, config)
        written.add(result.files)
        assert {".env", "notes.txt"} == {path.name for path in out.iterdir()} - set(result.files)
    assert len(written) == 1
    again = quantize_checkpoint(tmp_path / "float", tmp_path / "streamed", ARBConfig(dataset=tokens(4)), resume=True)
    assert set(again.files) == {*result.files, "notes.txt"}
