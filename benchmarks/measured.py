"""What the studies of whole models share: token ids, a binarized model with dense weights, and rows kept as files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from optimum_arb import ARBConfig
from optimum_arb.report import model_report


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """int64 `[T]`, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def binarized(source: Path, config: ARBConfig | None, device: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model in float32 on `device`, binarized and made dense again, and the figures of that.

    The dense weights are the same numbers; multiplying by them is faster than by the packed ones.

    Args:
        source: directory of the float model.
        config: how it is binarized; None leaves it as it is, without figures.
        device: where it is binarized, and lies then.
    """
    options = {} if config is None else {"quantization_config": config}
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map=device, **options)
    seconds = time.perf_counter() - start
    if config is None:
        return model, {}
    choices = model.config.quantization_config.to_dict()
    figures = {"config": choices, **model_report(model).figures(), "seconds": seconds}
    return model.dequantize().to(device), figures


def read_row(path: Path) -> dict[str, Any] | None:
    """The row that an earlier run has measured, or None."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Writes a row; a run that is stopped meanwhile leaves none."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(row, indent=1))
    os.replace(unfinished, path)
