"""Measuring a model: perplexity on a held-out text."""

from .perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
