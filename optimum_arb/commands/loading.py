"""Loading models and tokenizers for the commands."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import cached_file

# What `from_pretrained` takes as a device_map besides the name of a device.
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_model(name: str) -> None:
    """Tells a mistyped directory apart from a Hub name, which may not be absolute or have more than one slash.

    Raises:
        FileNotFoundError: `name` can only be a directory and is none, or is one without a `config.json`.
        NotADirectoryError: it is a file.
        ValueError: its `config.json` is none.
    """
    if not name:  # a shell's unset variable, which would be the current directory
        raise FileNotFoundError("The model has an empty name.")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"The directory {name} holds no model: it has no config.json.")
        try:
            json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path / 'config.json'} is no JSON file, or is damaged: {error}.") from None
    elif path.is_file():
        raise NotADirectoryError(f"{name} is a file: give the directory of the model.")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no model directory {name}.")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Has an error of finding a model name it: where the Hub cannot be reached, transformers tells that alone."""
    try:
        yield
    except OSError as error:
        if name in str(error) or Path(name).exists():
            raise
        raise OSError(f"There is no directory {name}, nor such a model in the cache of the Hub: {error}") from error


def check_loading(dtype: str, device_map: str) -> None:
    """What transformers answers with an AttributeError and torch with an AssertionError, told as what it is.

    Raises:
        ValueError: `dtype` is no float dtype of torch's, `device_map` is nothing that torch or accelerate knows, or it
            names a GPU and torch sees none.
    """
    found = getattr(torch, dtype, None)
    floating = isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1
    if dtype != "auto" and not floating:
        raise ValueError(f"dtype={dtype!r} is unknown: use auto, float32, bfloat16 or float16.")
    if device_map not in PLACEMENTS:
        try:
            torch.device(device_map)
        except RuntimeError:
            raise ValueError(
                f"device_map={device_map!r} is unknown: use cpu, cuda, cuda:1 or {', '.join(PLACEMENTS)}."
            ) from None
    if device_map.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device_map={device_map!r} needs a GPU, and torch sees none here.")


def quantization_method(name: str) -> str | None:
    """How the model on disk or on the Hub is quantized: "arb", "gptq", ...; None where it is not."""
    with naming(name):
        quantization = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        FileNotFoundError: see `check_model`; or its directory holds none.
    """
    check_model(name)
    return _tokenizer(name)


def load_processor(name: str, revision: str | None = None) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What a model reads its inputs with: the processor of a model of several modalities, otherwise the tokenizer.

    Raises:
        FileNotFoundError: as `load_tokenizer`.
        ImportError: a package that the processor needs is not installed.
    """
    check_model(name)
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for file in ("processor_config.json", "preprocessor_config.json"):
        if cached_file(name, file, revision=revision, **quietly) is not None:
            return AutoProcessor.from_pretrained(name, revision=revision or "main")
    return _tokenizer(name, revision=revision or "main")


def _tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        path = Path(name)
        if not path.is_dir() or any(any(path.glob(pattern)) for pattern in ("*token*", "vocab*", "*.model")):
            with naming(name):
                raise
        raise FileNotFoundError(
            f"The directory {name} holds no tokenizer: save the model's own there too (tokenizer.save_pretrained)."
        ) from error


def load_model(name: str, dtype: str = "auto", device_map: str = "cpu", backend: str | None = None) -> PreTrainedModel:
    """A causal language model, binarized or not, in eval mode.

    Args:
        name: directory or Hub name.
        dtype: "auto" or the name of a torch dtype.
        device_map: as in `from_pretrained`.
        backend: how a binarized model computes; only for one.

    Raises:
        FileNotFoundError: see `check_model`.
        ValueError: a backend was asked for and the model is not binarized; or see `check_loading`.
    """
    from ..config import ARBConfig

    check_model(name)
    check_loading(dtype, device_map)
    options: dict[str, Any] = {}
    if backend is not None:
        if quantization_method(name) != "arb":
            raise ValueError(f"backend={backend!r} is for binarized models, and {name} is none.")
        options["quantization_config"] = ARBConfig(backend=backend)
    with warnings.catch_warnings():
        # transformers warns that all of our configuration but the backend is ignored, which is what we want
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **options).eval()
