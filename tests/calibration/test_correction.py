"""Error correction: the equation, and whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from stacked_layers import Stack
from tiny_models import save_tiny, tiny_model, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.calibration import CalibrationWalk, correction, token_batches
from optimum_arb.calibration.correction import DAMPING, Corrections
from optimum_arb.calibration.reading import Read, Step, find_steps
from optimum_arb.calibration.statistics import Statistic
from optimum_arb.conversion import binarize_linear
from optimum_arb.loading import calibrated
from optimum_arb.modules import select_modules


class Repeating(nn.Module):
    """One of the three linears runs twice, the first time on the input of another."""

    def __init__(self):
        super().__init__()
        self.before, self.twice, self.behind = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        given = hidden.tanh()
        hidden = hidden + self.before(given) + self.twice(given)
        return hidden + self.behind(self.twice(hidden.cos()))


def test_a_linear_that_runs_twice_counts_with_both_runs_and_is_not_corrected():
    """The run of the layer ended where it ran first: the matrix knew nothing of the second."""
    model, batches = Stack(Repeating, 2), token_batches(tokens(6, 8), 2)
    first = model.layers[0]
    steps = find_steps(first, dict(first.named_children()), lambda: first(torch.randn(2, 4, 8)))
    assert steps == [Step(["before"]), Step(["twice"], repeats=True), Step(["behind"])]
    names = [f"layers.{index}.{name}" for index in range(2) for name in ("before", "twice", "behind")]
    found, inputs = {}, {}

    def fit(name, module, hessian, count):
        found[name] = hessian.clone(), count, module.weight.detach().clone()
        result = copy.deepcopy(module)
        result.weight = nn.Parameter(0.5 * module.weight)
        return result, None

    original = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    CalibrationWalk(model, names, fit, batches, error_correction=0.5).run()
    assert [found[name][1] for name in names] == [48, 96, 48] * 2
    for name in names:
        # nothing is wrong before the first step of the first layer
        same = torch.equal(found[name][2], original[name])
        assert same is (name.endswith("twice") or name == "layers.0.before"), name

    # the definition: what the second layer's linear receives once all before it is binarized
    model.layers[1].twice.weight.data.copy_(original["layers.1.twice"])
    model.layers[1].behind.weight.data.copy_(original["layers.1.behind"])
    model.layers[1].twice.register_forward_pre_hook(lambda module, args: inputs.setdefault("x", []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    rows = torch.cat([x.flatten(0, -2) for x in inputs["x"]])
    torch.testing.assert_close(found["layers.1.twice"][0], rows.T @ rows)


def linear(rows, columns, kind=nn.Linear):
    module = kind(columns, rows) if kind is nn.Linear else Conv1D(rows, columns)
    with torch.no_grad():
        module.weight.normal_()
    return module


def correct(step, modules, batches, strength):
    """`batches` of (wanted, found); returns the corrections, solved."""
    corrections = Corrections(step, modules, torch.device("cpu"))
    statistic = Statistic(batches[0][1].input.shape[-1], torch.device("cpu"))
    for wanted, found in batches:
        corrections.add(corrections.differences(wanted, found), found.input)
        statistic.add(found.input)
    corrections.solve(step.names, statistic.hessian, strength)
    return corrections, statistic.hessian


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_weight_is_that_of_dense_least_squares(kind, residual, strength):
    """`[x; root(damping) I] T^T = [W x + s d; root(damping) W]`, in float64, for linears that share a sum and for those
    that do not."""
    torch.manual_seed(0)
    columns, shapes = (12, {"a": 20, "b": 9}) if not residual else (20, {"a": 6})
    modules = {name: linear(rows, columns, kind) for name, rows in shapes.items()}
    step = Step(list(shapes), {"a": "norm"} if residual else {})
    batches = []
    for _ in range(3):
        given = torch.randn(2, 30, columns) @ torch.randn(columns, columns)
        streams = [{"norm": torch.randn(2, 30, shapes["a"])} if residual else {} for _ in range(2)]
        batches.append((Read(given + 0.3 * torch.randn_like(given), streams[0]), Read(given, streams[1])))
    corrections, hessian = correct(step, modules, batches, strength)
    assert corrections.shared is not residual

    x = torch.cat([found.input.reshape(-1, columns) for _, found in batches]).double()
    wanted_x = torch.cat([wanted.input.reshape(-1, columns) for wanted, _ in batches]).double()
    root = (DAMPING * hessian.diagonal().double().mean()).sqrt()
    for name, module in modules.items():
        transposed = module.weight.detach().double() if kind is Conv1D else module.weight.detach().double().T
        d = (wanted_x - x) @ transposed
        if residual:
            off = [w.streams["norm"] - f.streams["norm"] for w, f in batches]
            usual = [w.streams["norm"].norm(dim=-1, keepdim=True).median(1, keepdim=True).values for w, _ in batches]
            off = [o * (u / o.norm(dim=-1, keepdim=True)).clamp_max(1) for o, u in zip(off, usual, strict=True)]
            d += torch.cat([o.reshape(-1, shapes[name]) for o in off])
        left = torch.cat([x, root * torch.eye(columns, dtype=torch.float64)])
        right = torch.cat([x @ transposed + strength * d, root * transposed])
        dense = torch.linalg.lstsq(left, right).solution
        result = corrections.corrected(name)
        found = result.weight if kind is Conv1D else result.weight.T
        assert result.weight.dtype == torch.float32
        assert result.bias is module.bias
        torch.testing.assert_close(found.double(), dense, rtol=1e-5, atol=1e-5)


def test_a_token_whose_stream_is_lost_counts_as_any_other(monkeypatch):
    """The first token of a sequence may be a thousand times as long as the others: what it lacks is not to be made up
    for by what is added to all tokens."""
    torch.manual_seed(0)
    module = linear(6, 20)
    step = Step(["a"], {"a": "norm"})
    x, stream = torch.randn(2, 30, 20), torch.randn(2, 30, 6)
    off = 0.1 * torch.randn(2, 30, 6)
    found = Read(x, {"norm": stream})

    def change(length):
        wanted = stream + off
        wanted[:, 0] += length * torch.ones(6)
        corrections, _ = correct(step, {"a": module}, [(Read(x, {"norm": wanted}), found)], 1.0)
        return (corrections.corrected("a").weight - module.weight).detach()

    limited = change(1000.0)
    torch.testing.assert_close(limited, change(1e6), rtol=1e-2, atol=1e-3)
    monkeypatch.setattr(correction, "MOST_OFF", torch.inf)
    assert limited.norm() < 0.01 * change(1000.0).norm()


@pytest.mark.parametrize("inputs", ["equal", "zero", "infinite"])
def test_where_nothing_can_be_corrected_the_linear_stays(inputs):
    module = linear(4, 6)
    x = torch.randn(10, 6) if inputs != "zero" else torch.zeros(10, 6)
    x[0, 0] = torch.inf if inputs == "infinite" else x[0, 0]
    wanted = x.clone() if inputs != "zero" else torch.randn(10, 6)
    step = Step(["a"])
    corrections, _ = correct(step, {"a": module}, [(Read(wanted), Read(x))], 0.5)
    assert corrections.corrected("a") is module


def test_the_form_of_the_sum_changes_nothing():
    """A linear with more columns than twice its rows has a sum of its own, of less memory."""
    torch.manual_seed(0)
    module = linear(4, 12)
    given = torch.randn(50, 12)
    batch = [(Read(given + 0.1 * torch.randn(50, 12)), Read(given))]
    own, _ = correct(Step(["a"]), {"a": module}, batch, 0.5)
    other = {"a": module, "b": linear(9, 12)}
    both, _ = correct(Step(["a", "b"]), other, batch, 0.5)
    assert (own.shared, both.shared) == (False, True)
    torch.testing.assert_close(own.corrected("a").weight, both.corrected("a").weight)


def walk(model, batches, strength, **options):
    config = ARBConfig(block_size=64, admm_iterations=0, refinement_sweeps=1)
    targets = select_modules(model, config).modules()

    def binarize(name, module, hessian, count):
        packed, record = binarize_linear(name, module, config, hessian, count)
        return packed, record.output_error

    done = CalibrationWalk(model, targets, binarize, batches, error_correction=strength, **options)
    done.run()
    return done


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "PhiForCausalLM"])
def test_outputs_come_closer_to_those_of_the_float_model(family):
    """On text that nothing was fitted to, what the last layer puts out."""
    ids = tokens(48, 32)
    original = tiny_model(family)
    errors = {}
    with torch.no_grad():
        expected = original(input_ids=ids[40:], output_hidden_states=True).hidden_states[-1]
        for strength in (0.0, 0.5):
            model = tiny_model(family)
            walk(model, token_batches(ids[:40], 8), strength)
            found = model(input_ids=ids[40:], output_hidden_states=True).hidden_states[-1]
            errors[strength] = float((found - expected).square().mean() / expected.square().mean())
    assert errors[0.5] < 0.97 * errors[0.0]


def test_the_float_models_outputs_are_kept_where_they_are_asked_for():
    ids, original, model = tokens(6), tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    done = walk(model, token_batches(ids, 2), 0.5, follow_float=True)
    with torch.no_grad():
        expected = original(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(original.model.norm(torch.cat(done.float_outputs)), expected)
    assert not walk(tiny_model("LlamaForCausalLM"), token_batches(ids, 2), 0.5).float_outputs


def test_resumed_behind_a_finished_layer(tmp_path, monkeypatch):
    """Its float form is read again from the source, for the float model's hidden states."""
    original = calibrated.binarize_linear
    choices = {"block_size": 64, "batch_size": 2, "admm_iterations": 0, "refine": "block", "refine_steps": 2}
    config = ARBConfig(dataset=tokens(6), **choices)
    save_tiny(tmp_path / "float", "LlamaForCausalLM", num_hidden_layers=3)
    quantize_checkpoint(tmp_path / "float", tmp_path / "whole", config)
    fits = []

    def interrupted(*args):
        fits.append(args[0])
        if len(fits) == 9:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "binarize_linear", interrupted)
        with pytest.raises(KeyboardInterrupt, match="1 of 3 layers"):
            quantize_checkpoint(tmp_path / "float", tmp_path / "resumed", config)
    assert quantize_checkpoint(tmp_path / "float", tmp_path / "resumed", config, resume=True).resumed_layers == 1
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
