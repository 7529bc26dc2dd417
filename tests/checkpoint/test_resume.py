"""Interrupted runs: what they leave, how they go on, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_quantize_checkpoint import assert_same_files, save
from tiny_models import save_tiny, tokens

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.checkpoint import quantize as quantize_module
from optimum_arb.checkpoint import run as run_module
from optimum_arb.checkpoint.behind import Behind
from optimum_arb.checkpoint.disk_activations import DiskActivations
from optimum_arb.checkpoint.run import work_directory
from optimum_arb.checkpoint.source import CheckpointSource
from optimum_arb.checkpoint.streamed import StreamedWeights
from optimum_arb.checkpoint.work import WorkDirectory
from optimum_arb.loading import calibrated

CONFIG = {"block_size": 64, "batch_size": 2}
LAYERS = 3


def config(**choices):
    return ARBConfig(**{"dataset": tokens(6), **CONFIG, **choices})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A float model, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("finished")
    save_tiny(folder / "float", "LlamaForCausalLM", num_hidden_layers=LAYERS)
    quantize_checkpoint(folder / "float", folder / "out", config())
    return folder


@pytest.fixture(autouse=True)
def no_thread_stays():
    """However a run ended."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("optimum_arb")] == []


class Interruption:
    """Raises KeyboardInterrupt when so many modules have been binarized."""

    def __init__(self, monkeypatch, after):
        self.count = 0
        for name in ("binarize_linear", "binarize_experts"):
            original = getattr(calibrated, name)

            def counted(*args, original=original):
                self.count += 1
                if self.count > after:
                    raise KeyboardInterrupt
                return original(*args)

            monkeypatch.setattr(calibrated, name, counted)


def interrupt(monkeypatch, after, *args, **options):
    """A run that ends after so many modules; what its interruption says."""
    with monkeypatch.context() as patch:
        Interruption(patch, after)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize_checkpoint(*args, **options)
    return str(caught.value)


def count_binarized(monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        counter = Interruption(patch, 10**6)
        result = quantize_checkpoint(*args, **options)
    return counter.count, result


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("after", "layers"), [(3, 0), (9, 1), (20, 2)])
def test_goes_on_behind_the_last_finished_layer(tmp_path, monkeypatch, finished, after, layers, on_disk):
    out = tmp_path / "out"
    message = interrupt(monkeypatch, after, finished / "float", out, config(), activations_on_disk=on_disk)
    assert not out.exists()
    if not layers:
        assert message == "interrupted before a layer was finished"
        assert list(tmp_path.iterdir()) == []
    else:
        assert message.startswith(f"interrupted: {layers} of {LAYERS} layers are finished and kept in ")
        assert "--resume" in message
    count, result = count_binarized(
        monkeypatch, finished / "float", out, config(), resume=True, activations_on_disk=on_disk
    )
    assert count == 7 * (LAYERS - layers)
    assert result.resumed_layers == layers
    assert_same_files(out, finished / "out")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("family", "after"),
    [("MixtralForCausalLM", 6), ("GptOssForCausalLM", 7), ("OPTForCausalLM", 13)],
)
def test_of_other_families(tmp_path, monkeypatch, family, after):
    """Packed experts, transposed experts with biases, linears outside of the layers."""
    save(tmp_path / "float", family)
    choices = ARBConfig(dataset=tokens(4), block_size=64)
    quantize_checkpoint(tmp_path / "float", tmp_path / "expected", choices)
    interrupt(monkeypatch, after, tmp_path / "float", tmp_path / "out", choices)
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", choices, resume=True)
    assert result.resumed_layers == (2 if family == "OPTForCausalLM" else 1)
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_interrupted_again_and_again(tmp_path, monkeypatch, finished):
    for _ in range(LAYERS - 1):
        interrupt(monkeypatch, 10, finished / "float", tmp_path / "out", config(), resume=True)
    count, result = count_binarized(monkeypatch, finished / "float", tmp_path / "out", config(), resume=True)
    assert (count, result.resumed_layers) == (7, LAYERS - 1)
    assert_same_files(tmp_path / "out", finished / "out")


