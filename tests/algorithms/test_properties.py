"""Properties of every method on inputs that hypothesis makes up: degenerate weights and calibration matrices, scales
from 1e-30 to 1e30, NaN and Inf.

A method is covered by its name in `METHODS`; its forms with other choices stand in `FORMS`. What a method promises
against round-to-nearest stands in `NO_WORSE_THAN_RTN`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from optimum_arb import algorithms
from optimum_arb.algorithms import binarize
from optimum_arb.algorithms.hessian import identity_hessian, prepare_hessian
from optimum_arb.config import BITMAP_METHODS, METHODS, ARBConfig
from optimum_arb.conversion import binarize_linear
from optimum_arb.format.factors import FactorizedWeight, rounded_bits, stored_bits
from optimum_arb.format.packing import BinarizedWeight
from optimum_arb.nn import packed_linear

FORMS = [
    *({"method": method} for method in METHODS),
    {"method": "arb-hrc", "planes": 2},
    {"method": "arb-hrc", "planes": 3},
    {"method": "arb-hrc", "col_scale": False, "act_order": False},
    {"method": "arb-hrc", "hadamard": 64},
    {"method": "arb-rc", "group_bitmap": "none", "salient_columns": 0},
    {"method": "arb", "group_bitmap": "none", "salient_columns": 0},
    *({"method": method, "compensation": "diagonal", "split_metric": "score"} for method in BITMAP_METHODS),
]
"""The methods whose error is at most that of round-to-nearest in the same blocks: `tr(E H E^T)` with the damped
calibration matrix, and `||E||^2` without one. Under calibration the released compensation ("diagonal") is out of it:
there the methods stay what was released. "arb-dbf" has no blocks, and may store fewer bits than round-to-nearest can:
`test_factors_no_worse_than_what_takes_no_more_bits`.
"""
NO_WORSE_THAN_RTN = [form for form in FORMS if form["method"] != "arb-dbf"]

SETTINGS = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def ids(form: dict) -> str:
    return "-".join(str(value) for value in form.values())


@dataclass
class Problem:
    """A weight `[N, K]`, the inputs `[T, K]` of its calibration (None without) and the block size."""

    weight: torch.Tensor
    inputs: torch.Tensor | None
    block_size: int

    @property
    def hessian(self) -> torch.Tensor | None:
        return None if self.inputs is None else self.inputs.T @ self.inputs

    @property
    def overflows(self) -> bool:
        """Whether the calibration matrix leaves float32."""
        return self.inputs is not None and not self.hessian.isfinite().all()


@st.composite
def problems(draw, calibrated: bool | None = None) -> Problem:
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 7, 64, 65, 128, 129, 200]))
    # of numpy: torch draws other numbers with other vector instructions, so another machine tried other problems
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(generator.standard_normal(shape, np.float32))

    def some(count: int) -> torch.Tensor:
        return torch.from_numpy(generator.permutation(count)[: max(1, count // 4)])

    kind = draw(st.sampled_from(["normal", "heavy", "two levels", "rank one", "integers", "zero"]))
    if kind == "normal":
        weight = normal(rows, columns)
    elif kind == "heavy":  # a few weights carry everything
        weight = normal(rows, columns) ** 7
    elif kind == "two levels":
        weight = torch.where(torch.from_numpy(generator.random((rows, columns))) < draw(st.floats(0, 1)), 1.0, -1.0)
    elif kind == "rank one":
        weight = normal(rows, 1) * normal(columns)
    elif kind == "integers":
        weight = torch.from_numpy(generator.integers(-1, 3, (rows, columns))).float()
    else:
        weight = torch.zeros(rows, columns)
    for defect in draw(
        st.sets(st.sampled_from(["constant rows", "zero rows", "zero columns", "same columns", "tiny"]))
    ):
        if defect == "constant rows":
            weight[some(rows)] = 0.25
        elif defect == "zero rows":
            weight[some(rows)] = 0
        elif defect == "zero columns":
            weight[:, some(columns)] = 0
        elif defect == "same columns":
            weight[:, some(columns)] = weight[:, :1].clone()
        else:  # rows beside which others vanish
            weight[some(rows)] *= 1e-12
    weight = weight * 10.0 ** draw(st.integers(-30, 30))
    inputs = None
    if calibrated or (calibrated is None and draw(st.booleans())):
        tokens = draw(st.sampled_from([1, 2, 30, 300]))
        inputs = normal(tokens, columns)
        for defect in draw(st.sets(st.sampled_from(["rank one", "dead", "same", "massive", "repeated"]))):
            if defect == "rank one":
                inputs = normal(tokens, 1) * normal(columns)
            elif defect == "dead":
                inputs[:, some(columns)] = 0
            elif defect == "same":
                inputs[:, some(columns)] = inputs[:, :1].clone()
            elif defect == "massive":  # one feature of a thousand times the size, as real models have
                inputs[:, int(some(columns)[0])] *= 1e3
            else:
                inputs = inputs[:1].expand(tokens, -1).clone()
        inputs = inputs * 10.0 ** draw(st.integers(-15, 15))
    return Problem(weight, inputs, draw(st.sampled_from([64, 128, -1])))


def configuration(form: dict, problem: Problem, **choices) -> ARBConfig:
    return ARBConfig(**{"num_iterations": 2, "block_size": problem.block_size, **form, **choices})


def own_error(problem: Problem, result: torch.Tensor, config: ARBConfig) -> float:
    """The error in the metric that the method minimizes, in units of 1e-30 to 1e30 taken off; float64.

    Columns without input are out of it: what is stored there may as well be nothing.
    """
    unit = 10.0 ** math.floor(math.log10(float(problem.weight.abs().max()) or 1.0))
    weight, result = problem.weight.double() / unit, result.double() / unit
    if problem.hessian is None:
        prepared = identity_hessian(weight.shape[1], torch.device("cpu"))
    else:
        damping, shrinkage = config.resolved_damp_percent, config.resolved_shrinkage
        prepared = prepare_hessian(problem.hessian, damping, config.resolved_act_order, shrinkage)
    if prepared.permutation is not None:
        weight, result = weight[:, prepared.permutation], result[:, prepared.permutation]
    error = torch.where(prepared.dead, 0.0, weight - result)
    return float((error @ prepared.factor.double()).square().sum())


def energy(problem: Problem, config: ARBConfig) -> float:
    """What storing nothing would cost, in the same metric."""
    return own_error(problem, torch.zeros_like(problem.weight), config)


def stored(problem: Problem, config: ARBConfig) -> torch.Tensor:
    """The weight after packing, with its scales as they are stored; float64."""
    return packed_linear(binarize(problem.weight, problem.hessian, config)).dequantize(torch.float64)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@SETTINGS
@given(problem=problems())
def test_what_is_stored_is_finite(form, problem):
    """Whatever the input, and after the rounding of the scales."""
    config = configuration(form, problem)
    if problem.overflows:
        with pytest.raises(ValueError, match="calibration matrix has NaN or Inf"):
            binarize(problem.weight, problem.hessian, config)
        return
    layer = packed_linear(binarize(problem.weight, problem.hessian, config))
    for name, tensor in layer.packed().items():
        if tensor.is_floating_point():
            assert tensor.isfinite().all(), name
    for dtype in (torch.float32, torch.float64):
        assert layer.dequantize(dtype).isfinite().all()
    if not problem.weight.any():
        assert not layer.dequantize().any()


@pytest.mark.parametrize("form", NO_WORSE_THAN_RTN, ids=ids)
@SETTINGS
@given(problem=problems(calibrated=False))
def test_weights_no_worse_than_round_to_nearest(form, problem):
    compare(form, problem)


@pytest.mark.parametrize("form", [f for f in NO_WORSE_THAN_RTN if f.get("compensation") != "diagonal"], ids=ids)
@SETTINGS
@given(problem=problems(calibrated=True))
def test_outputs_no_worse_than_round_to_nearest(form, problem):
    assume(not problem.overflows)
    compare(form, problem)


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5, 3.0])
@SETTINGS
@given(problem=problems())
def test_factors_no_worse_than_what_takes_no_more_bits(bits, problem):
    """Round-to-nearest of whole rows is that, or there is none: it takes 1 + 16 / K bits a weight."""
    form = {"method": "arb-dbf", "factor_bits": bits, "num_iterations": 3}
    assume(not problem.overflows)
    shape = problem.weight.shape
    rank = configuration(form, problem).resolved_rank(*shape)
    found = binarize(problem.weight, problem.hessian, configuration(form, problem))
    if stored_bits(*shape, rank) < rounded_bits(*shape):
        assert isinstance(found, FactorizedWeight)
        return
    compare(form, problem, block_size=-1)


def test_one_level_is_stored_as_one_plane():
    """A product of sign matrices cannot hold signs at random; with too few bits for anything else it stands all the
    same."""
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)).sign()
    hessian = torch.eye(96)
    for metric in (None, hessian):
        found = binarize(weight, metric, ARBConfig(method="arb-dbf", factor_bits=1.6, num_iterations=5))
        assert isinstance(found, BinarizedWeight)
        assert torch.equal(found.dequantize(), weight)
        few = binarize(weight, metric, ARBConfig(method="arb-dbf", factor_bits=1.1, num_iterations=5))
        assert isinstance(few, FactorizedWeight)


def test_a_column_without_input_is_no_part_of_the_mean_that_takes_the_place_of_factors():
    """Beside what stands in it the rest would vanish."""
    weight = torch.tensor([[0.2, 0.0], [1e-6, 1e-6], [-0.02, 0.0], [0.0, 0.0], [1e-5, 2e-6]])
    inputs = torch.tensor([[0.0, 1.0], [0.0, -2.0]])
    config = ARBConfig(method="arb-dbf", factor_bits=16.0, num_iterations=3)
    found = binarize(weight, inputs.T @ inputs, config)
    torch.testing.assert_close(found.dequantize()[:, 1], weight[:, 1], rtol=1e-2, atol=1e-9)


def test_one_token_and_signs_that_lose_by_it():
    """Seven equal weights under one token: flips that the outputs allow, and the weights do not."""
    weight = torch.full((2, 7), 0.25)
    weight[0] = 0
    inputs = torch.tensor([[-0.6845, 0.0, 0.5075, -0.4012, -0.1502, -0.4060, 0.3110]])
    compare({"method": "arb-hrc", "col_scale": False, "act_order": False}, Problem(weight, inputs, 64))


def compare(form: dict, problem: Problem, block_size: int | None = None) -> None:
    """With the blocks of the problem, or others of round-to-nearest."""
    assert not problem.overflows
    # the smallest numbers of float32 have few bits left: a scale among them is off by a part in a hundred
    if 0 < float(problem.weight.abs().max()) < 1e-36:
        return
    config = configuration(form, problem)
    rtn = ARBConfig(method="rtn", block_size=block_size or problem.block_size, act_order=False)
    error, theirs = (own_error(problem, stored(problem, each), config) for each in (config, rtn))
    # the scales of float16, half a unit in the last place of each of two factors, move both errors
    assert error <= theirs + 2e-3 * math.sqrt(theirs * energy(problem, config)) + 1e-6 * energy(problem, config)


NO_BITMAP = {"group_bitmap": "none", "salient_columns": 0}


def fit_alone(weight: torch.Tensor, hessian: torch.Tensor | None, config: ARBConfig) -> torch.Tensor:
    """What the method makes without a look at round-to-nearest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "no_worse_than_rounding", lambda target, fit, *_: fit)
        return binarize(weight, hessian, config).dequantize()


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ({"method": "billm", **NO_BITMAP}, [1.0, 1, 1, 2, -3, 1, 2, 2]),
        ({"method": "billm"}, [*[1.0] * 44, *[-1.0] * 20]),
        ({"method": "arb", **NO_BITMAP}, [2.0, -2, -3, -1]),
    ],
    ids=["billm-none", "billm", "arb-none"],
)
def test_a_mean_that_loses_gives_way_to_one_scale(form, row):
    """In its row alone: the one beside it keeps every bit."""
    config = ARBConfig(**form)
    beside = torch.randn(len(row), generator=torch.Generator().manual_seed(0))
    weight = torch.stack([torch.tensor(row), beside])
    alone = fit_alone(weight, None, config)
    rounded = binarize(weight, None, ARBConfig(method="rtn")).dequantize()
    assert (weight - alone)[0].norm() > 1.01 * (weight - rounded)[0].norm()
    assert (weight - alone)[1].norm() < (weight - rounded)[1].norm()
    found = binarize(weight, None, config).dequantize()
    assert torch.equal(found[0], rounded[0])
    assert torch.equal(found[1], alone[1])


