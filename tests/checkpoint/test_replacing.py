"""The place of the result: the model before it, another model, another disk."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from interruptions import LAYERS, config, count_binarized, interrupt
from test_quantize_checkpoint import assert_same_files
from tiny_models import save_tiny

from optimum_arb import quantize_checkpoint
from optimum_arb.checkpoint import quantize as quantize_module


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
