"""`ARBConfig`: every choice that a user can make, validated where it is made."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .custom_data import CalibrationInputs, CalibrationTexts, CalibrationTokens
from .factors import LAYOUT_NAME as FACTORS
from .factors import factor_shapes, rank_for_bits
from .layout import GROUP_BITMAPS, MAX_PLANES, Layout, bitmap_layout, planes_layout
from .packing import FORMAT_VERSION, check_block_size, packed_shapes
from .patterns import check_pattern, matches
from .scales import SCALE_BITS
from .version import FIRST_READERS, __version__

METHODS = ("rtn", "billm", "arb", "arb-x", "arb-rc", "arb-hrc", "arb-dbf")
BITMAP_METHODS = ("billm", "arb", "arb-x", "arb-rc")
BACKENDS = ("auto", "triton", "cpu", "reference", "dequantize", "auto:batch-invariant", "triton:batch-invariant")
HADAMARD_BLOCKS = (0, 64, 128, 256)
COMPENSATIONS = ("exact", "diagonal")
SPLIT_METRICS = ("weight", "score")
REFINEMENTS = ("block", "model")
# What an entry of `overrides` may change for the modules that its pattern matches.
OVERRIDABLE = (
    "method",
    "planes",
    "block_size",
    "group_bitmap",
    "salient_columns",
    "num_iterations",
    "refinement_sweeps",
    "compensation",
    "split_metric",
    "damp_percent",
    "act_order",
    "col_scale",
    "admm_iterations",
    "shrinkage",
    "hadamard",
    "rank",
    "factor_bits",
    "scale_bits",
)
# What a run records in the configuration of the model that it made.
RECORDED = ("optimum_arb_version", "bits_per_weight", "calibration", "base_model", "perplexity")
# What is chosen for each load.
_LOADING = ("backend", "max_memory", "verify_checksums")
# Keys that transformers adds to a quantization config on its own.
_TRANSFORMERS_KEYS = ("quant_method", "modules_in_block_to_quantize", "_load_in_4bit", "_load_in_8bit")


class ARBConfig(QuantizationConfigMixin):
    """How a model is binarized, and how a binarized model was.

    Args:
        method: "arb-hrc" (sign planes with row and column scales fitted under the calibration matrix, the default),
            "arb-dbf" (a product of two sign matrices fitted under it: any number of bits from about 0.5 up), or a
            method of the literature: "rtn" (round-to-nearest), "billm" (arXiv 2402.04291), "arb", "arb-x" and
            "arb-rc" (arXiv 2410.03129).
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
            sequences run one by one, and nothing depends on it.
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
            binarized before it (see `docs/method.md`); None is 0.5 for "arb-hrc" and "arb-dbf" with calibration where
            the model's layers form a chain, and 0 otherwise.
        refine: whether the binarized model is tuned to what the float model puts out, on the calibration text: "block"
            tunes each decoder layer, its norms and biases included, once it is binarized; "model" then also tunes
            scales and norms of the whole model, which must fit into memory; None (the default) does neither.
        refine_steps: steps of each layer's tuning; None is 400.
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
    `optimum_arb.packing.bits_per_weight`), `calibration` (what the model was calibrated on), `base_model` (its name,
    revision and licence, as far as they are known) and `perplexity` (once it was measured and recorded, with the text
    and the windows).

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
        _check_format(format_version, requires, optimum_arb_version)  # before what a newer version may have added
        unknown = sorted(set(kwargs) - set(_TRANSFORMERS_KEYS))
        if unknown:
            known = sorted(set(ARBConfig.__init__.__code__.co_varnames[1:]) - {"kwargs", "unknown", "known"})
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
        _one_of("method", self.method, METHODS)
        _one_of("compensation", self.compensation, COMPENSATIONS)
        _one_of("split_metric", self.split_metric, SPLIT_METRICS)
        _one_of("backend", self.backend, BACKENDS)
        _integer("planes", self.planes, 1, MAX_PLANES)
        for name in ("num_samples", "sequence_length"):
            _integer(name, getattr(self, name), 1)
        for name in ("num_iterations", "batch_size"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        _integer("held_out_samples", self.held_out_samples, 0, self.num_samples - 1)
        if self.held_out_samples and self.dataset is None:
            raise ValueError(f"held_out_samples={self.held_out_samples} needs a dataset, of which they are a part.")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool):
            raise TypeError(f"block_size={self.block_size!r} is no whole number.")
        check_block_size(self.block_size)
        damping = self.resolved_damp_percent
        if not isinstance(damping, (int, float)) or not 0 <= damping < 10:
            raise ValueError(f"damp_percent={self.damp_percent!r} must be a number from 0 to 10; 0.01 is usual.")
        given = (str, CalibrationTexts, CalibrationTokens, CalibrationInputs)
        if self.dataset is not None and not isinstance(self.dataset, given):
            raise TypeError(
                f"dataset={self.dataset!r} must be a name, a path, a list of strings or of model inputs, a tensor of "
                "token ids, or None."
            )
        for name in ("other_modalities", "verify_checksums"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False.")
        if not isinstance(self.modules_to_not_convert, (list, tuple, type(None))):
            raise TypeError(f"modules_to_not_convert={self.modules_to_not_convert!r} must be a list of patterns.")
        if self.method not in BITMAP_METHODS:
            for name in ("group_bitmap", "salient_columns"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} does nothing with method={self.method!r}: "
                        f"only {', '.join(BITMAP_METHODS)} have it."
                    )
        if self.group_bitmap is not None:
            _one_of("group_bitmap", self.group_bitmap, GROUP_BITMAPS)
        if self.salient_columns is not None and self.salient_columns != "search":
            _integer("salient_columns", self.salient_columns, 0, 64 if self.block_size == 64 else 127)
        if self.refinement_sweeps is not None:
            _integer("refinement_sweeps", self.refinement_sweeps, 0)
            if self.method != "arb-hrc":
                raise ValueError(
                    f"refinement_sweeps={self.refinement_sweeps} needs method='arb-hrc': {self.method!r} has none."
                )
        if self.col_scale is not None:
            if not isinstance(self.col_scale, bool):
                raise TypeError(f"col_scale={self.col_scale!r} must be True, False or None.")
            if self.method != "arb-hrc":
                raise ValueError(
                    f"col_scale={self.col_scale} needs method='arb-hrc': {self.method!r} has a fixed form."
                )
        self._check_search()
        self._check_factors()
        if self.scale_bits is not None and (isinstance(self.scale_bits, bool) or self.scale_bits not in SCALE_BITS):
            raise ValueError(f"scale_bits={self.scale_bits!r} must be 16 or 8.")
        if self.scale_bits == 8 and self.method in BITMAP_METHODS:
            raise ValueError(
                f"scale_bits=8 needs method 'rtn', 'arb-hrc' or 'arb-dbf': the scales of {self.method!r} may be "
                "negative, or are means."
            )
        self._check_refine()
        if self.planes > 1 and self.method != "arb-hrc":
            raise ValueError(f"planes={self.planes} needs method='arb-hrc': {self.method!r} has a fixed form.")
        for name in ("overrides", "calibration", "base_model", "perplexity"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a dictionary.")
        for pattern, choices in self.overrides.items():
            check_pattern(pattern)
            if not isinstance(choices, dict):
                raise TypeError(f"overrides[{pattern!r}]={choices!r} must be a dictionary of choices.")
            unknown = sorted(set(choices) - set(OVERRIDABLE) - {"skip"})
            if unknown:
                raise ValueError(
                    f"overrides[{pattern!r}] has the unknown key {unknown[0]!r}: it may change "
                    f"{', '.join(OVERRIDABLE)} or say skip."
                )
            if not choices.get("skip"):
                self._with(choices)
        for pattern in self.modules_to_not_convert or ():
            check_pattern(pattern)

    def _check_search(self) -> None:
        """How the planes of "arb-hrc" are found, and under what."""
        if self.admm_iterations is not None:
            _integer("admm_iterations", self.admm_iterations, 0)
        shrinkage = self.resolved_shrinkage
        if not isinstance(shrinkage, (int, float)) or isinstance(shrinkage, bool) or not 0 <= shrinkage < 1:
            raise ValueError(f"shrinkage={self.shrinkage!r} must be a number from 0 to below 1; 0.05 is usual.")
        if self.hadamard not in HADAMARD_BLOCKS or isinstance(self.hadamard, bool):
            raise ValueError(f"hadamard={self.hadamard!r} is unknown: use 64, 128 or 256, or 0 for none.")
        for name in ("admm_iterations", "hadamard"):
            if getattr(self, name) and self.method != "arb-hrc":
                raise ValueError(f"{name}={getattr(self, name)} needs method='arb-hrc': {self.method!r} has none.")
        strength = self.error_correction
        if strength is not None:
            if not isinstance(strength, (int, float)) or isinstance(strength, bool) or not 0 <= strength <= 1:
                raise ValueError(f"error_correction={strength!r} must be a number from 0 to 1; 0.5 is usual.")
            if strength and self.dataset is None:
                raise ValueError(f"error_correction={strength} does nothing without calibration: give a dataset.")
        if self.hadamard and self.dataset is None:
            raise ValueError(f"hadamard={self.hadamard} does nothing without calibration: give a dataset.")

    def _check_refine(self) -> None:
        """The choices of refinement by output."""
        for name in ("refine_steps", "refine_learning_rate", "refine_signs"):
            if getattr(self, name) is not None and self.refine is None:
                raise ValueError(f"{name}={getattr(self, name)!r} does nothing without refine='block' or 'model'.")
        if self.refine is None:
            return
        _one_of("refine", self.refine, REFINEMENTS)
        if self.dataset is None:
            raise ValueError(f"refine={self.refine!r} needs a calibration text: give a dataset.")
        if self.refine_steps is not None:
            _integer("refine_steps", self.refine_steps, 1)
        rate = self.refine_learning_rate
        if rate is not None and (not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < 1):
            raise ValueError(f"refine_learning_rate={rate!r} must be a number between 0 and 1; 0.005 is usual.")
        if not isinstance(self.refine_signs, (bool, type(None))):
            raise TypeError(f"refine_signs={self.refine_signs!r} must be True, False or None.")

    def _check_factors(self) -> None:
        """The choices of "arb-dbf"."""
        for name in ("rank", "factor_bits"):
            if getattr(self, name) is not None and not self.factorized:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs method='arb-dbf': {self.method!r} has no factors."
                )
        if self.rank is not None:
            _integer("rank", self.rank, 1)
        bits = self.factor_bits
        if bits is not None and (not isinstance(bits, (int, float)) or isinstance(bits, bool) or not 0 < bits <= 16):
            raise ValueError(f"factor_bits={bits!r} must be a number of bits a weight, above 0 and at most 16.")
        if self.rank is not None and bits is not None:
            raise ValueError(f"rank={self.rank} and factor_bits={bits} both decide the rank: give one of them.")
        if self.factorized and self.act_order:
            raise ValueError("act_order=True does nothing with method='arb-dbf', which orders no columns.")

    # What the method makes of the choices that were left open.

    @property
    def resolved_group_bitmap(self) -> str:
        if self.method not in BITMAP_METHODS:
            return "none"
        return self.group_bitmap or ("non-salient" if self.method == "billm" else "all")

    @property
    def resolved_salient_columns(self) -> str | int:
        if self.method not in BITMAP_METHODS:
            return 0
        return "search" if self.salient_columns is None else self.salient_columns

    @property
    def resolved_num_iterations(self) -> int:
        if self.num_iterations is not None:
            return self.num_iterations
        return {"arb-hrc": 2, "arb-dbf": 60}.get(self.method, 15)

    @property
    def resolved_refinement_sweeps(self) -> int:
        if self.refinement_sweeps is not None:
            return self.refinement_sweeps
        if self.resolved_admm_iterations:
            return 2
        # SmolLM2-135M: perplexity 70.7 and 74.5 at two planes without, 66.0 and 67.6 with one sweep; at one plane 818
        # to 916 (4 runs) without, 776 to 1,083 (3 runs) with
        return 1 if self.method == "arb-hrc" and self.planes > 1 else 0

    @property
    def resolved_admm_iterations(self) -> int:
        if self.method != "arb-hrc" or self.dataset is None:
            return 0
        return 25 if self.admm_iterations is None else self.admm_iterations

    @property
    def resolved_shrinkage(self) -> float:
        if self.shrinkage is not None:
            return self.shrinkage
        return 0.05 if self.method == "arb-hrc" else 0.0

    @property
    def resolved_error_correction(self) -> float:
        if self.dataset is None:
            return 0.0
        if self.error_correction is not None:
            return self.error_correction
        # second half of the WikiText-2 validation file, SmolLM2-135M on 32 x 1024 tokens, with 0.5 and without: two
        # planes 35.9 and 54.2, one plane 147 and 881, factors of 1.18 bits 67.3 and 275.7
        return 0.5 if self.method in ("arb-hrc", "arb-dbf") else 0.0

    @property
    def resolved_damp_percent(self) -> float:
        if self.damp_percent is not None:
            return self.damp_percent
        # on the second half of the WikiText-2 validation file SmolLM2-135M at one plane has a perplexity of 786 to
        # 879 at 0.02 (4 runs of slightly different damping), 957 and 1,039 at 0.01, 1,278 at 0.03. Factors at 1.18
        # bits: held-out output error, mean of 14 matrices, .0837 at 0.02, .0829 at 0.05
        return {"arb-hrc": 0.02, "arb-dbf": 0.05}.get(self.method, 0.01)

    @property
    def resolved_act_order(self) -> bool:
        """Whether columns are permuted; never without calibration, where there is no activation to order by."""
        if self.dataset is None:
            return False
        if self.act_order is not None:
            return self.act_order
        # one plane of 5 matrices of SmolLM2-135M, held-out output error: .1374 with and without after the search of all
        # blocks at once, .1503 and .1614 block by block
        return self.method == "arb-hrc" and not self.resolved_admm_iterations

    @property
    def format_version(self) -> int:
        """The format of the files that these choices make: the oldest that holds them."""
        every = [
            {"method": self.method, "scale_bits": self.resolved_scale_bits, "hadamard": self.hadamard},
            *self.overrides.values(),
        ]
        new = (one.get("method") == "arb-dbf" or one.get("scale_bits") == 8 or one.get("hadamard") for one in every)
        return 2 if any(new) else 1

    @property
    def factorized(self) -> bool:
        """Whether weights become products of two sign matrices, which have a rank and no layout."""
        return self.method == "arb-dbf"

    @property
    def resolved_scale_bits(self) -> int:
        return self.scale_bits or 16

    def resolved_rank(self, out_features: int, in_features: int) -> int:
        """The rank of the factors of a weight `[out_features, in_features]`."""
        if self.rank is not None:
            return self.rank
        bits = 1.0 if self.factor_bits is None else self.factor_bits
        return rank_for_bits(out_features, in_features, bits, self.resolved_scale_bits)

    @property
    def requirement(self) -> str:
        """What to install to read a model of this configuration's format."""
        return f"optimum-arb>={FIRST_READERS[self.format_version]}"

    @property
    def resolved_col_scale(self) -> bool:
        """Whether the planes of arb-hrc have column scales."""
        return True if self.col_scale is None else self.col_scale

    @property
    def layout(self) -> Layout:
        """The layout of the weights that these choices make.

        Raises:
            ValueError: they make products of two sign matrices.
        """
        if self.factorized:
            raise ValueError(f"method={self.method!r} makes products of two sign matrices, which have no layout.")
        if self.method == "rtn":
            return planes_layout(1)
        if self.method == "arb-hrc":
            return planes_layout(self.planes, col_scale=self.resolved_col_scale)
        return bitmap_layout(
            self.resolved_group_bitmap, self.resolved_salient_columns != 0, col_scale=self.method == "arb-rc"
        )

    @property
    def layout_name(self) -> str:
        """The name of the form of the weights, as reports have it."""
        return FACTORS if self.factorized else self.layout.name

    def stored_shapes(
        self, out_features: int, in_features: int, permuted: bool, salient: int = 0
    ) -> dict[str, tuple[int, int]]:
        """The shape of every tensor that a linear's weight is stored in, by `optimum_arb.packing.STORED_NAMES`.

        Args:
            out_features: N.
            in_features: K.
            permuted: whether its columns are permuted.
            salient: the number of its salient columns.
        """
        if self.factorized:
            rank = self.resolved_rank(out_features, in_features)
            return factor_shapes(out_features, in_features, rank, self.resolved_scale_bits)
        transform = self.hadamard if self.dataset is not None else 0
        bits = self.resolved_scale_bits
        return packed_shapes(
            self.layout, out_features, in_features, self.block_size, permuted, salient, bits, transform
        )

    def for_module(self, *names: str) -> ARBConfig | None:
        """The configuration of a module of one or several names, overrides applied; None where one skips it."""
        choices: dict[str, Any] = {}
        for pattern, entry in self.overrides.items():
            if any(matches(pattern, name) for name in names):
                choices.update(entry)
        if choices.pop("skip", False):
            return None
        return self._with(choices)

    def _with(self, choices: dict[str, Any]) -> ARBConfig:
        config = copy.copy(self)
        config.overrides = {}
        config.__dict__.update({key: value for key, value in choices.items() if key != "skip"})
        if "method" in choices and choices["method"] not in BITMAP_METHODS:
            config.group_bitmap = choices.get("group_bitmap")
            config.salient_columns = choices.get("salient_columns")
        if "method" in choices and choices["method"] != "arb-hrc":
            none = {"refinement_sweeps": None, "col_scale": None, "admm_iterations": None, "hadamard": 0, "planes": 1}
            config.__dict__.update({name: value for name, value in none.items() if name not in choices})
        if "method" in choices and choices["method"] != "arb-dbf":
            config.rank, config.factor_bits = choices.get("rank"), choices.get("factor_bits")
        if choices.get("method") in BITMAP_METHODS and "scale_bits" not in choices:
            config.scale_bits = None
        if choices.get("method") == "arb-dbf" and "act_order" not in choices:
            config.act_order = None
        for name, other in (("rank", "factor_bits"), ("factor_bits", "rank")):
            if name in choices and other not in choices:
                setattr(config, other, None)  # one decides, and the entry says which
        if choices:
            config.post_init()
        return config

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
        other = ("quant_method", *_LOADING, "dataset", "modules_to_not_convert")
        return {key: value for key, value in self.__dict__.items() if key not in (*other, *RECORDED)}

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


def _check_format(version: Any, requires: Any, written_by: Any) -> None:
    """Whether this package reads a format.

    Raises:
        ValueError: it does not; the message says which version does, as far as the model says so in a form that can be
            trusted in a command.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"format_version={version!r} in the quantization_config is no format of optimum_arb's.")
    if version in FIRST_READERS:
        return
    needed = requires if re.fullmatch(r"optimum-arb>=[0-9][0-9A-Za-z.]*", str(requires)) else None
    if needed is None and re.fullmatch(r"[0-9][0-9A-Za-z.]*", str(written_by)):
        needed = f"optimum-arb>={written_by}"
    raise ValueError(
        f"This model has format version {version} (written by optimum_arb {written_by or 'unknown'}); the installed "
        f"optimum_arb {__version__} reads up to {FORMAT_VERSION}. Upgrade it: pip install -U "
        + (f'"{needed}"' if needed else "optimum-arb")
    )


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}.")


def _integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name}={value!r} must be a whole number {bound}.")
