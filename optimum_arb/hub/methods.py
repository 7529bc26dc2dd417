"""`save_pretrained` and `push_to_hub` of binarized models.

transformers' own write a card without content, into a saved directory over the user's; leave old shards on the Hub
behind, which would be loaded in place of new weights; and know no revision in `save_pretrained`. They are methods of
`PreTrainedModel`, which asks its quantizer nothing about them. So both are wrapped, for binarized models alone: not on
each model, whose own bound methods would keep it from being freed as soon as it is not used any more.

And a float model that was made from the configuration of a binarized one (`from_config`, `LlamaForCausalLM(config)`)
would be saved with its `quantization_config`, and could not be loaded.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..nn import ARBExperts, ARBLinear
from ..publish import model_files, publish, staging
from ..stored.checksums import seal
from ..stored.report import NAME as REPORT
from ..stored.report import write_report
from .card import NAME as CARD
from .card import is_users_own, write_card
from .upload import push_directory

logger = logging.getLogger(__name__)

_PUSH_OPTIONS = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")


def wrap_methods() -> None:
    """Wraps both methods of `PreTrainedModel`; does nothing the second time."""
    for wrap in (_wrap_save_pretrained, _wrap_push_to_hub):
        name = wrap.__name__.removeprefix("_wrap_")
        original = getattr(PreTrainedModel, name)
        if not hasattr(original, "_optimum_arb"):
            wrapper = wrap(original)
            setattr(wrapper, "_optimum_arb", True)  # noqa: B010 (not a declared attribute)
            setattr(PreTrainedModel, name, wrapper)


def _is_binarized(model: PreTrainedModel) -> bool:
    """Whether a model is saved packed. One with adapters saves these alone."""
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return getattr(config, "quant_method", None) == "arb" and not getattr(model, "_hf_peft_config_loaded", False)


@contextmanager
def _config_of_float_model(model: PreTrainedModel) -> Iterator[None]:
    """Takes the `quantization_config` of a binarized model from a float one's configuration, as long as it is saved."""
    config: Any = model.config
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    # a packed model with adapters, or a part of one, has no quantizer of its own
    if method != "arb" or any(isinstance(module, (ARBLinear, ARBExperts)) for module in model.modules()):
        yield
        return
    logger.warning(
        "%s is a float model, made from the configuration of a binarized one: it is saved without that "
        "quantization_config. from_pretrained(..., quantization_config=ARBConfig(...)) binarizes it.",
        type(model).__name__,
    )
    del config.quantization_config  # the user's own object: put back, other models may be made from it
    try:
        yield
    finally:
        config.quantization_config = found


def _wrap_save_pretrained(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if not _is_binarized(self):
            with _config_of_float_model(self):
                return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        path = Path(bound.arguments["save_directory"])
        push = bound.arguments.get("push_to_hub", False)
        more = bound.arguments.get("kwargs", {})
        main = bound.arguments.get("is_main_process", True)
        if hasattr(self, "should_save_on_this_rank"):
            main = self.should_save_on_this_rank(main)
        options: dict[str, Any] = {}
        if push:
            bound.arguments["push_to_hub"] = False
            options = {key: more.pop(key) for key in _PUSH_OPTIONS if key in more}
            options["token"] = bound.arguments.get("token")
            repo_id = more.pop("repo_id", path.name)
        tags = self.model_tags or ()
        target = Path(os.path.realpath(path))
        distributed = bound.arguments.get("distributed_checkpoint", False)
        if main and not distributed and target.is_dir() and model_files(target):
            with staging(target) as staged:  # what is there stays until the new model is complete
                bound.arguments["save_directory"] = staged
                result = original(*bound.args, **bound.kwargs)
                new = set(_stamps(staged))
                _finish(staged, new)
                _report(staged, self)
                if not is_users_own(target / CARD):
                    _describe(staged, tags, path.absolute().name)
                publish(staged, target, _replaced(target, new))
        else:
            before = _stamps(path)
            result = original(*bound.args, **bound.kwargs)
            if not main or not path.is_dir():
                return result
            new = {name for name, stamp in _stamps(path).items() if before.get(name) != stamp}
            _finish(path, new)
            _report(path, self)
            _describe(path, tags)
        if push:
            beside = {name for name in (CARD, REPORT) if (path / name).is_file()}
            push_directory(path, repo_id, files=new | beside, tags=tags, **options)
        return result

    return save_pretrained


def _wrap_push_to_hub(original: Any) -> Any:
    @functools.wraps(original)
    def push_to_hub(self: PreTrainedModel, repo_id: str, *args: Any, tags: Any = None, **kwargs: Any) -> Any:
        if not _is_binarized(self):
            return original(self, repo_id, *args, **({} if tags is None else {"tags": tags}), **kwargs)
        if args:
            raise TypeError("push_to_hub of a binarized model takes all but the name as keywords.")
        options = {key: kwargs.pop(key) for key in _PUSH_OPTIONS if key in kwargs}
        every = [*(self.model_tags or ()), *([tags] if isinstance(tags, str) else tags or ())]
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / repo_id.rpartition("/")[2]
            self.save_pretrained(directory, **kwargs)
            return push_directory(directory, repo_id, tags=every, **options)

    return push_to_hub


def finish_saved(path: Path, model: PreTrainedModel, name: str) -> None:
    """What a binarized model's directory gets besides weights and configurations: checksums, the report, the card.

    Args:
        path: where these are.
        model: whose they are.
        name: of the directory that they will be in.
    """
    _finish(path, set(_stamps(path)))
    _report(path, model)
    _describe(path, model.model_tags or (), name)


def _stamps(path: Path) -> dict[str, tuple[int, int]]:
    """Every file of a directory, with what changes when it is written anew."""
    if not path.is_dir():
        return {}
    found = ((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found}


def _report(path: Path, model: PreTrainedModel) -> None:
    """Writes the report of the run beside a model that is already saved, which must not fail with it."""
    try:
        write_report(path, model)
    except Exception as error:
        logger.warning("The model is saved in %s, but the report of its layers could not be written: %s", path, error)


def _finish(path: Path, written: set[str]) -> None:
    """Records the checksums of the weights that were saved."""
    files = sorted(name for name in written if name.endswith(".safetensors"))
    if not files or not (path / "config.json").is_file():
        return
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    seal([path / name for name in files], config.get("quantization_config") or {})


def _replaced(target: Path, written: set[str]) -> set[str]:
    """The weights in a directory that others replace, of the same variant.

    transformers leaves a `model.safetensors` where a model in several files is saved, and loads the one file then.
    """
    ending = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    stems = {re.sub(rf"{ending}$", "", name) for name in written if re.search(rf"{ending}$", name)}
    weights = re.compile(rf"({'|'.join(map(re.escape, sorted(stems)))}){ending}")
    return {entry.name for entry in target.iterdir() if weights.fullmatch(entry.name)}


def _describe(path: Path, tags: Any, name: str | None = None) -> None:
    """Writes the card of a model that is already saved, which must not fail with it."""
    if not any(path.glob("*.safetensors")):
        return
    try:
        if not write_card(path, tags=tags, **({} if name is None else {"name": name})):
            logger.info("%s was not written by optimum_arb, or was changed: it stays.", path / CARD)
    except Exception as error:
        logger.warning("The model is saved in %s, but its card could not be written: %s", path, error)
