"""The table of kernels: which entry serves, whose table goes first, and what a broken file says."""

import json
from pathlib import Path

import pytest
import torch

from optimum_arb.ops.backends.triton import table
from optimum_arb.ops.backends.triton.table import TABLE_VERSION, TOKENS, Entry, bucket, device_file, lookup, read, write

DEVICE = torch.device("cuda", 0)
NAME = "Test GPU 1"
FILE = "Test_GPU_1.json"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with a GPU that no table knows, and no table of the user's."""
    monkeypatch.setenv("OPTIMUM_ARB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(table, "capability", lambda device: (8, 0))
    for cached in (table._entries, lookup):
        cached.cache_clear()
    yield
    for cached in (table._entries, lookup):
        cached.cache_clear()


def entry(n=4096, k=4096, planes=1, tokens=1, kernel="one_bit", microseconds=5.0, **config) -> Entry:
    return Entry(n, k, planes, tokens, kernel, config or {"warps": 8}, microseconds)


def test_bucket():
    assert [bucket(m) for m in (0, 1, 2, 3, 4, 5, 16, 17, 33)] == [1, 1, 2, 4, 4, 8, 16, 32, 64]
    assert bucket(4096) == bucket(5000) == bucket(10**6) == 4096
    assert list(TOKENS) == sorted(TOKENS)


def test_names_of_files(tmp_path, monkeypatch):
    assert device_file("NVIDIA H200") == "NVIDIA_H200.json"
    assert device_file("a/b (c)") == "a_b__c_.json"
    assert device_file(DEVICE) == FILE
    assert table.user_directory() == tmp_path / "kernels"
    monkeypatch.delenv("OPTIMUM_ARB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert table.user_directory() == Path("/cache/optimum_arb/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert table.user_directory() == Path("/home/someone/.cache/optimum_arb/kernels")


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / FILE
    entries = [entry(), entry(n=42, tokens=8, kernel="portable", block_m=64)]
    assert read(path) == []
    write(path, iter(entries))
    assert read(path) == entries
    write(path, [])
    assert read(path) == []
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / FILE
    write(path, [entry()])

    def interrupted():
        yield entry(n=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted())
    assert read(path) == [entry()]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        f'{{"version": {TABLE_VERSION}}}',
        f'{{"version": {TABLE_VERSION}, "entries": [{{"rows": 3}}]}}',
        f'{{"version": {TABLE_VERSION}, "entries": [7]}}',
    ],
)
def test_a_corrupt_file(tmp_path, text):
    path = tmp_path / FILE
    path.write_text(text)
    with pytest.raises(
        ValueError, match=rf"{FILE} is not a table of kernels \(.*\): delete it, or write it again with"
    ):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a table of kernels"):
        read(path)


def test_another_version_is_ignored(tmp_path):
    path = tmp_path / FILE
    path.write_text(json.dumps({"version": TABLE_VERSION + 1, "entries": "of another form"}))
    assert read(path) == []


def test_an_unknown_device():
    assert lookup(DEVICE, 4096, 4096, 1, 1) is None


def test_a_gpu_of_the_same_capability(tmp_path, monkeypatch):
    """An H100 has no table: it takes the H200's, and goes on to for kernels that its user has not tuned."""
    monkeypatch.setattr(table, "capability", lambda device: (9, 0))
    shipped = read(Path(table.__file__).parent / "tables" / table.OF_CAPABILITY[9, 0])
    expected = next(e for e in shipped if (e.out_features, e.in_features, e.planes, e.tokens) == (4096, 4096, 2, 1))
    assert lookup(DEVICE, 4096, 4096, 2, 1) == expected
    half = lookup(DEVICE, 4096, 4096, 2, 16, half_bits=True)
    assert half is not None
    own = entry(n=64)
    fill(own)
    table._entries.cache_clear()
    lookup.cache_clear()
    assert lookup(DEVICE, 4096, 4096, 2, 1) == own
    assert lookup(DEVICE, 4096, 4096, 2, 16, half_bits=True) == half


