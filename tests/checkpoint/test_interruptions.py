"""What is left when a run is interrupted, once or more, killed, or ended by an error or a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from interruptions import LAYERS, Interruption, config
from safetensors import SafetensorError
from test_quantize_checkpoint import assert_same_files

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.checkpoint.behind import Behind
from optimum_arb.checkpoint.disk_activations import DiskActivations
from optimum_arb.checkpoint.streamed import StreamedWeights
from optimum_arb.checkpoint.work import WorkDirectory
from optimum_arb.loading import calibrated


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
from interruptions import config
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