def test_hidden_states_in_memory_and_on_disk_can_change(tmp_path, monkeypatch, finished):
    interrupt(monkeypatch, 15, finished / "float", tmp_path / "a", config(), activations_on_disk=True)
    quantize_checkpoint(finished / "float", tmp_path / "a", config(), resume=True)
    interrupt(monkeypatch, 15, finished / "float", tmp_path / "b", config())
    quantize_checkpoint(finished / "float", tmp_path / "b", config(), resume=True, activations_on_disk=True)
    for out in (tmp_path / "a", tmp_path / "b"):
        assert_same_files(out, finished / "out")


def test_outputs_of_one_name_share_no_hidden_states(tmp_path, monkeypatch, finished):
    """Two runs on one scratch disk: the second is begun and ended while the first is at work."""
    scratch = tmp_path / "scratch"
    original = calibrated.binarize_linear
    begun = []

    def another(*args):
        if args[0] == "model.layers.1.self_attn.q_proj" and not begun:
            begun.append(True)
            other = config(dataset=tokens(6, seed=1))
            quantize_checkpoint(finished / "float", tmp_path / "b" / "out", other, activations_on_disk=scratch)
        return original(*args)

    monkeypatch.setattr(calibrated, "binarize_linear", another)
    quantize_checkpoint(finished / "float", tmp_path / "a" / "out", config(), activations_on_disk=scratch)
    assert begun
    assert_same_files(tmp_path / "a" / "out", finished / "out")


def test_layers_that_run_again_leave_one_generation_of_hidden_states(tmp_path, monkeypatch, finished):
    """And not one each: 8.6 GB a layer of a 70B."""
    out, found = tmp_path / "out", []
    interrupt(monkeypatch, 15, finished / "float", out, config())
    advance = DiskActivations.advance

    def counted(self, layer):
        found.append(len([*self.directory.glob("*.hidden")]))
        advance(self, layer)

    monkeypatch.setattr(DiskActivations, "advance", counted)
    quantize_checkpoint(finished / "float", out, config(), resume=True, activations_on_disk=True)
    assert found == [1, 2, 2]
    assert_same_files(out, finished / "out")


def test_damaged_hidden_states_are_computed_again(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 15, finished / "float", out, config(), activations_on_disk=True)
    (kept,) = (work_directory(out) / "activations").glob("*.hidden")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(bytes(data))
    quantize_checkpoint(finished / "float", out, config(), resume=True, activations_on_disk=True)
    assert_same_files(out, finished / "out")


def test_an_interrupted_run_is_not_overrun(tmp_path, monkeypatch, finished):
    interrupt(monkeypatch, 9, finished / "float", tmp_path / "out", config())
    with pytest.raises(FileExistsError, match=r"Go on with it by resume=True \(--resume\), or delete"):
        quantize_checkpoint(finished / "float", tmp_path / "out", config(), overwrite=True)
    assert WorkDirectory(work_directory(tmp_path / "out")).exists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": 2}, "config.planes was 1 and is 2 now"),
        ({"dataset": tokens(6, seed=1)}, "calibration.fingerprint was "),
        ({"dataset": None}, "calibration was {"),
        # with these it is binarized in memory, and what is finished is of no use
        ({"refine": "model"}, 'config.refine was not set and is "model" now'),
        ({"target_bits_per_weight": 1.5}, "config.target_bits_per_weight was not set and is 1.5 now"),
    ],
)
def test_other_choices_are_refused(tmp_path, monkeypatch, finished, change, message):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    before = (work_directory(out) / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="cannot be continued: ") as caught:
        quantize_checkpoint(finished / "float", out, config(**change), resume=True)
    assert message in str(caught.value)
    # nothing is lost by trying
    assert (work_directory(out) / "manifest.json").read_bytes() == before
    quantize_checkpoint(finished / "float", out, config(), resume=True)
    assert_same_files(out, finished / "out")


