"""Error correction: the steps of a layer, the equation, and whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from stacked_layers import Stack
from tiny_experts import tiny_moe
from tiny_models import save_tiny, tiny_model, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.calibration import CalibrationWalk, correction, token_batches
from optimum_arb.calibration.calls import Stop
from optimum_arb.calibration.correction import (
    DAMPING,
    LAYER_INPUT,
    Corrections,
    Read,
    Reading,
    Step,
    find_steps,
    sharing_weights,
)
from optimum_arb.calibration.layers import find_layers
from optimum_arb.calibration.statistics import Statistic
from optimum_arb.conversion import binarize_linear
from optimum_arb.loading import calibrated
from optimum_arb.modules import select_modules

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = [
    (QKV, {}),
    (["self_attn.o_proj"], {"self_attn.o_proj": LAYER_INPUT}),
    (["mlp.gate_proj", "mlp.up_proj"], {}),
    (["mlp.down_proj"], {"mlp.down_proj": "post_attention_layernorm"}),
]
STEPS = {
    "LlamaForCausalLM": GATED,
    "GPT2LMHeadModel": [
        (["attn.c_attn"], {}),
        (["attn.c_proj"], {"attn.c_proj": LAYER_INPUT}),
        (["mlp.c_fc"], {}),
        (["mlp.c_proj"], {"mlp.c_proj": "ln_2"}),
    ],
    # outputs are normalized before they are added: no linear adds to the stream itself
    "Gemma2ForCausalLM": [(names, {}) for names, _ in GATED],
    # one input for both branches, whose outputs are added to each other first
    "PhiForCausalLM": [([*QKV, "mlp.fc1"], {}), (["self_attn.dense"], {}), (["mlp.fc2"], {})],
}


def first_layer(model, ids):
    """Its name, itself, its targets by name, and a call that runs it on what it receives."""
    targets = list(select_modules(model, ARBConfig(dataset=None, block_size=64)).modules())
    group = find_layers(model, targets)[0]
    name, layer = group.names[0], group.modules[0]
    seen = []

    def note(module, args, kwargs):
        seen.append((args, kwargs))
        raise Stop

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), pytest.raises(Stop):
        model(input_ids=ids)
    handle.remove()
    args, kwargs = seen[0]

    def run(other=layer):
        with torch.no_grad():
            output = other(*args, **kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]

    return name, layer, {target: model.get_submodule(target) for target in group.targets[0]}, run


def without_prefix(steps, prefix):
    def short(name):
        return name.removeprefix(prefix)

    return [([*map(short, step.names)], {short(k): v for k, v in step.residual.items()}) for step in steps]


@pytest.mark.parametrize("family", STEPS)
def test_steps_of_a_layer(family):
    name, layer, modules, run = first_layer(tiny_model(family), tokens(1))
    found = without_prefix(find_steps(layer, modules, run), name + ".")
    expected = STEPS[family]
    assert [(sorted(names), residual) for names, residual in found] == [(sorted(n), r) for n, r in expected]


def test_steps_of_a_layer_in_parallel_branches():
    """GPT-NeoX adds both branches up; which one reaches the stream first is not the same in every version."""
    name, layer, modules, run = first_layer(tiny_model("GPTNeoXForCausalLM"), tokens(1))
    found = without_prefix(find_steps(layer, modules, run), name + ".")
    assert sorted(target for names, _ in found for target in names) == sorted(
        target.removeprefix(name + ".") for target in modules
    )
    order = {target: index for index, (names, _) in enumerate(found) for target in names}
    assert order["attention.query_key_value"] < order["attention.dense"]
    assert order["mlp.dense_h_to_4h"] < order["mlp.dense_4h_to_h"]


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


def test_experts_are_a_step_of_their_own():
    name, layer, modules, run = first_layer(tiny_moe("MixtralForCausalLM"), tokens(1))
    found = without_prefix(find_steps(layer, modules, run), name + ".")
    assert [sorted(names) for names, _ in found] == [sorted(QKV), ["self_attn.o_proj"], ["mlp.experts"]]
    assert found[1][1] == {"self_attn.o_proj": LAYER_INPUT}


def test_what_no_input_reaches_comes_last():
    name, layer, modules, run = first_layer(tiny_model("LlamaForCausalLM"), tokens(1))
    layer.unused = nn.Linear(8, 8)
    modules[f"{name}.unused"] = layer.unused
    steps = find_steps(layer, modules, run)
    assert (steps[-1].names, steps[-1].residual) == ([f"{name}.unused"], {})
    assert len(steps) == 5


def test_a_layer_that_shares_its_weights_stays_float():
    _, layer, _, run = first_layer(tiny_model("LlamaForCausalLM"), tokens(1))
    other = sharing_weights(layer)
    assert {id(p) for p in other.parameters()} == {id(p) for p in layer.parameters()}
    expected = run()
    layer.mlp.up_proj = nn.Linear(96, 160, bias=False)
    assert torch.equal(run(other), expected)
    assert not torch.equal(run(), expected)


def test_reading_ends_where_the_step_begins():
    """What it reads is what hooks on the modules see; behind the step nothing runs."""
    name, layer, modules, run = first_layer(tiny_model("LlamaForCausalLM"), tokens(1))
    step = find_steps(layer, modules, run)[3]
    seen = {}
    for key, module in (("input", layer.mlp.down_proj), ("stream", layer.post_attention_layernorm)):
        module.register_forward_pre_hook(lambda module, args, key=key: seen.update({key: args[0].clone()}))
    run()
    for whole in (False, True):
        with Reading(layer, name, step, whole) as reading:
            ended = False
            with reading.reading() as read:
                run()
                ended = True
        assert ended is whole
        assert torch.equal(read.input, seen["input"])
        assert torch.equal(read.streams["post_attention_layernorm"], seen["stream"])
    assert not hasattr(reading._local, "found")


class OneNorm(nn.Module):
    """A layer of three branches behind one and the same norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states):
        for branch in (self.first, self.second, self.third):
            hidden_states = hidden_states + branch(self.norm(hidden_states))
        return hidden_states


def test_a_stream_is_what_a_run_that_ends_at_the_step_reads():
    """Also where the module that receives it runs again behind the step, and the run goes on to there."""
    torch.manual_seed(0)
    layer, given = OneNorm(), torch.randn(1, 5, 8)
    modules = {f"layer.{name}": getattr(layer, name) for name in ("first", "second", "third")}
    steps = find_steps(layer, modules, lambda: layer(given))
    assert steps[1].residual == {"layer.second": "norm"}
    found = []
    for whole in (False, True):
        with Reading(layer, "layer", steps[1], whole) as reading, torch.no_grad(), reading.reading() as read:
            layer(given)
        found.append(read)
    assert torch.equal(found[0].input, found[1].input)
    assert torch.equal(found[0].streams["norm"], found[1].streams["norm"])


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


def test_linears_that_run_on_no_tokens_add_to_no_stream():
    """Higgs Audio's second MLP gets the tokens of sound alone: of text, an empty tensor, which equals any other."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.act, self.up = nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)
            self.down = nn.Linear(8, 8)

        def forward(self, x):
            of_sound = x[torch.zeros(x.shape[:-1], dtype=torch.bool)]
            return x + self.down(self.act(self.gate(of_sound)) * self.up(of_sound)).sum()

    layer = Layer()
    linears = {name: module for name, module in layer.named_children() if isinstance(module, nn.Linear)}
    steps = find_steps(layer, linears, lambda: layer(torch.randn(2, 4, 8)))
    assert [step.names for step in steps] == [["gate", "up"], ["down"]]
    assert not any(step.residual for step in steps)
