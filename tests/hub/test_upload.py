"""What is refused before the Hub is asked for anything; uploads themselves are in `test_hub.py`."""

from __future__ import annotations

import pytest
from tiny_models import save_tiny

from optimum_arb.hub import push_directory, upload


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(upload, "HfApi", lambda **_: pytest.fail("the Hub was asked"))


@pytest.mark.parametrize("card", [False, True], ids=["without a card", "with the user's card"])
def test_a_float_model_leaves_no_repository_behind(no_hub, tmp_path, card):
    """With a card of the user's own, a float model was uploaded; without, an empty repository was made."""
    path = save_tiny(tmp_path / "float", "LlamaForCausalLM")
    if card:
        (path / "README.md").write_text("# Mine")
    with pytest.raises(ValueError, match="holds no model that was binarized by optimum_arb"):
        push_directory(path, "me/model")


def test_a_directory_that_holds_no_model(no_hub, tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"holds no model: it has no config\.json"):
            push_directory(path, "me/model")
