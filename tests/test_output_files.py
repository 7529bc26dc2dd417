"""Whether a file can be written, asked before the work."""

from __future__ import annotations

import os

import pytest

from optimum_arb.output_files import check_writable


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
