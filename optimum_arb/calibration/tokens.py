"""The calibration tokens of a model: its tokenizer, its longest sequence, its vocabulary."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..config import ARBConfig
from ..custom_data import CalibrationInputs, CalibrationTokens
from .data import DOWNLOADED, calibration_tokens, load_texts


def model_tokens(
    model: PreTrainedModel, config: ARBConfig, checkpoint_files: list[str] | None = None, tokenizer: Any = None
) -> torch.Tensor | CalibrationInputs:
    """The calibration sequences for a model, int64 `[samples, length]`, or the inputs that the user gave.

    Args:
        model: the model; its weights are not looked at.
        config: as for `calibration_tokens`.
        checkpoint_files: where the model comes from, in whose directory a tokenizer is looked for.
        tokenizer: the model's; None looks for it.

    Raises:
        ValueError: as `calibration_tokens`; no tokenizer lies with the model; token ids that it does not have; a model
            that does not run on token ids.
    """
    dataset = config.dataset
    if isinstance(dataset, CalibrationInputs):
        return CalibrationInputs(dataset[: config.num_samples])
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} runs on {model.main_input_name!r}, not on text. Give a list of its inputs, as its "
            f"processor makes them, as dataset ([{{{model.main_input_name!r}: tensor, ...}}, ...]), or dataset=None to "
            "binarize without calibration."
        )
    max_length = _longest_sequence(model)
    if not isinstance(dataset, CalibrationTokens) and dataset is not None:
        if not isinstance(dataset, str) or dataset not in DOWNLOADED:
            load_texts(dataset)  # an unknown or empty set is the first error, not a missing tokenizer
        tokenizer = find_tokenizer(model, checkpoint_files) if tokenizer is None else tokenizer
        longest = getattr(tokenizer, "model_max_length", None)
        max_length = min((length for length in (max_length, longest) if length), default=None)
    tokens = calibration_tokens(config, tokenizer, max_length)
    try:
        embedding = model.get_input_embeddings().weight
    except NotImplementedError:  # a model of several embeddings does not say (FLAVA): what is wrong shows when it runs
        return tokens
    assert isinstance(embedding, torch.Tensor)
    if int(tokens.max()) >= embedding.shape[0] or int(tokens.min()) < 0:
        raise ValueError(
            f"dataset: the token ids range from {int(tokens.min())} to {int(tokens.max())}, the model's embedding has "
            f"{embedding.shape[0]} entries. They were made with another tokenizer."
        )
    return tokens


def _longest_sequence(model: PreTrainedModel) -> int | None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # RoBERTa and its kin count positions from behind the padding index
            longest = min(longest or module.num_embeddings, module.num_embeddings - module.padding_idx - 1)
    return longest


def find_tokenizer(model: PreTrainedModel, checkpoint_files: list[str] | None = None) -> Any:
    """The tokenizer that lies with a model's checkpoint.

    Raises:
        ValueError: there is none.
    """
    places = [model.config.name_or_path] if model.config.name_or_path else []
    if checkpoint_files:
        places.append(os.path.dirname(os.path.abspath(checkpoint_files[0])))
    first: Exception | None = None
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, ImportError, KeyError) as error:
            first = first or error
    raise ValueError(
        f"No tokenizer was found with the model ({', '.join(map(repr, places))}), and calibration text needs one. Save "
        "the tokenizer into the model's directory, pass token ids (a tensor [num_samples, sequence_length]) as "
        "dataset, or dataset=None to binarize without calibration."
    ) from first
