"""Perplexity of a causal language model on non-overlapping windows of a text."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data import BUNDLED_TEXTS, bundled_text
from ..result import Result

# Rows of logits that are cast to float32 at a time: with a vocabulary of 256,000 this is a quarter of a gigabyte.
ROWS = 256


@dataclass(frozen=True)
class PerplexityResult(Result):
    """A perplexity and all that is needed to compare it with another.

    Attributes:
        perplexity: exp of `negative_log_likelihood`.
        negative_log_likelihood: mean over the predicted tokens, in nats.
        tokens: tokens predicted, which is `windows * (context_length - 1)`.
        context_length: tokens of a window; the first of each is context only.
        windows: windows measured, from the start of the text, without overlap.
        text: the name of the text.
        seconds: wall time of the forward passes.
    """

    perplexity: float
    negative_log_likelihood: float
    tokens: int
    context_length: int
    windows: int
    text: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:,.2f} ({self.text}, {self.tokens:,} tokens predicted "
            f"in {self.windows} windows of {self.context_length})"
        )


def perplexity(
    model: torch.nn.Module,
    tokenizer_or_token_ids: Any,
    text: str | Path | Sequence[str] = "wikitext-2-test",
    context_length: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of any causal language model of transformers, binarized or not.

    The text is tokenized once and as a whole, without special tokens, and cut into windows of `context_length` tokens;
    what is left at the end is dropped. Every window is one forward pass from an empty context and predicts its
    `context_length - 1` last tokens. Log-probabilities are computed in float32 and summed in float64.

    Args:
        model: maps `input_ids` int64 `[batch, context_length]` to an output with `logits` `[batch, context_length,
            vocabulary]`. It is switched to eval mode for the measurement.
        tokenizer_or_token_ids: the model's tokenizer, or the token ids themselves (a list, or a tensor of shape `[T]`
            or `[1, T]`), in which case `text` is not used.
        text: the name of a bundled text, the path of a text file, or a list of texts (joined by empty lines). The
            default is a text on which this package never calibrates.
        context_length: tokens of a window, at least 2.
        max_windows: measure no more windows than this.
        batch_size: windows of a forward pass.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the text is shorter than one window, or has tokens that the model does not know; the windows are
            longer than the model's positions; an argument is out of range; or the model's logits are not finite.
        FileNotFoundError: `text` is neither a bundled text nor a file.
    """
    check_whole("batch_size", batch_size, 1)
    name, tokens = text_windows(model, tokenizer_or_token_ids, text, context_length, max_windows)
    windows = len(tokens)
    batches = tokens.split(batch_size)
    options = forward_options(model)
    device = input_device(model)
    total = torch.zeros((), dtype=torch.float64)
    training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        with torch.no_grad():
            for index, batch in enumerate(tqdm(batches, desc="perplexity", disable=not progress)):
                batch = batch.to(device)
                losses = negative_log_likelihoods(model(input_ids=batch, **options).logits, batch)
                finite = losses.isfinite()
                if not finite.all():
                    window = index * batch_size + int((~finite).nonzero()[0])
                    raise not_finite(window, name)
                total += losses.sum().cpu()
    finally:
        model.train(training)
    count = windows * (context_length - 1)
    mean = float(total) / count
    return PerplexityResult(
        # exp overflows a float above 709 nats
        perplexity=math.exp(mean) if mean < 709 else math.inf,
        negative_log_likelihood=mean,
        tokens=count,
        context_length=context_length,
        windows=windows,
        text=name,
        seconds=time.perf_counter() - start,
    )