def test_another_version_machine_or_dtype_is_refused(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    for target, name, value, message in (
        (run_module, "__version__", "9.9", 'versions.optimum_arb was "'),
        (run_module.transformers, "__version__", "9.9", "versions.transformers was "),
        (run_module.torch, "get_num_threads", lambda: 77, "machine.threads was "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(ValueError, match="cannot be continued") as caught:
                quantize_checkpoint(finished / "float", out, config(), resume=True)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match='dtype was "auto" and is "bfloat16" now'):
        quantize_checkpoint(finished / "float", out, config(), resume=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0"),
        ("model.embed_tokens.weight", "the embeddings or the head"),
    ],
)
def test_another_input_is_refused(tmp_path, monkeypatch, tensor, part):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    interrupt(monkeypatch, 9, tmp_path / "float", tmp_path / "out", config())
    stored = load_file(tmp_path / "float" / "model.safetensors")
    stored[tensor][1, 2] += 1
    save_file(stored, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"the float weights of {part} are not those that it began with"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(), resume=True)


def test_a_source_that_changes_before_its_layer_is_loaded(tmp_path, monkeypatch):
    """Its checksum is read ahead, and has to be that of what is loaded."""
    from safetensors.torch import load_file, save_file

    path = save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=LAYERS) / "model.safetensors"
    before, ahead = path.read_bytes(), threading.Event()
    fingerprint, fit = CheckpointSource.fingerprint, calibrated.binarize_linear

    def fingerprints(self, part, *args):
        found = fingerprint(self, part, *args)
        if part == "model.layers.1":
            ahead.set()
        return found

    def fits(name, *args):
        if name == "model.layers.0.mlp.down_proj":
            assert ahead.wait(60)
            stored = load_file(path)
            stored["model.layers.1.mlp.up_proj.weight"][1, 2] += 1
            save_file(stored, path.with_suffix(".new"), {"format": "pt"})
            os.replace(path.with_suffix(".new"), path)
        if name.startswith("model.layers.2."):
            raise KeyboardInterrupt
        return fit(name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSource, "fingerprint", fingerprints)
        patch.setattr(calibrated, "binarize_linear", fits)
        with pytest.raises(KeyboardInterrupt, match="2 of 3 layers"):
            quantize_checkpoint(tmp_path / "float", tmp_path / "out", config())
    path.write_bytes(before)
    with pytest.raises(ValueError, match=r"the float weights of model\.layers\.1 are not those"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(), resume=True)


def test_a_damaged_piece_is_found(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    piece = work_directory(out) / "model.layers.0.safetensors"
    data = bytearray(piece.read_bytes())
    data[-5] ^= 1
    piece.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.safetensors, which an interrupted run finished, is damaged"
    ):
        quantize_checkpoint(finished / "float", out, config(), resume=True)
    (work_directory(out) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of an interrupted run"):
        quantize_checkpoint(finished / "float", out, config(), resume=True)


def test_two_processes_do_not_work_on_one(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    interrupt(monkeypatch, 9, finished / "float", out, config())
    other = WorkDirectory(work_directory(out))
    other.lock()
    try:
        with pytest.raises(RuntimeError, match="Another process is binarizing into"):
            quantize_checkpoint(finished / "float", out, config(), resume=True)
        with pytest.raises(RuntimeError, match="Another process is binarizing into"):  # not: delete that directory
            quantize_checkpoint(finished / "float", out, config())
    finally:
        other.unlock()
    quantize_checkpoint(finished / "float", out, config(), resume=True)
    assert_same_files(out, finished / "out")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), r"No space left on device: '.*\.out\.partial'$"),
        (
            SafetensorError("I/O error: No space left"),
            r"Cannot keep model\.layers\.1 in .*safetensors\.tmp: I/O error",
        ),
        (MemoryError(), "^$"),
    ],
    ids=["disk", "safetensors' word for it", "memory"],
)
def test_a_full_disk_leaves_what_is_finished(tmp_path, monkeypatch, finished, error, raised, caplog):
    from optimum_arb.checkpoint import work as work_module

    out = tmp_path / "out"
    saved = []
    save_file = work_module.save_file

    def fill(tensors, path):
        if len(saved) == 1:
            Path(path).write_bytes(b"half")
            raise error
        saved.append(path)
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "save_file", fill)
        with pytest.raises((OSError, MemoryError), match=raised):
            quantize_checkpoint(finished / "float", out, config())
    assert not out.exists()
    said = caplog.text
    assert f"An error ended the run: 1 of {LAYERS} layers are finished and kept in {tmp_path / '.out.partial'}" in said
    assert "--resume" in said
    result = quantize_checkpoint(finished / "float", out, config(), resume=True)
    assert result.resumed_layers == 1
    assert_same_files(out, finished / "out")


