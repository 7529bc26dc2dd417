"""The model card of a binarized model, written from what its directory holds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..commands.printing import size
from ..config import ARBConfig
from ..format.packing import STORED_NAMES
from ..output_files import whole
from ..stored.tensors import stored_tensors, stored_variant, tensor_bytes
from .base_model import CARD_KEYS, card_facts

NAME = "README.md"
TAGS = ("arb", "1-bit", "quantized")
MOST_OVERRIDES = 8  # that are named: a divided budget gives one to each of hundreds of linears
_MARK = "<!-- optimum_arb wrote this card and replaces it, unless it was changed by hand: {} -->"
_MARKED = re.compile(rf"(.*)\n{_MARK.format('([0-9a-f]{64})')}\s*", re.DOTALL)
# Of the tensors beside packed signs, of linears and of experts.
_COMPANIONS = tuple(f"_{name}" for name in STORED_NAMES[1:])
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the binarized weights, of the other tensors, and of the files."""

    packed: int
    in_float: int
    files: int


def model_card(
    directory: str | Path,
    name: str | None = None,
    tags: Iterable[str] = (),
    online: bool = False,
    token: str | bool | None = None,
) -> ModelCard:
    """The card of a saved binarized model: what it is, its true bits and size, how it was measured, how it is loaded.

    Args:
        directory: where the model lies; its configuration and the headers of its files are read.
        name: the model's name on the Hub; None is that of the directory.
        tags: more tags than `TAGS`.
        online: look for the base model's licence on the Hub too, and not only in the cache.
        token: for that.

    Raises:
        FileNotFoundError, ValueError: the directory holds no complete binarized model.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no model: it has no config.json.")
    model_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization = model_config.get("quantization_config") or {}
    if quantization.get("quant_method") != "arb":
        raise ValueError(f"{directory} holds no model that was binarized by optimum_arb.")
    config = ARBConfig.from_dict(quantization)
    _check_perplexity(config.perplexity, directory)
    base = dict(config.base_model or {})
    if base.get("name"):
        base = {**card_facts(base["name"], base.get("revision"), online, token), **base}
    tensors, file_bytes = stored_tensors(directory)
    packed = sum(tensor_bytes(t) for key, t in tensors.items() if key.endswith(_COMPANIONS) or t.dtype == "U8")
    total = sum(tensor_bytes(tensor) for tensor in tensors.values())
    name = name or directory.resolve().name
    classes = model_config.get("architectures") or ["AutoModel"]
    causal = classes[0].endswith("ForCausalLM")
    inherited: dict[str, Any] = {key: base.get(key) for key in CARD_KEYS}
    # what is None is left out of the card
    data = ModelCardData(
        library_name="transformers",
        base_model=base.get("name"),
        base_model_relation="quantized" if base.get("name") else None,
        pipeline_tag="text-generation" if causal else None,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        eval_results=_eval_results(config.perplexity),
        model_name=name.rpartition("/")[2] if config.perplexity else None,
        **inherited,
    )
    variant = stored_variant(directory)
    text = _text(name, config, base, _Sizes(packed, total - packed, file_bytes), classes[0], variant)
    content = f"---\n{data.to_yaml()}\n---\n\n{text}"
    return ModelCard(f"{content}\n{_MARK.format(_digest(content))}\n")


def _check_perplexity(measured: dict[str, Any] | None, directory: Path) -> None:
    """Raises ValueError where a recorded perplexity is not as `record_perplexity` writes it."""
    kinds = {"perplexity": (int, float), "text": str, "windows": int, "context_length": int, "tokens": int}
    for key, kind in kinds.items():
        if measured and not isinstance(measured.get(key), kind):  # type: ignore[arg-type]
            raise ValueError(
                f"{directory / 'config.json'} records a perplexity whose {key} is {measured.get(key)!r}: remove "
                "`perplexity` from its quantization_config, or measure it again (optimum-arb evaluate --record)."
            )


def write_card(directory: str | Path, **options: Any) -> bool:
    """Writes the card of a saved model into its directory, unless a card is there that this package did not write.

    Args:
        directory: where the model lies.
        options: as `model_card` takes them.

    Returns:
        Whether it was written.

    Raises:
        FileNotFoundError, ValueError: as `model_card`.
        OSError: the file cannot be read or written; it is then as it was.
    """
    path = Path(directory) / NAME
    if is_users_own(path):
        return False
    content = str(model_card(directory, **options))
    with whole(path) as unfinished:  # of a card that is cut short nobody knows that this package wrote it
        unfinished.write_text(content, encoding="utf-8")
    return True


def is_users_own(path: Path) -> bool:
    """Whether a card is there that is not, or not any more, as this package wrote it: without its mark, or changed."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    match = _MARKED.fullmatch(text)
    return match is None or _digest(match[1]) != match[2]


