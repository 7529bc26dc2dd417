"""Runs that are interrupted after so many modules."""

from __future__ import annotations

import pytest
from tiny_models import tokens

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.loading import calibrated

CONFIG = {"block_size": 64, "batch_size": 2}
LAYERS = 3


def config(**choices):
    return ARBConfig(**{"dataset": tokens(6), **CONFIG, **choices})


class Interruption:
    """Raises KeyboardInterrupt when so many modules have been binarized."""

    def __init__(self, monkeypatch, after):
        self.count = 0
        for name in ("binarize_linear", "binarize_experts"):
            original = getattr(calibrated, name)

            def counted(*args, original=original):
                self.count += 1
                if self.count > after:
                    raise KeyboardInterrupt
                return original(*args)

            monkeypatch.setattr(calibrated, name, counted)


def interrupt(monkeypatch, after, *args, **options):
    """A run that ends after so many modules; what its interruption says."""
    with monkeypatch.context() as patch:
        Interruption(patch, after)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantize_checkpoint(*args, **options)
    return str(caught.value)


def count_binarized(monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        counter = Interruption(patch, 10**6)
        result = quantize_checkpoint(*args, **options)
    return counter.count, result