def fill(*entries: Entry) -> None:
    write(table.user_directory() / FILE, entries)


def test_nearest_shape():
    small, wide, large = entry(n=576, k=576), entry(n=4096, k=512), entry(n=8192, k=8192)
    fill(small, wide, large)
    assert lookup(DEVICE, 576, 576, 1, 1) == small
    assert lookup(DEVICE, 600, 500, 1, 1) == small
    assert lookup(DEVICE, 3000, 600, 1, 1) == wide
    assert lookup(DEVICE, 28672, 8192, 1, 1) == large
    assert lookup(DEVICE, 1, 1, 1, 1) == small
    assert lookup(DEVICE, 576, 576, 1, 2) == small  # the nearest number of tokens of the same kernel
    assert lookup(DEVICE, 576, 576, 1, 8) is None  # another kernel's, of which there is no entry


def test_planes_before_shape():
    one, two = entry(n=576, k=576, planes=1), entry(n=8192, k=8192, planes=2)
    fill(one, two)
    assert lookup(DEVICE, 576, 576, 2, 1) == two
    assert lookup(DEVICE, 8192, 8192, 1, 1) == one
    assert lookup(DEVICE, 576, 576, 3, 1) == two  # the most planes that there are


def test_planes_before_tokens():
    """A number of tokens that was timed for one number of planes alone says nothing of another."""
    one, two = entry(tokens=256, planes=1, kernel="hopper"), entry(tokens=512, planes=2, kernel="hopper")
    fill(one, two)
    assert lookup(DEVICE, 4096, 4096, 1, 256) == one
    assert lookup(DEVICE, 4096, 4096, 2, 256) == two


def test_tokens_have_entries_of_their_own():
    one, eight = entry(tokens=1), entry(tokens=8, kernel="portable")
    fill(one, eight)
    assert lookup(DEVICE, 4096, 4096, 1, bucket(1)) == one
    assert lookup(DEVICE, 4096, 4096, 1, bucket(7)) == eight


def test_the_users_table_goes_first(tmp_path, monkeypatch):
    """Entry by entry: what the user has not tuned is still known."""
    package = tmp_path / "package"
    monkeypatch.setattr(table, "__file__", str(package / "table.py"))
    shipped, other, own = entry(warps=4), entry(n=64, warps=4), entry(warps=16)
    write(package / "tables" / FILE, [shipped, other])
    assert lookup(DEVICE, 4096, 4096, 1, 1) == shipped
    fill(own)
    table._entries.cache_clear()
    lookup.cache_clear()
    assert lookup(DEVICE, 4096, 4096, 1, 1) == own
    assert lookup(DEVICE, 64, 4096, 1, 1) == other


SHIPPED = sorted((Path(table.__file__).parent / "tables").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_tables(path):
    entries = read(path)
    assert entries
    keys = [table.key(e) for e in entries]
    assert len(set(keys)) == len(keys)
    assert path.name == device_file(path.stem)
    for found in entries:
        assert found.tokens in TOKENS
        assert found.microseconds > 0
        assert isinstance(found.config, dict)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_configs_of_shipped_tables(path):
    pytest.importorskip("triton.experimental.gluon")  # Triton from 3.4 on
    from optimum_arb.ops.backends.triton import half_bits
    from optimum_arb.ops.backends.triton.gemm_config import GemmConfig
    from optimum_arb.ops.backends.triton.one_bit import MAX_TOKENS, DecodeConfig

    for found in read(path):
        if found.kernel == "one_bit":
            assert found.tokens <= MAX_TOKENS
            assert DecodeConfig(**found.config).warps in (1, 2, 4, 8, 16, 32)
        elif found.kernel == "half_bits":
            assert MAX_TOKENS <= found.tokens <= half_bits.MAX_TOKENS
            cuts = half_bits.candidates(found.out_features, found.in_features, found.tokens, 132)
            assert half_bits.HalfConfig(**found.config) in cuts
        else:
            assert GemmConfig(**found.config).kernel == found.kernel
