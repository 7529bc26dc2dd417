"""A model takes the place of another in one step, or in steps that can be completed."""

from __future__ import annotations

import os
import shutil

import pytest

from optimum_arb import publish as module
from optimum_arb.publish import JOURNAL, finish_interrupted, publish, staging

OLD = {"config.json": "old", "model.safetensors": "old", "model-00001-of-00002.safetensors": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def target(tmp_path):
    return write(tmp_path / "model", OLD)


def put(target, files=NEW):
    with staging(target) as staged:
        publish(write(staged, files), target)


def test_an_exchange(target):
    inode = target.stat().st_ino
    target.chmod(0o750)
    put(target)
    assert read(target) == NEW
    assert target.stat().st_mode & 0o777 == 0o750
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]
    if os.uname().sysname == "Linux":
        assert target.stat().st_ino != inode


def test_other_files_stay(target):
    write(target, {"notes.md": "mine", "own/data": "mine"})
    inode = target.stat().st_ino
    put(target)
    assert read(target) == {**NEW, "notes.md": "mine", "own/data": "mine"}
    assert target.stat().st_ino == inode
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]


def test_where_directories_cannot_be_exchanged(target, monkeypatch):
    monkeypatch.setattr(module, "_exchanged", lambda one, other: False)
    put(target)
    assert read(target) == NEW


@pytest.mark.parametrize("moves", range(4))
def test_a_replacement_that_is_cut_short(target, monkeypatch, moves):
    """After any number of files the directory is no model, and the next save, or a call, completes the new one."""
    write(target, {"notes.md": "mine"})
    replace, left = os.replace, [moves + 1]  # the first makes the journal

    def stop(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", stop)
        if moves < len(NEW):
            with pytest.raises(KeyboardInterrupt):
                put(target)
            assert (target / JOURNAL).is_dir()
            assert not (target / "config.json").exists()
        else:
            put(target)
    again = shutil.copytree(target, target.with_name("again"))
    assert finish_interrupted(again) == (moves < len(NEW))
    assert read(again) == {**NEW, "notes.md": "mine"}
    put(target, {"config.json": "newest"})
    assert read(target) == {"config.json": "newest", "tokenizer.json": "new", "notes.md": "mine"}


def test_what_killed_processes_left_is_removed(target):
    left = write(target.with_name(".model-saving-left"), NEW)
    other = write(target.with_name(".other-saving-left"), NEW)
    with staging(target) as staged:
        assert staged.is_dir()
        with staging(target) as second:  # of another process, which lives
            assert staged.is_dir()
            assert second != staged
    assert not left.exists()
    assert other.is_dir()
    assert sorted(entry.name for entry in target.parent.iterdir()) == [".other-saving-left", "model"]


def test_nothing_is_left_where_saving_fails(target):
    def fail():
        with staging(target) as staged:
            write(staged, NEW)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert read(target) == OLD
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]
