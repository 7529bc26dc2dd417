"""The options that say how to binarize: each is one of `ARBConfig`."""

from __future__ import annotations

import argparse
import inspect

import pytest

from optimum_arb import ARBConfig
from optimum_arb.commands.method_options import build_config, parse_overrides
from optimum_arb.commands.quantize import add_arguments
from optimum_arb.config import RECORDED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser


def parse(*options: str):
    return _parser().parse_args(["model", "out", *options])


# What `ARBConfig` takes and `quantize` has no option of that name for, and why.
WITHOUT_OPTION = {
    "overrides": "--override, once for each pattern",
    "backend": "chosen for each load of a binarized model",
    "max_memory": "places a model that is calibrated on load; `quantize` holds one layer at a time",
    "verify_checksums": "chosen for each load of a binarized model",
    "format_version": "recorded by the run",
    "requires": "recorded by the run",
    **dict.fromkeys(set(RECORDED) - {"base_model"}, "recorded by the run"),
}
FIELDS = set(inspect.signature(ARBConfig).parameters) - {"kwargs"}


def test_every_option_reaches_the_configuration():
    given = {
        "method": "arb-rc",
        "block_size": 64,
        "group_bitmap": "none",
        "salient_columns": 5,
        "num_iterations": 3,
        "compensation": "diagonal",
        "split_metric": "score",
        "dataset": "some.txt",
        "num_samples": 7,
        "held_out_samples": 2,
        "sequence_length": 9,
        "batch_size": 2,
        "seed": 4,
        "damp_percent": 0.02,
    }
    options = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
    config = build_config(parse(*options, "--modules-to-not-convert", "q_proj", "re:.*k_proj"))
    assert {name: getattr(config, name) for name in given} == given
    assert config.modules_to_not_convert == ["q_proj", "re:.*k_proj"]
    assert build_config(parse("--base-model", "me/base")).base_model == {"name": "me/base"}
    config = build_config(parse("--no-col-scale", "--no-act-order"))
    assert (config.col_scale, config.act_order) == (False, False)
    others = {"planes", "refinement_sweeps", "modules_to_not_convert", "base_model", "col_scale", "act_order", "rank"}
    others |= {"factor_bits", "scale_bits", "hadamard", "admm_iterations", "shrinkage", "other_modalities"}
    others |= {"error_correction", "target_bits_per_weight"}
    others |= {"refine", "refine_steps", "refine_learning_rate", "refine_signs"}
    assert set(given) | others == FIELDS - set(WITHOUT_OPTION)
    assert build_config(parse("--planes", "3")).planes == 3
    assert build_config(parse("--method", "arb-dbf", "--rank", "7")).rank == 7
    assert build_config(parse("--method", "arb-dbf", "--factor-bits", "0.8")).factor_bits == 0.8
    assert build_config(parse("--scale-bits", "8")).scale_bits == 8
    assert build_config(parse("--hadamard", "128")).hadamard == 128
    assert build_config(parse("--admm-iterations", "0")).admm_iterations == 0
    assert build_config(parse("--shrinkage", "0")).shrinkage == 0
    assert build_config(parse("--error-correction", "0.25")).error_correction == 0.25
    assert build_config(parse("--method", "auto", "--target-bits-per-weight", "1.5")).target_bits_per_weight == 1.5
    assert build_config(parse("--other-modalities")).other_modalities is True
    assert build_config(parse()).other_modalities is False
    assert build_config(parse("--refinement-sweeps", "2")).refinement_sweeps == 2
    assert build_config(parse("--method", "arb", "--salient-columns", "search")).salient_columns == "search"
    assert build_config(parse("--no-calibration")).dataset is None


def test_every_field_has_an_option_or_a_reason():
    options = {action.dest: action.option_strings for action in _parser()._actions}
    assert FIELDS - set(options) == set(WITHOUT_OPTION)
    for name in FIELDS & set(options):
        assert "--" + name.replace("_", "-") in options[name]
    assert "--override" in options["override"]


def test_overrides():
    assert parse_overrides(["down_proj=planes:2,block_size:64", "down_proj=act_order:false", "re:.*(?=x).*=skip"]) == {
        "down_proj": {"planes": 2, "block_size": 64, "act_order": False},
        "re:.*(?=x).*": {"skip": True},
    }
    for text in ("down_proj", "=planes:2", "down_proj=planes"):
        with pytest.raises(ValueError, match="must be PATTERN=KEY:VALUE"):
            parse_overrides([text])
    for texts in (["down_proj=planes:2,planes:3"], ["down_proj=planes:2", "down_proj=planes:2"]):
        with pytest.raises(ValueError, match="gives planes of 'down_proj' twice"):
            parse_overrides(texts)


def test_salient_columns(capsys):
    parser = _parser()
    assert parser.parse_args(["m", "o", "--salient-columns", "5"]).salient_columns == 5
    with pytest.raises(SystemExit):
        parser.parse_args(["m", "o", "--salient-columns", "x"])
    assert "'x' is neither search nor a number" in capsys.readouterr().err
