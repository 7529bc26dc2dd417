"""Everything that is measured of models beside their baseline, in one dictionary."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..inspection import inspect_model
from ..reproduce import model_facts, reproduce_block, text_fingerprint
from .accuracy import divergence
from .energy import measure_energy
from .generation import check_chat, sample
from .latency import check_positions, measure_latency
from .memory import NEW_TOKENS, disk_bytes, measure_memory
from .perplexity import check_context_length, config_positions, model_positions, perplexity, read_text
from .settings import Settings
from .tasks import check_lm_eval, run_tasks

SCHEMA = 1


@dataclass
class _Loaded:
    """A model in memory."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    result: dict[str, Any] = field(default_factory=dict)


def evaluate(
    models: Sequence[str],
    baseline: str | None = None,
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda line: None,
    bars: bool = False,
) -> dict[str, Any]:
    """Measures models, one after the other, each beside the baseline.

    The baseline stays in memory with one model at a time. Memory is measured first, in processes of their own.

    Args:
        models: directories or Hub names.
        baseline: the model that they were made from; None measures them alone.
        settings: see `Settings`.
        progress: is called with a line for each step.
        bars: show progress bars within the steps.

    Returns:
        Plain JSON values: `schema`, `baseline` (its name or None), `models` (a dictionary of results each, the
        baseline's first), `settings` and `reproduce`.

    Raises:
        ValueError: a setting out of range, the same name twice, a baseline with another tokenizer.
        FileNotFoundError, ImportError: a model, a text or a package is missing.
    """
    settings = settings or Settings()
    _check(models, baseline, settings)
    names = list(dict.fromkeys([*([baseline] if baseline else []), *models]))
    texts = [read_text(text) for text in settings.texts] if {"perplexity", "divergence"} & set(settings.parts) else []
    results = {name: _facts(name, name == baseline) for name in names}
    if "memory" in settings.parts:
        for name in names:
            progress(f"memory of {name}")
            results[name]["memory"] = measure_memory(
                name, settings.dtype, settings.device_map, _backend(name, settings), settings.prompt_tokens
            )
    if set(settings.parts) - {"memory"}:
        reference = None
        if baseline is not None:
            reference = _load(baseline, settings, results[baseline], progress)
            _measure_alone(reference, settings, progress, bars, divergence_follows=True)
        for name in models:
            loaded = _load(name, settings, results[name], progress)
            _measure_alone(loaded, settings, progress, bars, "divergence" in settings.parts and reference is not None)
            _measure_beside(loaded, reference, settings, progress, bars)
            del loaded
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    for result in results.values():
        _add_cost(result, settings)
    progress("fingerprints")
    facts = {name: model_facts(name, results[name].pop("revision")) for name in names}
    return {
        "schema": SCHEMA,
        "baseline": baseline,
        "models": list(results.values()),
        "settings": asdict(settings),
        "reproduce": reproduce_block(facts, {n: text_fingerprint(content) for n, content in texts}, settings.seed),
    }


def _check(models: Sequence[str], baseline: str | None, settings: Settings) -> None:
    from ..commands.loading import check_loading, check_model

    if not models or len(set(models)) < len(models) or baseline in models:
        raise ValueError("Each model, and the baseline, must be named once.")
    settings.check()
    if "divergence" in settings.parts and baseline is None:
        raise ValueError("The divergence is from a baseline: give one, or leave it out.")
    if "tasks" in settings.parts and not settings.tasks:
        raise ValueError("The tasks to measure must be named.")
    if settings.tasks and "tasks" in settings.parts:
        check_lm_eval()
    check_loading(settings.dtype, settings.device_map)
    for name in (*models, *([baseline] if baseline else [])):
        check_model(name)
        _check_model(name, settings)
    if baseline is not None and "divergence" in settings.parts:
        _check_tokenizers(models, baseline)


def _check_model(name: str, settings: Settings) -> None:
    """What a part would tell of the model when its turn comes, hours later."""
    from ..commands.loading import load_tokenizer

    parts = set(settings.parts)
    if parts - {"memory"}:
        tokenizer = load_tokenizer(name)
        if "generation" in parts:
            check_chat(tokenizer, settings.chat)
    positions = config_positions(AutoConfig.from_pretrained(name))
    if parts & {"latency", "energy"}:
        check_positions(settings.prompt_tokens, settings.new_tokens, positions)
    if "memory" in parts:
        check_positions(settings.prompt_tokens, NEW_TOKENS, positions)
    if parts & {"perplexity", "divergence"} and settings.context_length is not None:
        check_context_length(settings.context_length, positions)


