"""When a layer counts as broken: each rule just below and just above its bound."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from optimum_arb.layer_warnings import kind_of, layer_warnings, warning_lines


def module(layer=0, weight=None, output=None, held_out=None, kind="mlp.up_proj"):
    name = f"model.layers.{layer}.{kind}"
    return SimpleNamespace(name=name, weight_error=weight, output_error=output, held_out_error=held_out)


def rules(*modules):
    return {warning.module: warning.rule for warning in layer_warnings(modules)}


@pytest.mark.parametrize("error", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["weight", "output", "held_out"])
def test_not_finite(which, error):
    assert list(rules(module(**{"weight": 0.1, "output": 0.1, "held_out": 0.1, which: error})).values()) == [
        "not-finite"
    ]


def test_lost_is_worse_than_zeros():
    assert rules(module(output=0.99)) == {}
    (warning,) = layer_warnings([module(output=1.0)])
    assert warning.rule == "lost"
    assert "1.00 of its output" in warning.message
    # held-out counts first, the weight only without calibration
    assert list(rules(module(output=0.9, held_out=1.1)).values()) == ["lost"]
    assert list(rules(module(weight=1.2)).values()) == ["lost"]
    assert rules(module(weight=1.2, output=0.5)) == {}


def test_outlier_of_its_kind():
    usual = [module(layer, output=0.04) for layer in range(4)]
    assert rules(*usual, module(9, output=0.15)) == {}  # 3.75 times
    assert rules(*usual, module(9, output=0.17)) == {"model.layers.9.mlp.up_proj": "outlier"}
    assert rules(*usual[:2], module(9, output=0.17)) == {}  # too few to compare with
    assert rules(*usual, module(9, output=0.17, kind="mlp.down_proj")) == {}  # another kind
    small = [module(layer, output=0.001) for layer in range(4)]
    assert rules(*small, module(9, output=0.09)) == {}  # a tenth of the output is the least
    exact = [module(layer, output=0.0) for layer in range(4)]
    assert "most of its kind nothing" in layer_warnings([*exact, module(9, output=0.2)])[0].message


def test_overfit():
    assert rules(module(output=0.05, held_out=0.11)) == {"model.layers.0.mlp.up_proj": "overfit"}
    assert rules(module(output=0.01, held_out=0.05)) == {}  # five times as much, but little
    assert rules(module(output=0.2, held_out=0.3)) == {}  # much more, but half as much again


def test_nothing_known_is_no_warning():
    assert rules(module(), module(1)) == {}
    assert kind_of("model.layers.3.mlp.experts.12.up") == "model.layers.*.mlp.experts.*.up"


def test_few_lines_where_every_layer_has_the_same_warning():
    modules = [module(layer, output=0.05, held_out=0.2) for layer in range(30)]
    found = layer_warnings([*modules, module(30, output=2.0, kind="mlp.down_proj")])
    lines = warning_lines(found, most=3)
    assert len(lines) == 5
    assert lines[3] == "27 more modules for the same reason (overfit)"
    assert lines[4].startswith("model.layers.30.mlp.down_proj: it loses 2.00")
