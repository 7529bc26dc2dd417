"""The methods side by side on one model: true bits, errors, perplexity; resumable row by row."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..calibration.data import check_dataset
from ..config import METHODS, ARBConfig
from ..output_files import check_writable, whole
from ..report import model_report
from ..version import __version__
from .peers import quantize_hqq
from .perplexity import model_positions, perplexity, read_text

FULL = "full"
RESULTS = "compare.json"
PUBLISHED = ("billm", "arb", "arb-x", "arb-rc")
CALIBRATION = ("dataset", "num_samples", "sequence_length", "seed")  # of the settings


@dataclass(frozen=True)
class Settings:
    """What every row has in common.

    Attributes:
        model: directory or Hub name of the float model.
        text: the text of the perplexity: a bundled name or a path.
        context_length: tokens of a window; None is 2048, or the model's positions if they are fewer.
        max_windows: windows measured; None is all.
        dataset: the calibration text.
        num_samples, sequence_length, seed: of the calibration.
        dtype: the dtype in which the model is loaded and measured.
        device_map: where: "cpu", "cuda", ...
    """

    model: str
    text: str = "wikitext-2-test"
    context_length: int | None = None
    max_windows: int | None = None
    dataset: str = "wikitext-2"
    num_samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    dtype: str = "float32"
    device_map: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One line of the table: a configuration, a peer's bits, or full precision.

    Attributes:
        name: as the user wrote it.
        config: the configuration, of our methods and the papers'.
        hqq_bits: bits of a code, of HQQ.
    """

    name: str
    config: ARBConfig | None = None
    hqq_bits: int | None = None


def parse_row(name: str, settings: Settings) -> Row:
    """A row by its name.

    | name | what it is |
    |---|---|
    | `full` | the model as it is |
    | `rtn`, `billm`, `arb`, `arb-x`, `arb-rc` | `ARBConfig(method=...)` |
    | `arb-rc:published` (of `billm`, `arb`, `arb-x`, `arb-rc`) | `ARBConfig.as_published(...)` |
    | `arb-hrc:2` | that many planes; `arb-hrc` is one |
    | `arb-dbf:1.2` | `ARBConfig(method="arb-dbf", factor_bits=1.2)`; `arb-dbf` is one bit |
    | `gguf` | `ARBConfig.for_gguf()` |
    | `arb-hrc:2:hadamard=128:scale_bits=8` | any method of `ARBConfig` with further choices, values as in JSON |
    | `hqq:2` | HQQ at that many bits, where the package is installed |

    Raises:
        ValueError: no such row, or choices that `ARBConfig` refuses.
    """
    method, *rest = name.split(":")
    choice = rest.pop(0) if rest and "=" not in rest[0] else None
    if choice == "" or any("=" not in part for part in rest):
        raise _no_row(name)
    calibration = {key: getattr(settings, key) for key in CALIBRATION}
    further = {**calibration, **_choices(name, rest)}
    alone = choice is None and not rest
    if method == FULL and alone:
        return Row(name)
    if method == "hqq" and choice in ("1", "2", "3", "4", "8") and not rest:
        return Row(name, hqq_bits=int(choice))
    if method == "gguf" and alone:
        return Row(name, ARBConfig.for_gguf(**calibration))
    if method in PUBLISHED and choice == "published" and not rest:
        return Row(name, ARBConfig.as_published(method, **calibration))
    if method == "rtn" and not choice:
        return Row(name, ARBConfig(**{**further, "method": "rtn", "dataset": None}))
    if method == "arb-hrc" and choice in ("1", "2", "3"):
        further["planes"] = int(choice)
    elif method == "arb-dbf" and choice and re.fullmatch(r"[0-9]*\.?[0-9]+", choice):
        further["factor_bits"] = float(choice)
    elif method not in METHODS or choice:
        raise _no_row(name)
    return Row(name, ARBConfig(**{"method": method, **further}))


def _choices(name: str, parts: list[str]) -> dict[str, Any]:
    """What `name=value` says of `ARBConfig`."""
    known = ARBConfig().choices().keys() - {"method", "planes", "factor_bits", *CALIBRATION}
    choices: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key not in known or key in choices:
            raise ValueError(
                f"{part!r} in the row {name!r} is no further choice of ARBConfig: use each of "
                f"{', '.join(sorted(known))} once at most; the calibration is the same for all rows."
            )
        try:
            choices[key] = json.loads(value)
        except json.JSONDecodeError:
            choices[key] = value
    return choices


def _no_row(name: str) -> ValueError:
    return ValueError(
        f"{name!r} is no row of the comparison: use full, rtn, billm, arb, arb-x, arb-rc (with :published as their "
        "authors released them), arb-hrc:1 to arb-hrc:3, arb-dbf:BITS, gguf, or hqq:1, 2, 3, 4 or 8; behind a method "
        "choices of ARBConfig, as in arb-hrc:2:hadamard=128:scale_bits=8."
    )