def _check_tokenizers(models: Sequence[str], baseline: str) -> None:
    """Predictions of the same tokens can be compared, no others."""
    from ..commands.loading import load_tokenizer

    probe = "The quick brown fox, 1234 naïve façades; def f(x): return x ** 2\n\n\t日本語 🙂"
    expected = load_tokenizer(baseline)(probe, add_special_tokens=False)["input_ids"]
    for name in models:
        if load_tokenizer(name)(probe, add_special_tokens=False)["input_ids"] != expected:
            raise ValueError(
                f"{name} and {baseline} cut text into different tokens: their predictions cannot be compared. Leave "
                "the divergence out, or give the model's own base as baseline."
            )


def _facts(name: str, is_baseline: bool) -> dict[str, Any]:
    """What is known of a model before it is loaded."""
    config = AutoConfig.from_pretrained(name)
    quantization: Any = getattr(config, "quantization_config", None) or {}
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    ours = quantization.get("quant_method") == "arb"
    facts: dict[str, Any] = {
        "name": name,
        "label": Path(name).name,
        "role": "baseline" if is_baseline else "model",
        "architecture": (config.architectures or [None])[0],
        "method": quantization.get("method") if ours else quantization.get("quant_method"),
        "planes": quantization.get("planes") if ours and quantization.get("method") == "arb-hrc" else None,
        "bits_per_weight": None,
        "calibration": quantization.get("calibration") if ours else None,
        "disk": disk_bytes(name),
        "revision": getattr(config, "_commit_hash", None),
    }
    if ours:
        found = inspect_model(name)
        facts["bits_per_weight"] = found.bits_per_weight
        if found.report is not None:
            facts["modules"] = [asdict(module) for module in found.report]
            facts["warnings"] = [asdict(warning) for warning in found.warnings]
    return facts


def _backend(name: str, settings: Settings) -> str | None:
    """The backend, which only binarized models have."""
    from ..commands.loading import quantization_method

    return settings.backend if settings.backend and quantization_method(name) == "arb" else None


