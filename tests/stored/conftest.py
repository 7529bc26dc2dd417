"""A binarized model, saved in one file and in several, and copies of both for a test to break."""

from __future__ import annotations

import shutil

import pytest
from saved_llama import binarized_llama, save_both


@pytest.fixture(scope="module")
def binarized(tmp_path_factory):
    return binarized_llama(tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def saved(binarized, tmp_path_factory):
    return save_both(binarized, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def one(saved, tmp_path):
    return shutil.copytree(saved / "one", tmp_path / "one")


@pytest.fixture
def shards(saved, tmp_path):
    return shutil.copytree(saved / "shards", tmp_path / "shards")
