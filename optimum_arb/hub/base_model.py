"""What is known of the model that a binarized one was made from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HTTPError

logger = logging.getLogger(__name__)

# What the card of a derived model takes over from its base model's.
CARD_KEYS = ("license", "license_name", "license_link", "language")


def base_model_facts(name: str | None, revision: str | None = None, given: dict[str, Any] | None = None) -> dict | None:
    """What a binarized model records of its base model.

    Args:
        name: what it was loaded from. Of a directory, which says nothing to others, only its card's licence counts.
        revision: the commit that it was loaded at.
        given: what the user said, which comes first.

    Returns:
        `name`, `revision`, and of a directory the keys of `CARD_KEYS`, as far as they are known; None if none is.
    """
    facts: dict[str, Any] = {}
    if name and Path(name).is_dir():
        facts = _read(Path(name) / "README.md")
    elif name and not Path(name).is_absolute():
        facts = {"name": name, "revision": revision}
    if given and given.get("name") != facts.get("name"):
        facts.pop("revision", None)
    facts |= given or {}
    return {key: value for key, value in facts.items() if value is not None} or None


def card_facts(name: str, revision: str | None, online: bool, token: str | bool | None = None) -> dict[str, Any]:
    """The keys of `CARD_KEYS` that the card of a model on the Hub has; none where it cannot be had.

    Args:
        name: the model.
        revision: a commit of it.
        online: whether the Hub is asked; otherwise only the cache is.
        token: for the Hub.
    """
    try:
        path = hf_hub_download(name, "README.md", revision=revision, local_files_only=not online, token=token)
    except (OSError, ValueError, HTTPError) as error:
        logger.info("The card of %s cannot be had, and its licence not be taken over: %s", name, error)
        return {}
    return _read(Path(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever a card of somebody else holds, it is no reason to fail
        return {}
    found = {key: data.get(key) for key in CARD_KEYS}
    return {key: value for key, value in found.items() if value and isinstance(value, (str, list))}