def text_windows(
    model: torch.nn.Module,
    tokenizer_or_token_ids: Any,
    text: str | Path | Sequence[str],
    context_length: int,
    max_windows: int | None = None,
) -> tuple[str, torch.Tensor]:
    """The windows of a text, as `perplexity` takes them: its name, and token ids int64 `[windows, context_length]`.

    Raises:
        ValueError, FileNotFoundError: as `perplexity`.
    """
    check_whole("context_length", context_length, 2)
    if max_windows is not None:
        check_whole("max_windows", max_windows, 1)
    check_context_length(context_length, model_positions(model))
    if callable(tokenizer_or_token_ids):
        name, content = read_text(text)
        # Without `verbose=False` a tokenizer warns that the text is longer than the model's context.
        ids = tokenizer_or_token_ids(content, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        name, ids = "token ids", tokenizer_or_token_ids
    tokens = torch.as_tensor(ids).flatten()
    if tokens.is_floating_point() and len(tokens):
        raise ValueError(f"The token ids are {tokens.dtype}: they must be whole numbers.")
    tokens = tokens.long()
    windows = len(tokens) // context_length
    if windows == 0:
        raise ValueError(
            f"The text {name!r} has {len(tokens)} tokens, fewer than one window of {context_length}: "
            "use a longer text or a smaller context_length."
        )
    windows = min(windows, max_windows or windows)
    tokens = tokens[: windows * context_length].view(windows, context_length)
    check_vocabulary(model, tokens, name)
    return name, tokens


def check_vocabulary(model: Any, tokens: torch.Tensor, text: str) -> None:
    """Whether a model has an embedding of every token: a GPU that is asked for another stops working for the process.

    Raises:
        ValueError: it has not.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    low, high = int(tokens.min()), int(tokens.max())
    if rows is not None and (low < 0 or high >= rows):
        raise ValueError(
            f"The text {text!r} has the token id {low if low < 0 else high}, but the model's embedding {rows} rows: "
            "use the model's own tokenizer."
        )


def check_whole(name: str, value: Any, low: int) -> None:
    """Whether a value is a whole number of at least `low`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")


def check_context_length(context_length: int, positions: int | None) -> None:
    """Raises ValueError where windows are longer than a model's positions (None: no limit)."""
    if positions is not None and context_length > positions:
        raise ValueError(
            f"context_length={context_length} is more than the {positions} positions of the model: "
            f"use at most {positions}."
        )


def forward_options(model: Any) -> dict[str, Any]:
    """What a model is called with besides its tokens: a key-value cache is of no use and costs memory."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def read_text(text: str | Path | Sequence[str]) -> tuple[str, str]:
    """The name and the content of a text: bundled, in a file, or given as a list of strings.

    Raises:
        FileNotFoundError: neither a bundled text nor a file.
        ValueError: the text is empty, or the file is not UTF-8.
    """
    if isinstance(text, (str, Path)):
        if str(text) in BUNDLED_TEXTS:
            return str(text), bundled_text(str(text))
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(
                f"The text {str(text)!r} is neither a file nor a bundled text ({', '.join(BUNDLED_TEXTS)})."
            )
        try:
            name, content = path.name, path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"The text {str(text)!r} is no UTF-8 text file: {error}.") from None
    else:
        name, content = f"{len(text)} given texts", "\n\n".join(text)
    if not content.strip():
        raise ValueError(f"The text {name!r} is empty.")
    return name, content


def not_finite(window: int, text: str) -> ValueError:
    """The error of a model whose logits cannot be measured."""
    return ValueError(
        f"The model's logits are not finite in window {window} of {text!r} (counted from 0): its weights hold NaN or "
        "Inf, or its activations overflow; load it with a wider dtype."
    )


def negative_log_likelihoods(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float64 `[batch]`, summed over each window: of logits `[batch, length, vocabulary]`, tokens `[batch, length]`."""
    sums = torch.zeros(len(tokens), dtype=torch.float64, device=logits.device)
    tokens = tokens.to(logits.device)
    for start in range(0, tokens.shape[1] - 1, ROWS):
        stop = min(start + ROWS, tokens.shape[1] - 1)
        losses = torch.nn.functional.cross_entropy(
            logits[:, start:stop].float().flatten(0, 1), tokens[:, start + 1 : stop + 1].flatten(), reduction="none"
        )
        sums += losses.view(len(tokens), -1).double().sum(1)
    return sums


def model_positions(model: torch.nn.Module) -> int | None:
    """The positions of a model, None where its configuration does not limit them."""
    return config_positions(getattr(model, "config", None))


def config_positions(config: Any) -> int | None:
    """The same by a model's configuration."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def input_device(model: Any) -> torch.device:
    """Where the token ids belong: a model that is spread over devices begins with its embedding."""
    first = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
    parameter = next(first.parameters(), None)
    # Hooks of accelerate move the inputs of a module whose weights are offloaded.
    if parameter is None or parameter.device.type == "meta":
        return getattr(model, "device", torch.device("cpu"))
    return parameter.device
