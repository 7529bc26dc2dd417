"""Calibration: text to token batches, the walk over the decoder layers, the statistics of each linear."""

from .data import calibration_tokens, load_texts, token_batches
from .statistics import InputStatistics
from .tokens import find_tokenizer, model_tokens
from .walk import CalibrationWalk

__all__ = [
    "CalibrationWalk",
    "InputStatistics",
    "calibration_tokens",
    "find_tokenizer",
    "load_texts",
    "model_tokens",
    "token_batches",
]
