"""Everything that goes into the output directory, written beside it."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from ..hub.card import NAME as CARD
from ..hub.card import is_users_own
from ..hub.methods import finish_saved
from ..publish import flush
from .assemble import assemble
from .behind import Behind
from .streamed import StreamedWeights
from .work import file_digest, synchronize


def write_finished(
    model: PreTrainedModel,
    weights: StreamedWeights,
    staging: Path,
    output: Path,
    name: str,
    max_shard_size: int | str | None,
    processor: Any,
) -> dict[str, str]:
    """Writes everything that goes into the output directory into another one.

    Returns:
        The names of the files, sorted, with the digest of each. They are on the disk.
    """
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    assemble(model, weights, staging, max_shard_size)
    behind = Behind()
    try:
        # the weights, while they are read twice for their checksums
        behind.do(partial(synchronize, *staging.glob("*.safetensors")))
        processor = processor_of(name) if processor is None else processor
        if processor is not None:
            processor.save_pretrained(staging)
        finish_saved(staging, model, output.absolute().name)
        if is_users_own(output / CARD):
            shutil.copy2(output / CARD, staging / CARD)
        files = sorted(file.relative_to(staging).as_posix() for file in staging.rglob("*") if file.is_file())
        digests = {file: file_digest(staging / file) for file in files}
        behind.settle()
    finally:
        behind.close()
    flush(staging)  # and what was written since
    return digests


def processor_of(name: str) -> Any:
    """What lies with a model to read its inputs with, or None."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

    def has(file: str) -> bool:
        return cached_file(name, file, **quietly) is not None

    if has("processor_config.json") or has("preprocessor_config.json"):
        return AutoProcessor.from_pretrained(name)
    if has("tokenizer_config.json") or has("tokenizer.json"):
        return AutoTokenizer.from_pretrained(name)
    return None
