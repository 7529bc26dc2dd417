"""Calibration data that the user hands over in memory: held by a configuration, never copied or written with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class CalibrationTexts(Sequence[str]):
    """The user's own calibration texts. Copying a configuration, as transformers does often, does not copy them."""

    def __init__(self, texts: Sequence[str]):
        self._texts = tuple(texts)
        for index, text in enumerate(self._texts):
            if not isinstance(text, str):
                raise TypeError(f"dataset[{index}] is a {type(text).__name__}: a list of calibration texts holds str.")

    def __getitem__(self, index):
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)

    def __deepcopy__(self, memo):
        return self

    def __repr__(self) -> str:
        return f"<{len(self)} texts, sha256 {self.fingerprint()[:12]}>"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for text in self._texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


class CalibrationTokens:
    """The user's own calibration sequences: token ids int64 `[num_samples, sequence_length]`. Copying a configuration
    does not copy them.

    Raises:
        ValueError: the tensor has another number of dimensions, or holds no token.
        TypeError: it does not hold whole numbers.
    """

    def __init__(self, tokens: torch.Tensor):
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"dataset is a tensor of {tokens.dtype}: token ids are int64.")
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(
                f"dataset is a tensor of shape {tuple(tokens.shape)}: token ids are [num_samples, sequence_length]."
            )
        self.tokens = tokens.detach().to("cpu", torch.int64).contiguous()

    def __deepcopy__(self, memo):
        return self

    def __repr__(self) -> str:
        return f"<{self.tokens.shape[0]} x {self.tokens.shape[1]} tokens, sha256 {self.fingerprint()[:12]}>"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


class CalibrationInputs(Sequence[dict[str, Any]]):
    """The user's own calibration inputs, each a batch as the model's `forward` takes it (what a processor returns):
    for models that run on images or sound. Copying a configuration does not copy them.

    Raises:
        TypeError: an input that is no mapping.
        ValueError: an input without a tensor.
    """

    def __init__(self, inputs: Sequence[Mapping[str, Any]]):
        self._inputs: list[dict[str, Any]] = []
        for index, one in enumerate(inputs):
            if not isinstance(one, Mapping):
                raise TypeError(
                    f"dataset[{index}] is a {type(one).__name__}: a list of model inputs holds mappings, such as "
                    "{'input_features': tensor, 'decoder_input_ids': tensor}."
                )
            batch = {key: v.detach().cpu() if isinstance(v, torch.Tensor) else v for key, v in one.items()}
            if not any(isinstance(value, torch.Tensor) for value in batch.values()):
                raise ValueError(f"dataset[{index}] holds no tensor. Ask the processor for return_tensors='pt'.")
            self._inputs.append(batch)

    def __getitem__(self, index):
        return self._inputs[index]

    def __len__(self) -> int:
        return len(self._inputs)

    def __deepcopy__(self, memo):
        return self

    def __repr__(self) -> str:
        return f"<{len(self)} model inputs, sha256 {self.fingerprint()[:12]}>"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for batch in self._inputs:
            for key in sorted(batch):
                digest.update(key.encode() + b"\0")
                value = batch[key]
                if isinstance(value, torch.Tensor):
                    digest.update(str((value.dtype, tuple(value.shape))).encode())
                    value = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                else:
                    value = repr(value).encode()
                digest.update(value)
        return digest.hexdigest()
