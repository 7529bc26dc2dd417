"""Calibration text and the tokens that are made of it."""

from __future__ import annotations

import hashlib
import logging
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..config import ARBConfig
from ..custom_data import CalibrationInputs, CalibrationTexts, CalibrationTokens

logger = logging.getLogger(__name__)

BUNDLED = {"wikitext-2": "data/wikitext-2/wiki.valid.tokens.txt"}
# Names of optimum.gptq.data, which downloads them.
DOWNLOADED = ("wikitext2", "c4", "c4-new")
# On a GPU 6144 tokens at once take 2.7 s a layer of a 7B and 11.4 GB, 4096 2.9 s and 9.9 GB, 8192 2.8 s and 12.1 GB.
TOKENS_PER_BATCH = 6144
# Tokens of a step of refinement, which is one calibration batch.
TOKENS_PER_STEP = 2048
# Batches of a text on a GPU, at least, of which several processes take some each.
LEAST_BATCHES = 16
# No tokenizer in use spends more characters on a token than this over a longer text.
_CHARACTERS_PER_TOKEN = 24


def load_texts(dataset: str | CalibrationTexts | list[str]) -> list[str]:
    """The texts of a calibration set.

    Args:
        dataset: "wikitext-2" (bundled with the package: the validation split), the path of a UTF-8 text file, or texts.

    Raises:
        ValueError: an unknown name, a file that is not UTF-8 text, or no text but white space.
    """
    if isinstance(dataset, str):
        name = dataset
        if dataset in BUNDLED:
            texts = [files("optimum_arb").joinpath(BUNDLED[dataset]).read_text(encoding="utf-8")]
        elif Path(dataset).is_file():
            try:
                texts = [Path(dataset).read_text(encoding="utf-8-sig")]  # a byte-order mark is no text
            except UnicodeDecodeError as error:
                raise ValueError(f"dataset={dataset!r} is not a UTF-8 text file: {error}.") from None
        else:
            raise ValueError(
                f"dataset={dataset!r} is neither a file nor a known name. Use {', '.join(BUNDLED)}, the path of a text "
                f"file, a list of strings, a tensor of token ids, or {', '.join(DOWNLOADED)} (downloaded)."
            )
    else:
        name, texts = "a list of texts", list(dataset)
    if not any(text.strip() for text in texts):
        raise ValueError(f"dataset: {name} is empty.")
    return texts


def check_dataset(dataset: str) -> None:
    """Whether there is a text of this name or path, asked before the work; what would be downloaded is not looked at.

    Raises:
        ValueError: as `load_texts`.
    """
    if dataset not in DOWNLOADED or Path(dataset).is_file():
        load_texts(dataset)