def test_a_layer_that_the_manifest_does_not_name_does_not_count(tmp_path, monkeypatch, finished, caplog):
    """Where the disk is full once its piece is written."""
    out = tmp_path / "out"
    write = WorkDirectory._write_manifest

    def fill(self):
        if len(self.pieces) == 2:
            raise OSError(28, "No space left on device")
        write(self)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "_write_manifest", fill)
        with pytest.raises(OSError, match="No space left on device"):
            quantize_checkpoint(finished / "float", out, config())
    assert f"An error ended the run: 1 of {LAYERS} layers are finished" in caplog.text
    assert quantize_checkpoint(finished / "float", out, config(), resume=True).resumed_layers == 1


def test_what_an_interruption_meets_while_it_is_written_is_kept(tmp_path, monkeypatch, finished):
    """The thread that writes is waited for, before anything is said or removed."""
    out = tmp_path / "out"
    fit, write, wait = calibrated.binarize_linear, WorkDirectory.write_piece, StreamedWeights.wait
    interrupted = threading.Event()

    def interrupt_second_layer(name, *args):
        if name.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return fit(name, *args)

    def waits(self):
        interrupted.set()
        wait(self)

    def writes(self, *args):
        assert interrupted.wait(60)
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "binarize_linear", interrupt_second_layer)
        patch.setattr(StreamedWeights, "wait", waits)
        patch.setattr(WorkDirectory, "write_piece", writes)
        with pytest.raises(KeyboardInterrupt, match=f"1 of {LAYERS} layers are finished and kept in "):
            quantize_checkpoint(finished / "float", out, config())
    assert quantize_checkpoint(finished / "float", out, config(), resume=True).resumed_layers == 1
    assert_same_files(out, finished / "out")


def test_interrupted_twice(tmp_path, monkeypatch, finished):
    """The second time while the first one waits for what is being written, which is kept nevertheless."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Interruption(patch, 10)
        patch.setattr(StreamedWeights, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match="interrupted twice"):
            quantize_checkpoint(finished / "float", out, config())
    assert quantize_checkpoint(finished / "float", out, config(), resume=True).resumed_layers == 1
    assert_same_files(out, finished / "out")


def test_interrupted_three_times(tmp_path, monkeypatch, finished):
    """The third time while the end waits for it: then too nothing is locked and no thread writes when it is over."""
    out, wait, interruptions = tmp_path / "out", Behind.wait, []

    def second(self):
        interruptions.append(2)
        raise KeyboardInterrupt

    def third(self):
        if interruptions == [2]:
            interruptions.append(3)
            raise KeyboardInterrupt
        wait(self)

    with monkeypatch.context() as patch:
        Interruption(patch, 10)
        patch.setattr(StreamedWeights, "wait", second)
        patch.setattr(Behind, "wait", third)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(finished / "float", out, config())
    assert interruptions == [2, 3]
    assert quantize_checkpoint(finished / "float", out, config(), resume=True).resumed_layers == 1
    assert_same_files(out, finished / "out")


def test_an_error_of_writing_that_another_error_overtakes_is_told(tmp_path, monkeypatch, finished, caplog):
    fit = calibrated.binarize_linear

    def fail(self, *args):
        raise OSError(28, "No space left on device")

    def stop(name, *args):
        if name.startswith("model.layers.1."):
            raise ValueError("a weight holds NaN")
        return fit(name, *args)

    monkeypatch.setattr(calibrated, "binarize_linear", stop)
    monkeypatch.setattr(WorkDirectory, "write_piece", fail)
    with pytest.raises(ValueError, match="a weight holds NaN"):
        quantize_checkpoint(finished / "float", tmp_path / "out", config())
    assert "What was finished last could not be kept: [Errno 28] No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_killed_between_a_layers_end_and_its_writing(tmp_path, monkeypatch, finished, on_disk):
    """While the third layer is at work and the second one is not kept yet: what belongs to the first is all there."""
    out = tmp_path / "out"
    code = f"""
