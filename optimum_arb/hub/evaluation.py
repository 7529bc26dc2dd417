"""A measured perplexity, written where the model's card finds it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evaluate.perplexity import PerplexityResult
from ..output_files import name_full_disk
from .card import write_card

# What makes two perplexities comparable; the seconds are the machine's.
_FIELDS = ("perplexity", "text", "context_length", "windows", "tokens")


def record_perplexity(model: PreTrainedModel | str | Path, result: PerplexityResult) -> None:
    """Records how well a binarized model predicts a text, in `quantization_config` and in its card.

    Args:
        model: the model, whose next `save_pretrained` writes it; or the directory of a saved one.
        result: what `optimum_arb.evaluate.perplexity` measured.

    Raises:
        FileNotFoundError: no such directory, or no model in it.
        ValueError: the model is not binarized, or the perplexity is infinite, which JSON has no number for.
        OSError: config.json or the card cannot be written; the one that cannot is then as it was.
    """
    if not math.isfinite(result.perplexity):
        raise ValueError(
            f"A perplexity of {result.perplexity} cannot be recorded: the model is broken (optimum-arb inspect tells "
            "its worst layers)."
        )
    record = {key: value for key, value in result.to_dict().items() if key in _FIELDS}
    if isinstance(model, PreTrainedModel):
        config: Any = getattr(model.config, "quantization_config", None)
        if getattr(config, "quant_method", None) != "arb":
            raise ValueError(f"{type(model).__name__} is not binarized: its perplexity cannot be recorded.")
        config.perplexity = record
        return
    path = Path(model) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{model} is no directory of a saved model: the perplexity cannot be recorded there.")
    content = json.loads(path.read_text(encoding="utf-8"))
    if (content.get("quantization_config") or {}).get("quant_method") != "arb":
        raise ValueError(f"{model} is not binarized: its perplexity cannot be recorded.")
    content["quantization_config"]["perplexity"] = record
    handle, temporary = tempfile.mkstemp(prefix=".config-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        name_full_disk(error, path)
        raise
    write_card(path.parent)
