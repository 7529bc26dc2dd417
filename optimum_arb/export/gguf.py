"""A binarized model as one GGUF file for llama.cpp.

A weight of one sign plane without column scales and column order is exactly llama.cpp's type Q1_0; models made with
`ARBConfig.for_gguf()` have no others. What Q1_0 cannot hold becomes the narrowest type that is exact; what no such type
holds is refused, unless the caller allows it, and then its difference is measured and told.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..format.packing import unpack
from ..nn import ARBFactorizedLinear, ARBLinear
from ..output_files import name_full_disk
from ..result import Result
from ..version import __version__
from .architecture import (
    Architecture,
    describe_architecture,
    rope_factors,
    row_order,
    tensor_names,
    write_hyperparameters,
)
from .encode import FLOAT_TYPES, Encoded, encode_binarized, encode_float
from .folding import Linear, fold_mlp, take_rows
from .tokenizer import write_tokenizer


@dataclass(frozen=True)
class TensorReport:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's name of it.
        source: its name in transformers.
        kind: its ggml type.
        shape: as in transformers.
        bytes: bytes of its data.
        binarized: whether it is binarized in the model.
        difference: Frobenius norm of what the file's values differ from the model's, over the tensor's norm; where a
            column scale was folded in, at least the largest relative rounding of a scale. 0 is exact.
        reason: why a binarized weight is not Q1_0, and what was folded into it.
    """

    name: str
    source: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    binarized: bool
    difference: float
    reason: str


@dataclass(frozen=True)
class GGUFReport(Result):
    """What was exported.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of it.
        tokenizer: whether the file has one.
        file_bytes: bytes of the file.
        bits_per_weight: bits of the binarized weights in the file over their number.
        tensors: every tensor, in the order of the file.
        notes: what else to know.
    """

    path: str
    architecture: str
    tokenizer: bool
    file_bytes: int
    bits_per_weight: float
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every value in the file is the model's."""
        return all(tensor.difference == 0 for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**super().to_dict(), "exact": self.exact}