def _digest(content: str) -> str:
    return hashlib.sha256(content.strip().encode()).hexdigest()


def _text(
    name: str, config: ARBConfig, base: dict[str, Any], sizes: _Sizes, architecture: str, variant: str | None
) -> str:
    rows = [
        ("method", _method(config)),
        ("true bits per weight", _bits(config, sizes)),
        ("whole model", f"{size(sizes.files)}, of which {size(sizes.in_float)} are tensors in float"),
        ("perplexity", _perplexity(config.perplexity)),
        ("calibrated on", _calibration(config.calibration)),
        ("written by", f"optimum_arb {config.optimum_arb_version or 'unknown'}, format {config.format_version}"),
    ]
    origin = "A model"
    if base.get("name"):
        origin = _link(base["name"])
        if base.get("revision"):
            rows.insert(0, ("base model", f"{origin} at revision `{base['revision']}`"))
        else:
            rows.insert(0, ("base model", origin))
    if base.get("license"):
        licence = base.get("license_name") or base["license"]
        rows.append(("licence", f"{licence}, the base model's" + _license_link(base.get("license_link"))))
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    task = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture
    options = "" if variant is None else f"variant={variant!r}, "
    return f"""\
To load this model, `pip install optimum-arb`: transformers alone refuses its packed weights.

# {name.rpartition("/")[2]}

{origin}, its linear layers binarized with optimum_arb.

| | |
|---|---|
{table}

The bits count everything that is stored for the binarized weights: signs, scales, permutations, column lists.

## Use

```python
from transformers import AutoTokenizer, {task}

model = {task}.from_pretrained({name!r}, {options}device_map="auto")
tokenizer = AutoTokenizer.from_pretrained({name!r})
```

No import of optimum_arb is needed where it is installed (`{config.requirement}`).
"""


def _method(config: ARBConfig) -> str:
    methods = [config.method, *(choices["method"] for choices in config.overrides.values() if "method" in choices)]
    divided = config.target_bits_per_weight is not None
    parts = [" and ".join(f"`{method}`" for method in dict.fromkeys(methods if divided else methods[:1]))]
    if divided:
        parts.append(f"at most {config.target_bits_per_weight:g} bits a weight, divided among the modules")
    elif config.method == "arb-hrc":
        parts.append(f"{config.planes} sign plane{'s' if config.planes > 1 else ''}")
    if config.factorized:
        rank = f"rank {config.rank}" if config.rank else f"{config.factor_bits or 1:g} bits a weight"
        parts.append("products of two sign matrices" + ("" if divided else f", {rank}"))
    else:
        parts.append("one block a row" if config.block_size == -1 else f"blocks of {config.block_size} columns")
    if config.hadamard:
        parts.append(f"Hadamard transform of {config.hadamard} columns where it pays")
    if config.scale_bits == 8:
        parts.append("8-bit scales")
    if len(config.overrides) > MOST_OVERRIDES:
        parts.append(f"choices of their own for {len(config.overrides)} modules or patterns, see `config.json`")
    elif config.overrides:
        parts.append(f"other choices for `{'`, `'.join(config.overrides)}`")
    return ", ".join(parts)


def _bits(config: ARBConfig, sizes: _Sizes) -> str:
    if not config.bits_per_weight:
        return f"{size(sizes.packed)} binarized"
    weights = round(sizes.packed * 8 / config.bits_per_weight)
    return f"{config.bits_per_weight:.4f}, over {weights:,} binarized weights ({size(sizes.packed)})"


def _perplexity(measured: dict[str, Any] | None) -> str:
    if not measured:
        return "not measured"
    return (
        f"{measured['perplexity']:,.2f} on {measured['text']}: {measured['windows']} windows of "
        f"{measured['context_length']:,} tokens without overlap, {measured['tokens']:,} tokens predicted"
    )


def _calibration(calibration: dict[str, Any] | None) -> str:
    if not calibration:
        return "nothing: binarized from the weights alone"
    return (
        f"{calibration.get('dataset')}: {calibration.get('samples')} sequences of "
        f"{calibration.get('sequence_length')} tokens"
    )


def _eval_results(measured: dict[str, Any] | None) -> list[EvalResult] | None:
    if not measured:
        return None
    result = EvalResult(
        task_type="text-generation",
        dataset_type="wikitext" if measured["text"].startswith("wikitext") else "text",
        dataset_name=measured["text"],
        metric_type="perplexity",
        metric_name=f"perplexity of {measured['windows']} windows of {measured['context_length']} tokens",
        metric_value=measured["perplexity"],
    )
    return [result]


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _HUB_NAME.fullmatch(name) else f"`{name}`"


def _license_link(link: Any) -> str:
    return f" ([text]({link}))" if isinstance(link, str) and link.startswith("https://") else ""


def _cell(text: str) -> str:
    """What a line of a table can hold."""
    return " ".join(text.split()).replace("|", "\\|")