def _load(name: str, settings: Settings, result: dict[str, Any], progress: Callable[[str], None]) -> _Loaded:
    from ..commands.loading import load_model, load_tokenizer

    progress(f"loading {name}")
    torch.manual_seed(settings.seed)
    model = load_model(name, settings.dtype, settings.device_map, _backend(name, settings))
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    result["parameters_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    result["devices"] = sorted({str(parameter.device) for parameter in model.parameters()})
    if result["bits_per_weight"] is None and result["method"] is None:
        result["bits_per_weight"] = 8.0 * model.dtype.itemsize
    return _Loaded(name, model, load_tokenizer(name), result)


def _context_length(settings: Settings, *models: PreTrainedModel) -> int:
    given, positions = settings.context_length, [model_positions(model) for model in models]
    return min([2048, *(count for count in positions if count)]) if given is None else given


def _measure_alone(
    loaded: _Loaded, settings: Settings, progress: Callable[[str], None], bars: bool, divergence_follows: bool
) -> None:
    """What needs no other model. The perplexities come with the divergence where that is measured."""
    if "perplexity" in settings.parts and not (divergence_follows and "divergence" in settings.parts):
        loaded.result["perplexity"] = []
        for text in settings.texts:
            progress(f"perplexity of {loaded.name} on {text}")
            found = perplexity(
                loaded.model,
                loaded.tokenizer,
                text=text,
                context_length=_context_length(settings, loaded.model),
                max_windows=settings.max_windows,
                batch_size=settings.batch_size,
                progress=bars,
            )
            loaded.result["perplexity"].append(found.to_dict())
    if "generation" in settings.parts:
        progress(f"generation of {loaded.name}")
        loaded.result["generation"] = sample(
            loaded.model, loaded.tokenizer, settings.prompts, settings.sample_tokens, settings.chat
        )
    if "tasks" in settings.parts and settings.tasks:
        progress(f"tasks of {loaded.name}")
        loaded.result["tasks"] = run_tasks(
            loaded.model, loaded.tokenizer, settings.tasks, settings.include_path, settings.limit, settings.batch_size
        )


def _measure_beside(
    loaded: _Loaded, reference: _Loaded | None, settings: Settings, progress: Callable[[str], None], bars: bool
) -> None:
    """What is measured with the baseline in turn."""
    both = [*([reference] if reference else []), loaded]
    if "divergence" in settings.parts and reference is not None:
        loaded.result["divergence"], ours, theirs = [], [], []
        for text in settings.texts:
            progress(f"divergence of {loaded.name} on {text}")
            found = divergence(
                loaded.model,
                reference.model,
                loaded.tokenizer,
                text=text,
                context_length=_context_length(settings, loaded.model, reference.model),
                max_windows=settings.max_windows,
                batch_size=settings.batch_size,
                progress=bars,
            ).to_dict()
            ours.append(found.pop("perplexity"))
            theirs.append(found.pop("baseline_perplexity"))
            loaded.result["divergence"].append(found)
        if "perplexity" in settings.parts:
            loaded.result["perplexity"] = ours
            reference.result["perplexity"] = theirs
    options = settings.generate_options()
    if "latency" in settings.parts:
        progress(f"latency of {' and '.join(one.name for one in both)}")
        rows = measure_latency(
            {one.name: one.model for one in both},
            reference.name if reference else None,
            settings.batch_sizes,
            settings.prompt_tokens,
            settings.new_tokens,
            settings.repeats,
            options,
            bars,
        )
        for one in both:
            one.result["latency"] = [row.to_dict() for row in rows if row.model == one.name]
    if "energy" in settings.parts:
        progress(f"energy of {' and '.join(one.name for one in both)}")
        energies = measure_energy(
            {one.name: one.model for one in both},
            settings.batch_sizes[0],
            settings.prompt_tokens,
            settings.new_tokens,
            settings.energy_seconds,
            options,
        )
        for one in both:
            one.result["energy"] = energies[one.name]


def _add_cost(result: dict[str, Any], settings: Settings) -> None:
    """The price of a million tokens at each batch size, from the measured throughput."""
    if settings.price_per_hour is None or "latency" not in result:
        return
    result["cost"] = [
        {
            "batch_size": row["batch_size"],
            "currency": settings.currency,
            "prompt_million_tokens": _cost(settings.price_per_hour, row["prefill_tokens_per_second"]),
            "generated_million_tokens": _cost(settings.price_per_hour, row["decode_tokens_per_second"]),
        }
        for row in result["latency"]
    ]


def _cost(price_per_hour: float, tokens_per_second: float) -> float:
    return price_per_hour / 3600 / tokens_per_second * 1e6


def comparison_rows(path: str | Path) -> dict[str, tuple[float, dict[str, Any]]]:
    """The rows of `compare.json`, or of that in a directory: name -> true bits and what was measured.

    Raises:
        FileNotFoundError, ValueError: no such file, or another one.
    """
    path = Path(path)
    path = path / "compare.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no comparison {path}.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {name: (row["bits_per_weight"], row["perplexity"]) for name, row in rows.items() if "error" not in row}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no result of compare.") from None


def read_comparison(path: str | Path, report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Rows of `compare` that stand beside an evaluation: name -> true bits and perplexity.

    Args:
        path: `compare.json`, or its directory.
        report: what `evaluate` returned, with a perplexity.

    Raises:
        FileNotFoundError, ValueError: as `comparison_rows`, or its perplexities were measured on other windows.
    """
    found = comparison_rows(path)
    measured = next((model["perplexity"][0] for model in report["models"] if model.get("perplexity")), None)
    for key in ("text", "context_length", "windows"):
        for name, (_, row) in found.items():
            if measured is None or row[key] != measured[key]:
                raise ValueError(
                    f"The row {name!r} of {path} has {key}={row[key]!r}, and here it is "
                    f"{measured[key] if measured else None!r}: such perplexities do not stand beside each other."
                )
    return {name: (bits, row["perplexity"]) for name, (bits, row) in found.items()}