@torch.no_grad()
def export_gguf(
    model: PreTrainedModel,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    embedding_type: str = "auto",
    float_type: str = "auto",
    pre_tokenizer: str | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> GGUFReport:
    """Writes a binarized model as a GGUF file.

    Args:
        model: a binarized Llama, Mistral, Qwen2 or Qwen3 with a language-modelling head, on any device.
        tokenizer: its fast tokenizer, or None for a file that takes token ids alone.
        path: the file.
        name: the model's name in the file; None takes the one in its configuration.
        embedding_type: the type of the embedding and of the output layer: "auto" (the narrowest of Q8_0, F16, BF16
            and F32 that is exact), "F32", "F16", "BF16" or "Q8_0".
        float_type: the same for other linears in float; "F32" also for binarized ones that no narrower type holds.
        pre_tokenizer: llama.cpp's name of the tokenizer's rule for words, where it is not in the table of `word_rule`.
        allow_lossy: write a file whose values differ from the model's, and report by how much.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: the file exists, and `overwrite` is False.
        ValueError: the model is not binarized, llama.cpp does not have its architecture, a tensor holds NaN or Inf, or
            one would not be exact and `allow_lossy` is False. Nothing is written then.
        ImportError: the package `gguf` is not installed, or too old for Q1_0.
    """
    gguf = _gguf()
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory: give the name of a file, such as {path / 'model.gguf'}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} already exists. Choose another name, or overwrite it.")
    for option, value in (("embedding_type", embedding_type), ("float_type", float_type)):
        if value not in FLOAT_TYPES:
            raise ValueError(f"{option}={value!r} is unknown: use one of {', '.join(FLOAT_TYPES)}.")
    if not any(isinstance(module, ARBLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no binarized module: binarize it first, with ARBConfig.for_gguf()."
        )
    architecture = describe_architecture(type(model).__name__, model.config)
    encoded = _encode(model, architecture, embedding_type, float_type)
    tensors = _reports(model, architecture, encoded)
    if not allow_lossy:
        _refuse_lossy(tensors)
    writer = gguf.GGUFWriter(path=None, arch=architecture.name)
    _write_general(writer, gguf, model, name)
    write_hyperparameters(writer, architecture)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        write_tokenizer(writer, tokenizer, model.config.vocab_size, pre_tokenizer)
    for report, entry in zip(tensors, encoded.values(), strict=True):
        raw = gguf.GGMLQuantizationType[entry.kind] if entry.data.dtype == np.uint8 else None
        writer.add_tensor(report.name, entry.data, raw_dtype=raw)
    _save(writer, path, lambda file: _check(gguf, file, tensors, list(encoded.values())))
    weights = [tensor for tensor in tensors if tensor.binarized]
    count = sum(int(np.prod(tensor.shape)) for tensor in weights)
    return GGUFReport(
        path=str(path),
        architecture=architecture.name,
        tokenizer=tokenizer is not None,
        file_bytes=path.stat().st_size,
        bits_per_weight=8 * sum(tensor.bytes for tensor in weights) / count,
        tensors=tuple(tensors),
        notes=tuple(architecture.notes),
    )


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("The export to GGUF needs the package gguf: pip install 'optimum-arb[gguf]'") from None
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0"):
        raise ImportError("This version of the package gguf has no type Q1_0: pip install -U 'gguf>=0.19'")
    return gguf


def _encode(
    model: PreTrainedModel, architecture: Architecture, embedding_type: str, float_type: str
) -> dict[str, Encoded]:
    """Every tensor as the file will hold it, by transformers' name."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise ValueError(f"{name} holds NaN or Inf, and is not exported. Check the checkpoint, binarize again.")
    # in F32 every value of column scales is exact where it is; in a float16 scale it would be rounded
    linears, foldings = _linears(model, fold_scales=float_type != "F32")
    result: dict[str, Encoded] = {}
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for owner, module in model.named_modules():
        if isinstance(module, ARBLinear):
            linear = linears.pop(owner)
            order = row_order(architecture, owner, module.out_features)
            if order is not None:
                linear = take_rows(linear, order)
            encoded = encode_binarized(linear.weight, float_type)
            rounding = foldings.get(owner, 0.0)
            if rounding:
                folded = "column scales of the linear after it are folded in"
                encoded.reason = f"{encoded.reason}; {folded}" if encoded.reason else folded
                encoded.difference = max(encoded.difference, rounding)
            result[f"{owner}.weight"] = encoded
            if linear.bias is not None:
                result[f"{owner}.bias"] = encode_float(linear.bias, "F32")
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{key}"
            if module is embeddings[1] and key == "weight" and parameter is getattr(embeddings[0], "weight", None):
                continue  # tied: llama.cpp takes the embedding where there is no output layer
            kind = embedding_type if any(module is e for e in embeddings) else float_type
            order = row_order(architecture, owner, parameter.shape[0])
            if order is not None:
                parameter = parameter[order.to(parameter.device)]
            # llama.cpp computes with norms and biases in F32 alone
            result[name] = encode_float(parameter, kind if parameter.dim() == 2 else "F32")
    factors = rope_factors(architecture)
    if factors is not None:
        result["rope_freqs.weight"] = encode_float(factors, "F32")
    return result


def _linears(model: PreTrainedModel, fold_scales: bool) -> tuple[dict[str, Linear], dict[str, float]]:
    """The binarized linears on the CPU with what can be folded folded, and name -> rounding where scales were."""
    linears: dict[str, Linear] = {}
    foldings: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, ARBLinear):
            if any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(f"{name} is offloaded: load the model without offloading to export it.")
            if isinstance(module, ARBFactorizedLinear):
                raise ValueError(
                    f"{name}: its weight is a product of two sign matrices (method='arb-dbf'), which no type of "
                    "llama.cpp holds. Binarize the model with ARBConfig.for_gguf(), or call model.dequantize(), save "
                    "it and use llama.cpp's own converter."
                )
            packed = {key: tensor.cpu() for key, tensor in module.packed().items()}
            weight = unpack(packed, module.layout, module.in_features, module.block_size, module.hadamard)
            linears[name] = Linear(weight, None if module.bias is None else module.bias.detach().cpu())
    for down in [name for name in linears if name.endswith("mlp.down_proj")]:
        stem = down.removesuffix("down_proj")
        gate, up = stem + "gate_proj", stem + "up_proj"
        if gate in linears and up in linears:
            *folded, rounding = fold_mlp(linears[gate], linears[up], linears[down], fold_scales)
            linears[gate], linears[up], linears[down] = folded
            if rounding:
                foldings[up] = rounding
    return linears, foldings


def _reports(model: PreTrainedModel, architecture: Architecture, encoded: dict[str, Encoded]) -> list[TensorReport]:
    binarized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, ARBLinear)}
    names = tensor_names(architecture, [name for name in encoded if name != "rope_freqs.weight"])
    reports = []
    for source, entry in encoded.items():
        shape = tuple(entry.data.shape)
        if source in binarized:
            module = model.get_submodule(source.removesuffix(".weight"))
            assert isinstance(module, ARBLinear)
            shape = (module.out_features, module.in_features)
        elif source != "rope_freqs.weight":
            shape = tuple(model.get_parameter(source).shape)
        reports.append(
            TensorReport(
                name=names.get(source, source),
                source=source,
                kind=entry.kind,
                shape=shape,
                bytes=entry.data.nbytes,
                binarized=source in binarized,
                difference=entry.difference,
                reason=entry.reason,
            )
        )
    return reports


def _refuse_lossy(tensors: list[TensorReport]) -> None:
    lossy = [tensor for tensor in tensors if tensor.difference > 0]
    if not lossy:
        return
    worst = max(lossy, key=lambda tensor: tensor.difference)
    why = Counter(tensor.reason or "the type that was asked for it" for tensor in lossy).most_common(3)
    raise ValueError(
        f"{len(lossy)} of {len(tensors)} tensors would not be exact, {worst.source} the worst: a relative difference "
        f"of {worst.difference:.2e} as {worst.kind}. Causes: "
        + "; ".join(f"{reason} ({count})" for reason, count in why)
        + ". Binarize with ARBConfig.for_gguf() for a model that is exported without loss, ask for F32, or allow the "
        "loss (allow_lossy=True, --allow-lossy)."
    )


def _write_general(writer: Any, gguf: Any, model: PreTrainedModel, name: str | None) -> None:
    config = getattr(model.config, "quantization_config", None)
    writer.add_type("model")
    base = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    writer.add_name(Path(base).name)
    writer.add_quantized_by(f"optimum-arb {__version__}")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q1_0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    method, calibration = getattr(config, "method", None), getattr(config, "calibration", None)
    if method is not None:
        writer.add_string("arb.method", method)
    if calibration:
        writer.add_string("arb.calibration", json.dumps(calibration))


def _save(writer: Any, path: Path, check: Callable[[Path], None]) -> None:
    """Writes beside the file, checks what lies there, and renames it: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        try:
            writer.write_header_to_file(path=Path(unfinished))
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as error:
            if error.errno is None:  # numpy's, of an array: it tells neither the file nor the reason
                raise OSError(f"{path} could not be written ({error}): the disk may be full.") from error
            raise
        check(Path(unfinished))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(unfinished, 0o666 & ~umask)  # mkstemp's own are for this user alone
        os.replace(unfinished, path)
    except OSError as error:
        name_full_disk(error, path)
        raise
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _check(gguf: Any, path: Path, tensors: list[TensorReport], encoded: list[Encoded]) -> None:
    """Whether the file, read with gguf's own reader, holds the tensors that were to be written."""
    try:
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except (IndexError, ValueError) as error:  # what the reader raises where a file was cut short
        raise OSError(f"{path} cannot be read back ({error}): the disk may be full or damaged.") from error
    for report, entry in zip(tensors, encoded, strict=True):
        stored = found.pop(report.name, None)
        if (
            stored is None
            or stored.tensor_type.name != report.kind
            or tuple(int(size) for size in reversed(stored.shape)) != report.shape
            or stored.data.tobytes() != entry.data.tobytes()
        ):
            raise OSError(f"{path} does not hold {report.name} as it was written: the disk may be full or damaged.")
    if found:
        raise OSError(f"{path} holds the unknown tensor {next(iter(found))}.")
