"""Files of results: asked for before the work, whole or as they were after it."""

from __future__ import annotations

import errno
import os

import pytest

from optimum_arb.output_files import check_writable, whole


def test_what_can_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path / "new.json")
    check_writable(tmp_path / "one" / "two" / "new.json")
    (tmp_path / "old.json").write_text("{}")
    check_writable(tmp_path / "old.json")
    monkeypatch.chdir(tmp_path)
    check_writable("new.json")
    assert sorted(os.listdir(tmp_path)) == ["old.json"]


def test_what_cannot(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="is a directory: give the name of a file"):
        check_writable(tmp_path)
    for below in ("a.json", "folder/a.json"):
        with pytest.raises(NotADirectoryError, match=r"cannot be written: .*file is a file"):
            check_writable(tmp_path / "file" / below)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable"):
        check_writable(tmp_path / "new.json")


def test_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "report.md"
    for text in ("one", "two"):
        with whole(path) as unfinished:
            unfinished.write_text(text)
        assert path.read_text() == text

    def fill() -> None:
        with whole(path) as unfinished:
            unfinished.write_text("hal")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as Python raises it: it names no file

    with pytest.raises(OSError, match=r"No space left on device: '.*report\.md'$"):
        fill()
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["report.md"]
