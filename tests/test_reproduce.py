"""What a report tells of its run: enough to repeat it, and nothing that is secret."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from optimum_arb.reproduce import command_line, model_facts, model_fingerprint, reproduce_block


def test_fingerprint_changes_with_any_byte_of_the_model_and_with_nothing_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 1000)
    before = model_fingerprint(tmp_path)
    assert model_facts(str(tmp_path)) == {"name": str(tmp_path), "fingerprint": before}
    (tmp_path / "README.md").write_text("words")
    assert model_fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 999 + b"\1")
    assert model_fingerprint(tmp_path) != before


def test_a_file_in_the_cache_of_the_hub_is_known_by_the_name_of_its_blob(tmp_path):
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(content)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.safetensors").write_bytes(content)
    assert model_fingerprint(tmp_path / "snapshot") == model_fingerprint(plain)


@pytest.mark.parametrize(
    ("arguments", "whole", "expected"),
    [
        (["/usr/bin/python", "-m", "optimum_arb", "evaluate", "/home/me/model"], True,
         "python -m optimum_arb evaluate /home/me/model"),
        (["/usr/bin/python", "/home/me/run.py", "--out=/data/x/y", "a/b"], False, "python run.py --out=y a/b"),
        (["python", "x.py", "/home/me/My Models/llama", "--out=/data/a b/", "--text", "/a/b.txt,/c/d e.txt"], False,
         "python x.py llama '--out=a b' --text 'b.txt,d e.txt'"),
        (["python", "x.py", "--hf-token", "abc", "--api_key=k", "hf_abcdef"], True,
         "python x.py --hf-token ... --api_key=... ..."),
        (["python", "-c", "login('secret')", "x"], True, "python -c ... x"),
        (["python", "x.py", "--prompt", "a b"], True, "python x.py --prompt 'a b'"),
    ],
)  # fmt: skip
def test_command(monkeypatch, arguments, whole, expected):
    monkeypatch.setattr(sys, "orig_argv", arguments)
    assert command_line(whole) == expected


def test_block(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    block = reproduce_block({"base": {"name": "me/base"}}, {"text": "sha256:0"}, 7)
    assert (block["seed"], block["models"], block["datasets"]) == (
        7,
        {"base": {"name": "me/base"}},
        {"text": "sha256:0"},
    )
    assert block["threads"] == torch.get_num_threads()
    assert block["environment"]["OMP_NUM_THREADS"] == "3"
    assert "hf_secret" not in str(block)
    assert block["versions"]["torch"] == torch.__version__
