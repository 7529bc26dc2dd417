"""How far a model's predictions are from those of the model that it was made from."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..result import Result
from .perplexity import (
    ROWS,
    PerplexityResult,
    check_whole,
    forward_options,
    input_device,
    negative_log_likelihoods,
    not_finite,
    text_windows,
)

# Windows below which no interval is told: with fewer, its own uncertainty is larger than it.
_WINDOWS_OF_AN_INTERVAL = 4


@dataclass(frozen=True)
class Divergence(Result):
    """Two models on the same windows of a text.

    Attributes:
        perplexity: of the model.
        baseline_perplexity: of the baseline.
        perplexity_ratio: the first over the second.
        ratio_interval: within which the ratio lies with 95 %, from the paired differences of the windows; None with
            fewer than 4 windows.
        kl_divergence: mean over the predicted tokens of KL(baseline || model) over the vocabulary, in nats.
        kl_median, kl_99: of the same, the median and the 99th percentile.
        top1_agreement: share of the tokens for which both hold the same next token for the likeliest.
        text, windows, context_length, tokens: as of `PerplexityResult`.
    """

    perplexity: PerplexityResult
    baseline_perplexity: PerplexityResult
    perplexity_ratio: float
    ratio_interval: tuple[float, float] | None
    kl_divergence: float
    kl_median: float
    kl_99: float
    top1_agreement: float
    text: str
    windows: int
    context_length: int
    tokens: int


def divergence(
    model: torch.nn.Module,
    baseline: torch.nn.Module,
    tokenizer_or_token_ids: Any,
    text: str | Path | Sequence[str] = "wikitext-2-test",
    context_length: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Divergence:
    """Runs both models over the same windows, and measures perplexities, KL divergence and agreement on the way.

    No more than the logits of one batch of windows is held of each model; of those, 256 positions at a time are in
    float32.

    Args:
        model, baseline: causal language models of the same vocabulary.
        tokenizer_or_token_ids, text, context_length, max_windows, batch_size, progress: as of `perplexity`.

    Raises:
        ValueError: as `perplexity`; or the models have different vocabularies.
        FileNotFoundError: as `perplexity`.
    """
    check_whole("batch_size", batch_size, 1)
    name, windows = text_windows(model, tokenizer_or_token_ids, text, context_length, max_windows)
    text_windows(baseline, windows, text, context_length)  # its positions may be fewer
    count = len(windows) * (context_length - 1)
    both = (model, baseline)
    training = [one.training for one in both]
    options, devices = [forward_options(one) for one in both], [input_device(one) for one in both]
    losses: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    seconds = [0.0, 0.0]
    divergences, agreed = [], 0
    for one in both:
        one.eval()
    try:
        with torch.no_grad():
            for index, batch in enumerate(tqdm(windows.split(batch_size), desc="predictions", disable=not progress)):
                logits = []
                for which, one in enumerate(both):
                    start = time.perf_counter()
                    inputs = batch.to(devices[which])
                    logits.append(one(input_ids=inputs, **options[which]).logits)
                    found = negative_log_likelihoods(logits[-1], inputs).cpu()
                    seconds[which] += time.perf_counter() - start
                    if not found.isfinite().all():
                        raise not_finite(index * batch_size + int((~found.isfinite()).nonzero()[0]), name)
                    losses[which].append(found)
                kl, same = _compare(*logits)
                divergences.append(kl)
                agreed += same
                del logits
    finally:
        for one, was in zip(both, training, strict=True):
            one.train(was)
    per_window = [torch.cat(found) for found in losses]
    results = [
        _result(found, count, context_length, name, spent) for found, spent in zip(per_window, seconds, strict=True)
    ]
    kl = torch.cat(divergences)
    difference = results[0].negative_log_likelihood - results[1].negative_log_likelihood
    return Divergence(
        perplexity=results[0],
        baseline_perplexity=results[1],
        perplexity_ratio=_exp(difference),
        ratio_interval=_interval((per_window[0] - per_window[1]) / (context_length - 1)),
        kl_divergence=float(kl.mean(dtype=torch.float64)),
        kl_median=float(kl.median()),
        kl_99=float(kl.sort().values[min(len(kl) - 1, math.ceil(0.99 * len(kl)) - 1)]),
        top1_agreement=agreed / count,
        text=name,
        windows=len(windows),
        context_length=context_length,
        tokens=count,
    )


def _compare(logits: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, int]:
    """KL(reference || model) in nats of each predicted token, float32 on the CPU, and how often both agree.

    Args:
        logits, reference: `[batch, length, vocabulary]`; the last position predicts nothing that is known.
    """
    if logits.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"The model predicts {logits.shape[-1]} tokens and the baseline {reference.shape[-1]}: their predictions "
            "cannot be compared. Leave the divergence out, or give the model's own base as baseline."
        )
    found, agreed = [], 0
    for start in range(0, logits.shape[1] - 1, ROWS):
        stop = min(start + ROWS, logits.shape[1] - 1)
        ours = logits[:, start:stop].float().log_softmax(-1)
        theirs = reference[:, start:stop].to(logits.device).float().log_softmax(-1)
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        # rounding makes a divergence of nothing a little negative
        terms = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True)
        # tokens that the baseline masks with -inf have no share, and would give 0 * inf where the model does too
        terms = terms.masked_fill_(theirs == -math.inf, 0).sum(-1)
        found.append(terms.clamp(min=0).flatten().cpu())
    return torch.cat(found), agreed


def _result(losses: torch.Tensor, count: int, context_length: int, text: str, seconds: float) -> PerplexityResult:
    mean = float(losses.sum()) / count
    return PerplexityResult(_exp(mean), mean, count, context_length, len(losses), text, seconds)


def _interval(differences: torch.Tensor) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of perplexities, from the mean differences of the windows, in nats a token."""
    count = len(differences)
    if count < _WINDOWS_OF_AN_INTERVAL:
        return None
    middle, error = float(differences.mean()), float(differences.std()) / math.sqrt(count)
    # Student's t for 95 %, within 1 % from 4 windows on (Abramowitz and Stegun 26.7.5)
    freedom, z = count - 1, 1.959964
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return _exp(middle - t * error), _exp(middle + t * error)


def _exp(value: float) -> float:
    """exp, infinite where a float overflows."""
    return math.exp(value) if value < 709 else math.inf
