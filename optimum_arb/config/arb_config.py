"""`ARBConfig`: every choice that a user can make, validated where it is made."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..custom_data import CalibrationInputs, CalibrationTexts, CalibrationTokens
from ..format.packing import FORMAT_VERSION
from ..patterns import matches
from .checks import check_config, check_format
from .choices import LOADING, RECORDED, TRANSFORMERS_KEYS
from .overrides import with_choices
from .resolved import ResolvedChoices


class ARBConfig(ResolvedChoices, QuantizationConfigMixin):
    """How a model is binarized, and how a binarized model was.

    Args:
        method: "arb-hrc" (sign planes with row and column scales fitted under the calibration matrix, the default),
            "arb-dbf" (a product of two sign matrices fitted under it: any number of bits from about 0.5 up), or a
            method of the literature: "rtn" (round-to-nearest), "billm" (arXiv 2402.04291), "arb", "arb-x" and
            "arb-rc" (arXiv 2410.03129), or "auto": of "arb-hrc" and "arb-dbf" what suits each linear better, within
            `target_bits_per_weight`.
        target_bits_per_weight: true bits a weight of all binarized linears together, scales included, that are not
            exceeded: the planes of "arb-hrc" or the ranks of "arb-dbf" are chosen linear by linear, by what they do to
            the model's predictions on the calibration text. What was chosen is recorded in `overrides`; a linear whose
            override already says it keeps that. None (the default) gives all linears the same.
        planes: sign planes of "arb-hrc", 1 to 3: about one stored bit a weight each.
        block_size: columns that share a row scale: 64, a multiple of 128, or -1 for whole rows.
        group_bitmap: of the papers' methods: "all" (the column-group bitmap of ARB-LLM, the default of "arb",
            "arb-x" and "arb-rc"), "non-salient" (BiLLM's split, the default of "billm") or "none".
        salient_columns: of the papers' methods, for each block: "search" (their default), a number, or 0 for none.
        num_iterations: rounds of the alternating refinement of "arb", "arb-x", "arb-rc" (the paper's 15), outer rounds
            of "arb-hrc" (2), rounds of ADMM of "arb-dbf" (60; more go on paying).
        refinement_sweeps: of "arb-hrc": how often all blocks are fitted again once the last one is known; None is 2
            after the search of all blocks at once; else 1 for several planes, 0 for one.
        compensation: how the error of a block moves into the columns that follow: "exact" (a triangular solve) or
            "diagonal" (as BiLLM and ARB-LLM published it).
        split_metric: what the search for salient columns and groups looks at: "weight" (the error of the weights) or
            "score" (as published: the error of the Hessian scores).
        dataset: calibration text: "wikitext-2" (bundled: the validation split), the path of a text file, a list of
            strings, a tensor of token ids int64 `[num_samples, sequence_length]`, a list of inputs of the model's
            `forward` as a processor returns them (for models of images or sound; each is a batch), a name that
            `optimum.gptq.data` knows ("c4", ...), or None for none: then each weight is binarized by itself while the
            checkpoint loads.
        num_samples: calibration sequences.
        held_out_samples: how many of them, the last ones, are put aside: nothing is fitted to them, and the report
            tells each layer's error on them beside the one on the others.
        sequence_length: tokens of a calibration sequence (at most what the model takes).
        batch_size: sequences of a training step of `refine`; None lets the sequence length choose. Without `refine`
            nothing depends on it: sequences run one by one on a CPU, about 6144 tokens at once on a GPU.
        seed: of every random choice.
        damp_percent: damping of the calibration matrix, as a fraction of its mean diagonal; None is the method's own
            choice: 0.02 for "arb-hrc", 0.05 for "arb-dbf", the published 0.01 for the others.
        act_order: whether columns are binarized in order of falling activation energy; None is the method's own
            choice (True for "arb-hrc" that fits block after block).
        col_scale: of "arb-hrc": whether the planes have column scales; None is True. Without, and without `act_order`,
            one plane is exactly what llama.cpp's type Q1_0 stores (see `for_gguf`).
        admm_iterations: of "arb-hrc": iterations of the search that fits all blocks at once (see
            `optimum_arb.algorithms.admm`); 0 fits block after block with compensation; None is 25, and 0 without
            calibration.
        shrinkage: how much smaller the entries of the calibration matrix beside its diagonal are made, as a fraction;
            None is 0.05 for "arb-hrc", 0 for the others.
        hadamard: of "arb-hrc": columns of the blocks of a Hadamard transform with random signs, which the inputs go
            through before they meet the sign planes: 64, 128 or 256, or 0 for none. Experts go without.
        rank: of "arb-dbf": columns of the first sign matrix and rows of the second, the same for every linear; None
            goes by `factor_bits`.
        factor_bits: of "arb-dbf": true bits a weight, scales included, of which each linear's rank follows; None is 1.
        scale_bits: of a stored scale: 16 (float16), or 8 (codes on a logarithmic grid), which "rtn", "arb-hrc" and
            "arb-dbf" may have; None is 16. The scales of experts have 16.
        error_correction: strength, from 0 to 1, with which each linear is fitted to make up for the errors of what was
            binarized before it (see `docs/method.md`); None is 0.75 for "arb-hrc" and "arb-dbf" with calibration where
            the model's layers form a chain, and 0 otherwise.
        refine: whether the binarized model is tuned to what the float model puts out, on the calibration text: "block"
            tunes each decoder layer, its norms and biases included, once it is binarized; "model" then also tunes
            scales and norms of the whole model, which must fit into memory; None (the default) does neither.
        refine_steps: steps of each layer's tuning; None is 120.
        refine_learning_rate: of scales, norms and biases, relative to their size; None is 0.005.
        refine_signs: whether the signs are tuned too; None is True.
        modules_to_not_convert: modules that stay in float besides those that transformers keeps (the output embedding
            and tied weights): suffixes of module names at a dot, or patterns that begin with "re:" and match the
            whole name. A pattern that matches nothing is an error.
        other_modalities: whether the vision and audio towers of a model that also has a language model are binarized
            too. They stay in float by default: text does not calibrate them; give inputs of the model as `dataset`.
        overrides: pattern -> choices for the modules that it matches, such as `{"down_proj": {"planes": 2}}` or
            `{"re:.*layers\\.0\\..*": {"skip": True}}`. Later entries win.
        backend: what runs the packed layers: "auto", "triton" (the GPU kernels), "cpu" (the packed bits, natively where
            the extension was built), "reference" (plain torch, any device) or "dequantize" (keeps a dequantized copy:
            fast, no memory saved). "auto:batch-invariant" computes every row of an input the same way whatever the
            number of rows (GPU only; slower for few rows).
        max_memory: as in `from_pretrained`, for placing a model that was calibrated on load.
        verify_checksums: whether the tensors of a binarized model are compared with the checksums in its files when it
            loads. The environment variable OPTIMUM_ARB_SKIP_CHECKSUMS=1 says no for every model.
        base_model: the name on the Hub of the model that is binarized, for the model card, where it is loaded from a
            directory; otherwise it is known.

    A saved configuration also carries what the run recorded: `format_version`, `requires` (what to install to read
    that format), `optimum_arb_version`, `bits_per_weight` (all stored bits of the binarized weights, see
    `optimum_arb.format.packing.bits_per_weight`), `calibration` (what the model was calibrated on), `base_model` (its
    name, revision and licence, as far as they are known) and `perplexity` (once it was measured and recorded, with the
    text and the windows).

    Raises:
        ValueError, TypeError: an unknown key, or a value that the method does not take; the message says which.
    """

    def __init__(
        self,
        method: str = "arb-hrc",
        planes: int = 1,
        block_size: int = 128,
        group_bitmap: str | None = None,
        salient_columns: str | int | None = None,
        num_iterations: int | None = None,
        refinement_sweeps: int | None = None,
        compensation: str = "exact",
        split_metric: str = "weight",
        dataset: str
        | os.PathLike[str]
        | Sequence[str]
        | Sequence[Mapping[str, Any]]
        | torch.Tensor
        | CalibrationTokens
        | None = "wikitext-2",
        num_samples: int = 128,
        sequence_length: int = 2048,
        batch_size: int | None = None,
        seed: int = 0,
        damp_percent: float | None = None,
        act_order: bool | None = None,
        col_scale: bool | None = None,
        admm_iterations: int | None = None,
        shrinkage: float | None = None,
        hadamard: int = 0,
        rank: int | None = None,
        factor_bits: float | None = None,
        scale_bits: int | None = None,
        error_correction: float | None = None,
        target_bits_per_weight: float | None = None,
        refine: str | None = None,
        refine_steps: int | None = None,
        refine_learning_rate: float | None = None,
        refine_signs: bool | None = None,
        modules_to_not_convert: list[str] | None = None,
        other_modalities: bool = False,
        overrides: dict[str, dict[str, Any]] | None = None,
        backend: str = "auto",
        max_memory: dict | None = None,
        verify_checksums: bool = True,
        format_version: int = FORMAT_VERSION,
        optimum_arb_version: str | None = None,
        bits_per_weight: float | None = None,
        calibration: dict[str, Any] | None = None,
        base_model: str | dict[str, Any] | None = None,
        perplexity: dict[str, Any] | None = None,
        held_out_samples: int = 0,
        requires: str | None = None,
        **kwargs: Any,
    ):
        check_format(format_version, requires, optimum_arb_version)  # before what a newer version may have added
        unknown = sorted(set(kwargs) - set(TRANSFORMERS_KEYS))
        if unknown:
            known = sorted(set(inspect.signature(ARBConfig).parameters) - {"kwargs"})
            raise ValueError(f"Unknown key {unknown[0]!r} in ARBConfig. Known keys: {', '.join(known)}.")
        if kwargs.get("quant_method", "arb") != "arb":
            raise ValueError(f"quant_method={kwargs['quant_method']!r} is not optimum_arb's: it is always 'arb'.")
        self.quant_method = "arb"  # type: ignore[assignment]
        self.method = method
        self.planes = planes
        self.block_size = block_size
        self.group_bitmap = group_bitmap
        self.salient_columns = salient_columns
        self.num_iterations = num_iterations
        self.refinement_sweeps = refinement_sweeps
        self.compensation = compensation
        self.split_metric = split_metric
        if isinstance(dataset, os.PathLike):
            dataset = os.fspath(dataset)
        self.dataset: str | CalibrationTexts | CalibrationTokens | CalibrationInputs | None
        if isinstance(dataset, Sequence) and not isinstance(dataset, (str, CalibrationTexts, CalibrationInputs)):
            of_inputs = bool(dataset) and isinstance(dataset[0], Mapping)
            self.dataset = CalibrationInputs(dataset) if of_inputs else CalibrationTexts(dataset)  # type: ignore[arg-type]
        elif isinstance(dataset, torch.Tensor):
            self.dataset = CalibrationTokens(dataset)
        else:
            self.dataset = dataset
        self.num_samples = num_samples
        self.held_out_samples = held_out_samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.damp_percent = damp_percent
        self.act_order = act_order
        self.col_scale = col_scale
        self.admm_iterations = admm_iterations
        self.shrinkage = shrinkage
        self.hadamard = hadamard
        self.rank = rank
        self.factor_bits = factor_bits
        self.scale_bits = scale_bits
        self.error_correction = error_correction
        self.target_bits_per_weight = target_bits_per_weight
        self.refine = refine
        self.refine_steps = refine_steps
        self.refine_learning_rate = refine_learning_rate
        self.refine_signs = refine_signs
        self.modules_to_not_convert = modules_to_not_convert
        self.other_modalities = other_modalities
        self.overrides = overrides or {}
        self.backend = backend
        self.max_memory = max_memory
        self.verify_checksums = verify_checksums
        self.optimum_arb_version = optimum_arb_version
        self.bits_per_weight = bits_per_weight
        self.calibration = calibration
        self.base_model = {"name": base_model} if isinstance(base_model, str) else base_model
        self.perplexity = perplexity
        self.post_init()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As the base class. Whether checksums are verified is never the choice of the file that they are of."""
        kept = {key: value for key, value in config_dict.items() if key != "verify_checksums"}
        return super().from_dict(kept, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def as_published(cls, method: str, **kwargs: Any) -> ARBConfig:
        """A method of the literature exactly as its authors released it: diagonal compensation, splits by score."""
        return cls(method=method, **{"compensation": "diagonal", "split_metric": "score", **kwargs})

    @classmethod
    def for_gguf(cls, **kwargs: Any) -> ARBConfig:
        """One plane without column scales and without column order: what `export.gguf` writes without loss.

        Blocks of 128 columns, as in llama.cpp's type Q1_0. The scales and signs are still fitted under the calibration
        matrix, errors compensated.

        Raises:
            ValueError, TypeError: as the class; a choice that Q1_0 cannot hold is not refused here, but by the export.
        """
        return cls(**{"planes": 1, "block_size": 128, "col_scale": False, "act_order": False, **kwargs})

    def post_init(self) -> None:
        check_config(self)

    def for_module(self, *names: str) -> ARBConfig | None:
        """The configuration of a module of one or several names, overrides applied; None where one skips it."""
        choices: dict[str, Any] = {}
        for pattern, entry in self.overrides.items():
            if any(matches(pattern, name) for name in names):
                choices.update(entry)
        if choices.pop("skip", False):
            return None
        return with_choices(self, choices)

    def without_hadamard(self) -> ARBConfig:
        """The same without a Hadamard transform."""
        config = copy.copy(self)
        config.hadamard = 0
        return config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What may be chosen anew when an already binarized model is loaded.

        How to binarize may not. So that the quantizer can refuse to do it twice, what this configuration asks for goes
        along as `requested`: every choice, or, where it is here to choose how to load, those that are not the defaults.
        """
        choices = self.choices()
        if (self.backend, self.max_memory, self.verify_checksums) != ("auto", None, True):
            default = ARBConfig().choices()
            choices = {key: value for key, value in choices.items() if value != default[key]}
        requested = {"requested": choices} if choices else {}
        return {"backend": self.backend, "verify_checksums": self.verify_checksums, **requested}

    def choices(self) -> dict[str, Any]:
        """The choices of how to binarize, but for those that a run resolves: the data and the modules left out."""
        other = ("quant_method", *LOADING, "dataset", "modules_to_not_convert")
        return {key: value for key, value in self.__dict__.items() if key not in (*other, *RECORDED)}

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary: so transformers reads a file's, and a loaded model's (`config=model.config`) likewise."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. The user's own calibration texts are not written, only their fingerprint in `calibration`."""
        result = {key: copy.deepcopy(value) for key, value in self.__dict__.items() if value is not None}
        if "dataset" not in result:
            result["dataset"] = None
        elif isinstance(result["dataset"], (CalibrationTexts, CalibrationTokens, CalibrationInputs)):
            result["dataset"] = "custom"
        del result["verify_checksums"]  # of one load, no property of the model
        # older versions do not know all of them
        for key, empty in (("overrides", {}), ("held_out_samples", 0), ("hadamard", 0)):
            if result.get(key) == empty:
                del result[key]
        result["format_version"] = self.format_version
        result["requires"] = self.requirement
        return result