import os, sys, threading
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_resume import config
from optimum_arb import quantize_checkpoint
from optimum_arb.checkpoint.work import WorkDirectory
from optimum_arb.loading import calibrated
fit, write, writing = calibrated.binarize_linear, WorkDirectory.write_piece, threading.Event()
def writes(self, part, *args):
    if part == "model.layers.1":
        writing.set()
        threading.Event().wait()
    write(self, part, *args)
def fits(name, *args):
    if name == "model.layers.2.mlp.down_proj":  # the layer's outputs are the last thing to come
        assert writing.wait(60)
        os._exit(9)
    return fit(name, *args)
WorkDirectory.write_piece, calibrated.binarize_linear = writes, fits
quantize_checkpoint({str(finished / "float")!r}, {str(out)!r}, config(), activations_on_disk={on_disk})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 9, run.stderr
    restored = []
    restore = DiskActivations.restore

    def restores(self, layer):
        restored.append(restore(self, layer))
        return restored[-1]

    monkeypatch.setattr(DiskActivations, "restore", restores)
    result = quantize_checkpoint(finished / "float", out, config(), resume=True, activations_on_disk=on_disk)
    assert result.resumed_layers == 1
    assert restored == [True] * on_disk
    assert_same_files(out, finished / "out")
    assert list(tmp_path.iterdir()) == [out]


