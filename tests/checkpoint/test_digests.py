"""SHA-256 of a checkpoint's parts and files, beside the walk."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from optimum_arb.checkpoint import digests as digests_module
from optimum_arb.checkpoint.digests import SourceDigests
from optimum_arb.reproduce import content_digest


class Source:
    """What `SourceDigests` asks of a checkpoint."""

    def __init__(self):
        self.asked: list[str] = []
        self.written = 0

    def state(self, part):
        return self.written

    def fingerprint(self, part, check):
        self.asked.append(part)
        check()
        if part == "broken":
            raise ValueError("was cut short while it was read.")
        return f"of {part}"


@pytest.fixture
def files(tmp_path):
    """Of several sizes, the largest of more than one chunk; one is empty."""
    paths = []
    for index, size in enumerate((1000, 0, 9 << 20, 500)):
        paths.append(tmp_path / f"model-{index}.safetensors")
        paths[-1].write_bytes(bytes([index]) * size)
    return paths


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("optimum_arb-digests")]


def test_each_part_is_read_once_in_the_order_of_asking():
    source = Source()
    digests = SourceDigests(source)
    for part in ("a", "b", "a"):
        digests.begin(part)
    assert [digests.of(part) for part in ("b", "a", "c")] == ["of b", "of a", "of c"]
    assert source.asked == ["a", "b", "c"]
    with pytest.raises(ValueError, match="cut short"):
        digests.of("broken")
    digests.close()
    assert threads() == []


def test_a_part_whose_file_was_written_is_read_again_when_it_is_loaded():
    source = Source()
    digests = SourceDigests(source)
    digests.begin("a")
    source.written += 1
    digests.begin("a")
    source.written += 1  # behind its loading: nothing is read for that
    assert digests.of("a") == "of a"
    assert source.asked == ["a", "a"]
    digests.close()


@pytest.mark.parametrize("shares", [(), (0.1,), (0.5,), (0.2, 0.4, 0.9), (1.0,)])
def test_a_file_is_read_once_however_far_the_walk_came(monkeypatch, files, shares):
    again = []
    monkeypatch.setattr(digests_module, "content_digest", lambda path: again.append(path) or content_digest(path))
    digests = SourceDigests(Source(), map(str, files))
    for share in shares:
        digests.advance(share)
        digests.begin(f"behind {share}")
        digests.of(f"behind {share}")  # one thread: the files are read as far as that
    before = set(digests._done) | ({digests._current[0]} if digests._current else set())
    assert [digests.of_file(path) for path in files] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    ]
    assert {str(path) for path in again} | before == {str(path) for path in files}
    assert {str(path) for path in again} & before == set()
    if shares == (1.0,):
        assert again == []
    digests.close()
    assert threads() == []


def test_a_file_that_the_hub_names_by_its_content_is_not_read(tmp_path):
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(b"something else, which nobody looks at")
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / digest)
    digests = SourceDigests(Source(), [link])
    digests.advance(1.0)
    assert digests.of_file(link) == digest
    digests.close()


def test_another_file_is_read_when_it_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    digests = SourceDigests(Source())
    assert digests.of_file(Path(tmp_path / "config.json")) == hashlib.sha256(b"{}").hexdigest()
    digests.close()


def test_a_file_that_cannot_be_read(tmp_path, files):
    digests = SourceDigests(Source(), files)
    files[0].unlink()
    digests.advance(1.0)
    with pytest.raises(FileNotFoundError):
        digests.of_file(files[2])
    digests.close()


def test_close_ends_what_is_under_way():
    class Endless(Source):
        def fingerprint(self, part, check):
            while True:
                check()

    digests = SourceDigests(Endless())
    digests.begin("a")
    digests.begin("b")
    digests.advance(1.0)
    digests.close()
    assert threads() == []