def compare(
    settings: Settings,
    names: list[str],
    out: str | os.PathLike[str],
    progress: Callable[[str], None] = lambda line: None,
    bars: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measures the rows that `out` does not have yet; every finished row is written at once.

    Args:
        settings: what the rows have in common.
        names: the rows, see `parse_row`; full precision is always measured, first.
        out: a directory; `compare.json` in it holds the settings and the finished rows.
        progress: is called with a line before and after each row.
        bars: show progress bars of the perplexity.

    Returns:
        Name -> row, in the order asked for: `perplexity` (a `PerplexityResult` as a dictionary), `bits_per_weight`,
        `model_bytes`, `seconds`, ...; or `error`, a line, for a row that failed. A failed row is tried again next time.

    Raises:
        ValueError: an unknown row, or `out` holds rows of other settings; the message says what differs.
        FileNotFoundError: the text or the model does not exist.
    """
    from ..commands.loading import load_tokenizer

    rows = [parse_row(name, settings) for name in dict.fromkeys([FULL, *names])]
    text_name, content = read_text(settings.text)
    if any(row.config is not None and row.config.dataset is not None for row in rows):
        check_dataset(settings.dataset)  # no row's failure: it is that of all
    stored = _Stored(Path(out), _fingerprint(settings, text_name, content))
    tokenizer = load_tokenizer(settings.model)
    result: dict[str, dict[str, Any]] = {}
    for row in rows:
        found = stored.rows.get(row.name)
        if found is None:
            progress(f"{row.name} ...")
            try:
                found = _measure(row, settings, tokenizer, bars)
            except (ValueError, ImportError, RuntimeError) as error:
                if row.name == FULL:
                    raise
                found = {"error": " ".join(str(error).split())}
            else:
                stored.add(row.name, found)
        result[row.name] = found
        progress(f"{row.name}: {_line(found)}")
    return result


def _measure(row: Row, settings: Settings, tokenizer: Any, bars: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": settings.dtype, "device_map": settings.device_map}
    if row.config is not None:
        options["quantization_config"] = row.config
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(settings.model, **options)
    found: dict[str, Any] = {}
    if row.hqq_bits is not None:
        found = quantize_hqq(model, row.hqq_bits)
        dense = sum(p.numel() * p.element_size() for p in model.parameters())
        count = found["packed_bytes"] * 8 / found["bits_per_weight"]
        found["model_bytes"] = round(dense - count * model.dtype.itemsize + found["packed_bytes"])
    elif row.config is not None:
        found = {"config": model.config.quantization_config.to_dict(), **model_report(model).figures()}
        # the dense weights are the same numbers; multiplying by them is faster than by the packed ones
        model = model.dequantize()
    else:
        count = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        found = {"bits_per_weight": 8.0 * model.dtype.itemsize, "model_bytes": count}
    seconds = time.perf_counter() - start
    measured = perplexity(
        model,
        tokenizer,
        text=settings.text,
        context_length=min(2048, model_positions(model) or 2048)
        if settings.context_length is None
        else settings.context_length,
        max_windows=settings.max_windows,
        progress=bars,
    )
    timing = {} if row.name == FULL else {"seconds": seconds}
    return {**found, **timing, "perplexity": measured.to_dict(), "threads": torch.get_num_threads()}


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"failed: {row['error']}"
    return f"{row['bits_per_weight']:.3f} bits, perplexity {row['perplexity']['perplexity']:,.2f}"


def _fingerprint(settings: Settings, text_name: str, content: str) -> dict[str, Any]:
    """What must be equal for two rows to be compared."""
    fingerprint: dict[str, Any] = {"optimum_arb": __version__, **asdict(settings)}
    fingerprint["text"] = f"{text_name} sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if Path(settings.dataset).is_file():
        data = Path(settings.dataset).read_bytes()
        fingerprint["dataset"] = f"{settings.dataset} sha256:{hashlib.sha256(data).hexdigest()[:16]}"
    directory = Path(settings.model)
    if directory.is_dir():
        digest = hashlib.sha256()
        for file in sorted(directory.glob("*.json")):
            digest.update(file.name.encode() + file.read_bytes())
        for file in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        fingerprint["model_files"] = f"sha256:{digest.hexdigest()[:16]}"
    else:
        fingerprint["model_files"] = getattr(AutoConfig.from_pretrained(settings.model), "_commit_hash", None)
    return fingerprint


class _Stored:
    """The file of finished rows.

    Raises:
        ValueError: it holds rows of other settings, or is damaged.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]):
        self.path = out / RESULTS
        self.content: dict[str, Any] = {"settings": fingerprint, "rows": {}}
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                before = content["settings"]
                rows = content["rows"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path} is damaged: remove it, or choose another directory.") from None
            for key in [*fingerprint, *(key for key in before if key not in fingerprint)]:
                if before.get(key) != fingerprint.get(key):
                    raise ValueError(
                        f"{out} holds rows with {key}={before.get(key)!r}, and now {key}={fingerprint.get(key)!r}: "
                        "such rows cannot be compared. Choose another directory, or the old setting."
                    )
            self.content["rows"] = rows
        check_writable(self.path)
        out.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> dict[str, Any]:
        return self.content["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        with whole(self.path) as unfinished:
            unfinished.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