def calibration_tokens(config: ARBConfig, tokenizer: Any, max_length: int | None = None) -> torch.Tensor:
    """The calibration sequences: the text from its start, without special tokens, cut into consecutive pieces.

    Args:
        config: `dataset`, `num_samples`, `sequence_length` and `seed` count.
        tokenizer: of the model; may be None where `dataset` holds token ids.
        max_length: the longest sequence that the model takes; a longer `sequence_length` is cut to it.

    Returns:
        int64 `[samples, length]`; fewer samples than asked, with a warning, where the text is too short.

    Raises:
        ValueError: the text is empty or shorter than one sequence, or the dataset is unknown.
    """
    dataset = config.dataset
    given = dataset.tokens if isinstance(dataset, CalibrationTokens) else None
    length = config.sequence_length if given is None else min(config.sequence_length, given.shape[1])
    if max_length is not None and length > max_length:
        logger.warning("Calibration sequences of %d tokens are longer than the model takes: %d.", length, max_length)
        length = max_length
    if given is not None:
        tokens = given[: config.num_samples, :length].contiguous()
    elif isinstance(dataset, str) and dataset in DOWNLOADED and not Path(dataset).is_file():
        tokens = _download(dataset, tokenizer, config.num_samples, length, config.seed)
    else:
        assert isinstance(dataset, (str, CalibrationTexts))  # without a dataset nothing is calibrated
        stream = _tokenize(load_texts(dataset), tokenizer, config.num_samples * length)
        samples = min(config.num_samples, len(stream) // length)
        if not samples:
            raise ValueError(
                f"dataset: the calibration text has {len(stream)} tokens, fewer than one sequence of {length}. Give "
                "more text, or a smaller sequence_length."
            )
        tokens = torch.tensor(stream[: samples * length], dtype=torch.int64).view(samples, length)
    if len(tokens) < config.num_samples:
        logger.warning(
            "The calibration set has only %d sequences of %d tokens; num_samples=%d were asked for.",
            len(tokens),
            tokens.shape[1],
            config.num_samples,
        )
    return tokens


def _tokenize(texts: list[str], tokenizer: Any, needed: int) -> list[int]:
    """Token ids of the texts, at least `needed` of them where the texts have as many."""
    if tokenizer is None:
        raise ValueError(
            "A calibration text needs the model's tokenizer: give one, or a tensor of token ids as dataset."
        )
    text = "\n\n".join(texts)
    start = text[: needed * _CHARACTERS_PER_TOKEN]
    ids = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= needed and len(start) < len(text):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _download(name: str, tokenizer: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    state = random.getstate()
    try:
        from optimum.gptq.data import get_dataset

        examples = get_dataset(name, tokenizer, nsamples=samples, seqlen=length, seed=seed, split="train")
    except Exception as error:
        raise ValueError(
            f"dataset={name!r} could not be loaded through optimum.gptq.data ({type(error).__name__}: {error}). It "
            "needs the network and `pip install datasets`; 'wikitext-2' is bundled and needs neither."
        ) from error
    finally:
        random.setstate(state)
    return torch.cat([torch.as_tensor(example["input_ids"]).view(1, -1) for example in examples]).to(torch.int64)


def calibration_batch_size(config: ARBConfig, samples: int, length: int, device: torch.device) -> int:
    """Sequences of a calibration batch: with refinement, about 2048 tokens, unless the configuration says how many.

    Without, what a product makes of a row depends on the rows beside it, so that the model would depend on the number:
    it is one on a CPU, and on a GPU as many as the calibration text alone tells.

    Args:
        config: the configuration.
        samples: sequences of the calibration text.
        length: tokens of each.
        device: where layers run.
    """
    if config.refine is None and device.type == "cuda":
        return max(1, min(TOKENS_PER_BATCH // length, samples // LEAST_BATCHES))
    if config.refine is None:
        return 1
    if config.batch_size is not None:
        return config.batch_size
    return max(1, TOKENS_PER_STEP // length)


def token_batches(tokens: torch.Tensor | CalibrationInputs, batch_size: int | None = None) -> list[Any]:
    """Cuts `[samples, length]` into batches; without a size, of about 6144 tokens each. Inputs of the model are batches
    already."""
    if isinstance(tokens, CalibrationInputs):
        return list(tokens)
    if batch_size is None:
        batch_size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    return list(tokens.split(batch_size))


def split_batches(
    tokens: torch.Tensor | CalibrationInputs, held_out_samples: int, batch_size: int | None = None
) -> tuple[list[Any], int]:
    """All batches, those that nothing is fitted to at the end, and how many these are.

    Raises:
        ValueError: there are no more samples than are to be held out.
    """
    fitted = len(tokens) - held_out_samples
    if fitted < 1:
        raise ValueError(
            f"held_out_samples={held_out_samples} leaves nothing to calibrate on: the calibration set has only "
            f"{len(tokens)} sequences. Give more text, or hold out fewer."
        )
    if isinstance(tokens, CalibrationInputs):
        return list(tokens), held_out_samples
    held_out = token_batches(tokens[fitted:], batch_size) if held_out_samples else []
    return [*token_batches(tokens[:fitted], batch_size), *held_out], len(held_out)


def calibration_record(config: ARBConfig, tokens: torch.Tensor | CalibrationInputs) -> dict[str, Any]:
    """What a saved configuration says of its calibration: the set's name (of a file without its directory), its size
    and the SHA-256 of its tokens or other inputs."""
    held_out = {"held_out_samples": config.held_out_samples} if config.held_out_samples else {}
    if isinstance(tokens, CalibrationInputs):
        return {"dataset": "custom", "samples": len(tokens), **held_out, "fingerprint": tokens.fingerprint()}
    return {
        "dataset": Path(config.dataset).name if isinstance(config.dataset, str) else "custom",
        "samples": tokens.shape[0],
        **held_out,
        "sequence_length": tokens.shape[1],
        "fingerprint": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