def test_the_previous_model_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, finished):
    out = tmp_path / "out"
    quantize_checkpoint(finished / "float", out, config(planes=2))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    interrupt(monkeypatch, 15, finished / "float", out, config(), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {**before, "notes.txt": b"mine"}
    quantize_checkpoint(finished / "float", out, config(), overwrite=True, resume=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert_same_files(out, finished / "out")


def test_the_model_to_replace_is_not_taken_for_the_new_one(tmp_path, finished):
    """Of the same choices but of another float model: a run that was killed before it kept anything left it there."""
    save_tiny(tmp_path / "other", "LlamaForCausalLM", num_hidden_layers=1)
    out = tmp_path / "out"
    quantize_checkpoint(tmp_path / "other", out, config())
    quantize_checkpoint(finished / "float", out, config(), overwrite=True, resume=True)
    assert_same_files(out, finished / "out")


@pytest.mark.parametrize("cut_short", [False, True])
@pytest.mark.parametrize("change", ["float model", "modules_to_not_convert"])
def test_a_finished_model_of_something_else_is_not_the_result(tmp_path, monkeypatch, finished, change, cut_short):
    save_tiny(tmp_path / "other", "LlamaForCausalLM", num_hidden_layers=LAYERS, seed=1)
    out = tmp_path / "out"
    model, choices = finished / "float", config()
    with monkeypatch.context() as patch:
        if cut_short:
            patch.setattr(quantize_module, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) if cut_short else contextlib.nullcontext():
            quantize_checkpoint(model, out, choices)
    if change == "float model":
        model = tmp_path / "other"
    else:
        choices = config(modules_to_not_convert=["down_proj"])
    error = (ValueError, "of another float model") if cut_short else (FileExistsError, "already holds a model")
    with pytest.raises(error[0], match=error[1]):
        quantize_checkpoint(model, out, choices, resume=True)
    quantize_checkpoint(finished / "float", out, config(), resume=True)
    assert_same_files(out, finished / "out")


def test_cut_short_while_the_model_takes_its_place(tmp_path, monkeypatch, finished):
    """The model is whole then: resuming needs neither the layers nor the float model."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(finished / "float", out, config())
    assert not out.exists()
    count, result = count_binarized(monkeypatch, finished / "float", out, config(), resume=True)
    assert count == 0
    assert result.report.bits_per_weight == result.config.bits_per_weight
    assert_same_files(out, finished / "out")
    # and once more: there is nothing to do
    assert quantize_checkpoint(finished / "float", out, config(), resume=True).report == result.report
    with pytest.raises(FileExistsError, match="already holds a model"):
        quantize_checkpoint(finished / "float", out, config(planes=2), resume=True)


def test_an_output_on_another_disk(tmp_path, monkeypatch, finished):
    """By a link, or as a mount point: nothing can be renamed from beside it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere / "out")
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "notes.txt").write_text("mine")
    replace, disks = os.replace, (elsewhere, mount, tmp_path)

    def replace_on_one_disk(source, place):
        one, other = (next(disk for disk in disks if disk in Path(p).parents) for p in (source, place))
        if one != other:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        replace(source, place)

    monkeypatch.setattr(os, "replace", replace_on_one_disk)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mount)
    for out in (tmp_path / "link", mount):
        interrupt(monkeypatch, 9, finished / "float", out, config())
        assert quantize_checkpoint(finished / "float", out, config(), resume=True).resumed_layers == 1
    assert_same_files(elsewhere / "out", finished / "out")
    (mount / "notes.txt").unlink()
    assert_same_files(mount, finished / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link", "mount"]
    assert [path.name for path in elsewhere.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_state_that_can_be_resumed(tmp_path, finished, number):
    """Through the command line, in a process of its own: it says how to go on, and exits with 130."""
    out = tmp_path / "out"
    code = f"""
import os, signal, sys, torch
from optimum_arb.loading import calibrated
from optimum_arb.commands.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
original, count = calibrated.binarize_linear, [0]
def signalled(*args):
    count[0] += 1
    if count[0] == 10:
        os.kill(os.getpid(), {int(number)})
    return original(*args)
calibrated.binarize_linear = signalled
sys.exit(main(["quantize", {str(finished / "float")!r}, {str(out)!r}, "--block-size", "64", "--no-calibration"]))
"""
    save_tokenizer(finished / "float")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 130, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"optimum-arb: interrupted: 1 of {LAYERS} layers are finished and kept in ")
    assert "--resume" in last
    assert not out.exists()
    result = quantize_checkpoint(finished / "float", out, ARBConfig(block_size=64, dataset=None), resume=True)
    assert result.resumed_layers == 1


def save_tokenizer(path):
    from tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")
def test_killed_at_random_instants():
    script = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
    command = [sys.executable, str(script), "--kills", "6", "--layers", "2", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    trials = json.loads(run.stdout.strip().splitlines()[-1])["trials"]
    assert len({trial["stop"] for trial in trials}) == 6  # signals, a full disk, too little memory, no rights
    assert all(trial["resumed"] and trial["identical"] and not trial["leftovers"] for trial in trials)
    assert all(trial["left"] in ("nothing", "old", "new") for trial in trials)


def test_a_finished_model_whose_files_have_other_names(tmp_path):
    """transformers saves a Llava under the names of older versions; `inspect_model` did not find its linears."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14, "projection_dim": 64}
    text = {"model_type": "llama", **sizes, "vocab_size": 96}
    own = LlavaConfig(vision_config=vision, text_config=text, image_token_index=90)
    LlavaForConditionalGeneration(own).save_pretrained(tmp_path / "float")
    first = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(dataset=None))
    again = quantize_checkpoint(tmp_path / "float", tmp_path / "out", config(dataset=None), resume=True)
    assert {m.name for m in again.report.modules} == {m.name for m in first.report.modules}
    assert again.report.packed_bytes == first.report.packed_bytes