@pytest.mark.parametrize("form", [{"method": "billm"}, {"method": "arb-rc", **NO_BITMAP}], ids=ids)
@pytest.mark.parametrize("compensation", ["diagonal", "exact"])
def test_outputs_that_lose_give_way_to_one_scale(form, compensation):
    """Nearly one level of weight, which one scale meets nearly exactly, and inputs with a common part, in which the
    error of an uneven number of signs adds up; neither way of compensating makes up for it. Column scales are those of
    all rows: there the whole weight gives way. With the released compensation nothing does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 192, generator=generator).sign()
    weight[:, :64] *= 1 + 0.1 * torch.randn(16, 64, generator=generator)
    inputs = torch.randn(1024, 1, generator=generator) + 0.1 * torch.randn(1024, 192, generator=generator)
    problem = Problem(weight, inputs, 64)
    config = ARBConfig(block_size=64, compensation=compensation, **form)
    rounded = binarize(weight, problem.hessian, ARBConfig(method="rtn", block_size=64)).dequantize()
    bound = own_error(problem, rounded, config)
    alone, found = fit_alone(weight, problem.hessian, config), binarize(weight, problem.hessian, config).dequantize()
    if form["method"] == "billm":
        assert own_error(problem, alone, config) > 10 * bound
    if compensation == "diagonal":
        assert torch.equal(found, alone)
    else:
        assert own_error(problem, found, config) <= 1.0001 * bound


# Through the conversion of a module


@pytest.mark.parametrize("form", FORMS, ids=ids)
@SETTINGS
@given(
    problem=problems(calibrated=True),
    where=st.sampled_from(["weight", "inputs"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    place=st.integers(0, 10**6),
)
def test_one_value_that_is_not_finite_is_an_error_that_names_the_module(form, problem, where, value, place):
    planted = getattr(problem, where)
    planted.view(-1)[place % planted.numel()] = value
    module = nn.Linear(problem.weight.shape[1], len(problem.weight))
    module.weight.data = problem.weight
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.mlp: the (weight|activations)") as error:
        binarize_linear("model.layers.3.mlp", module, configuration(form, problem), problem.hessian)
    assert ("weight" in str(error.value)) == (where == "weight")


@pytest.mark.parametrize("form", FORMS, ids=ids)
@SETTINGS
@given(problem=problems(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_module_runs_as_it_was_fitted(form, problem, dtype):
    """A finite error in the record and finite outputs, or the error that names the module: where float16 cannot hold
    the weight."""
    weight = problem.weight.to(dtype)
    module = nn.Linear(weight.shape[1], len(weight))
    module.weight.data = weight
    config = configuration(form, problem)
    if not weight.isfinite().all():
        with pytest.raises(ValueError, match=r"^fc: the weight holds NaN or Inf"):
            binarize_linear("fc", module, config, problem.hessian)
        return
    if problem.overflows:
        with pytest.raises(ValueError, match=r"^fc: the activations that reach it in calibration hold NaN or Inf"):
            binarize_linear("fc", module, config, problem.hessian)
        return
    packed, record = binarize_linear("fc", module, config, problem.hessian, tokens=1)
    assert math.isfinite(record.weight_error)
    assert record.output_error is None or math.isfinite(record.output_error)
    x = torch.ones(2, weight.shape[1])
    expected = x.double() @ packed.dequantize(torch.float64).T + packed.bias.double()
    size = x.double() @ packed.dequantize(torch.float64).abs().T + packed.bias.double().abs()
    with torch.no_grad():
        assert ((packed(x).double() - expected).abs() <= 2e-6 * size + 1e-35).all()
