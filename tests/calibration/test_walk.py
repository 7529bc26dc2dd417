"""The walk over the layers, against a plain one that runs the whole model for every layer."""

from __future__ import annotations

import pytest
import torch
from stacked_layers import Stack
from tiny_experts import tiny_moe
from tiny_models import CAUSAL, ENCODERS, tiny_model, tokens
from torch import nn

from optimum_arb import ARBConfig, ARBLinear
from optimum_arb.calibration import CalibrationWalk, token_batches
from optimum_arb.calibration.activations import Activations
from optimum_arb.calibration.calls import layer_runs
from optimum_arb.calibration.layers import find_layers
from optimum_arb.calibration.runs import ModelRuns
from optimum_arb.calibration.weights import LayerWeights
from optimum_arb.conversion import binarize_linear
from optimum_arb.modules import is_linear, select_modules

CHAINS = [*CAUSAL, *ENCODERS]


def targets(model):
    return list(select_modules(model, ARBConfig(dataset=None)).convert)


def gather(model, batches, names=None):
    """Runs the walk with a stand-in for binarization that halves the weight, so that later inputs show it; returns the
    matrices."""
    found = {}

    def halve(name, module, hessian, count):
        found[name] = (None if hessian is None else hessian.clone(), count)
        with torch.no_grad():
            module.weight.mul_(0.5)
        return module, None

    CalibrationWalk(model, names or targets(model), halve, batches).run()
    return found


def by_whole_runs(model, batches, layers):
    """The definition: the inputs of a layer in the model whose earlier layers are halved already."""
    found = {}
    for names in layers:
        inputs = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, rows=inputs[name]: rows.append(args[0].flatten(0, -2))
            )
            for name in names
        ]
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch)
            for handle in handles:
                handle.remove()
            for name in names:
                rows = torch.cat(inputs[name])
                found[name] = (rows.T @ rows, len(rows))
                model.get_submodule(name).weight.mul_(0.5)
    return found


def layers_of(names):
    """Groups names by the layer they are in, what is outside of all layers last."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        groups.setdefault("~" if number is None else ".".join(parts[: number + 1]), []).append(name)
    return [groups[key] for key in sorted(groups)]


@pytest.mark.parametrize("family", CHAINS)
def test_matrices_are_those_of_the_binarized_prefix(family):
    batches = token_batches(tokens(5, 24), 2)
    names = targets(tiny_model(family))
    found = gather(tiny_model(family), batches)
    expected = by_whole_runs(tiny_model(family), batches, layers_of(names))
    assert found.keys() == expected.keys()
    for name, (hessian, count) in found.items():
        assert count == expected[name][1]
        torch.testing.assert_close(hessian, expected[name][0], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", CHAINS)
def test_layers_of_the_usual_form_run_by_themselves(family, monkeypatch):
    """Two runs of the model for a look, one a batch to record, and one a batch for what lies outside the layers."""
    model = tiny_model(family)
    batches = token_batches(tokens(5, 24), 2)
    runs = []
    run_model = ModelRuns.run
    monkeypatch.setattr(ModelRuns, "run", lambda self, batch: (runs.append(batch.shape), run_model(self, batch)))
    gather(model, batches)
    outside = family in ("OPTForCausalLM", "BertModel")
    assert len(runs) == 2 + len(batches) * (1 + outside)


def test_models_of_another_form_run_whole(monkeypatch):
    """T5's layers hand a position bias to each other: they form no chain."""
    model = tiny_model("T5ForConditionalGeneration")
    names = targets(model)
    found = gather(model, token_batches(tokens(4, 24), 2))
    assert set(found) == set(names)
    assert all(count == 96 for _, count in found.values())
    # of the last decoder layer, against the definition: everything before it is halved
    model = tiny_model("T5ForConditionalGeneration")
    last = [name for name in names if name.startswith("decoder.block.1.")]
    with torch.no_grad():
        for name in names:
            if name not in last:
                model.get_submodule(name).weight.mul_(0.5)
    rows = []
    handle = model.get_submodule(last[0]).register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=tokens(4, 24), decoder_input_ids=tokens(4, 24))
    handle.remove()
    torch.testing.assert_close(found[last[0]][0], rows[0].T @ rows[0], rtol=1e-4, atol=1e-4)


def test_layers_that_run_twice(monkeypatch):
    """Both runs of a shared layer count."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(96, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 8)])
            self.config = type("Config", (), {"is_encoder_decoder": False})()

        def forward(self, input_ids):
            return self.layers[0](self.layers[0](self.embed(input_ids)))

    torch.manual_seed(0)
    model = Twice()
    # a linear itself as the layer: the outermost list's item is the target
    wrapped = nn.Sequential(model.layers[0])
    model.layers[0] = wrapped
    found = gather(model, [tokens(2, 6)], ["layers.0.0"])
    assert found["layers.0.0"][1] == 24


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        hidden = hidden + self.first(hidden)
        return hidden + self.second(hidden)


IN_STACK = [f"layers.{index}.{name}" for index in range(3) for name in ("first", "second")]


class InPlace(Plain):
    def forward(self, hidden):
        hidden += self.first(hidden)
        hidden += self.second(hidden)
        return hidden


@pytest.mark.parametrize(
    "options",
    [{}, {"error_correction": 1e-9}, {"after_layer": lambda turn: turn.run(0)}],
    ids=["alone", "corrected", "after each layer"],
)
def test_layers_that_write_into_their_input(options):
    """Its next run reads it again, and what two linears receive in one tensor is not the same."""

    def matrices(layer):
        found = {}

        def halve(name, module, hessian, count):
            found[name] = hessian.clone()
            result = nn.Linear(8, 8)
            result.weight, result.bias = nn.Parameter(0.5 * module.weight), module.bias
            return result, None

        batches = token_batches(tokens(6, 8), 2)
        CalibrationWalk(Stack(layer), IN_STACK, halve, batches, **options).run()
        return found

    found, expected = matrices(InPlace), matrices(Plain)
    assert found.keys() == expected.keys()
    for name, hessian in found.items():
        torch.testing.assert_close(hessian, expected[name], msg=name)


@pytest.mark.parametrize("twice", ["first", "second"])
def test_a_linear_that_runs_twice_beside_one_that_runs_once(twice):
    """As DeBERTa's key projection, which positions run through too: the other one's matrix knows nothing of these."""

    class Twice(Plain):
        def forward(self, hidden):
            result = hidden + self.first(hidden) + self.second(hidden)
            return result + getattr(self, twice)(hidden.tanh())

    found = gather(Stack(Twice), token_batches(tokens(2, 8), 1), IN_STACK)
    assert all(count == (32 if name.endswith(twice) else 16) for name, (_, count) in found.items())


def in_stack(forward, batches):
    """The matrices of a stack whose forward is another, of the walk and of the definition."""

    def model():
        result = Stack(Plain)
        result.forward = forward.__get__(result)
        return result

    layers = [IN_STACK[start : start + 2] for start in range(0, 6, 2)]
    return gather(model(), batches, IN_STACK), by_whole_runs(model(), batches, layers)


def test_hidden_states_that_are_written_into_between_layers():
    """It is the same tensor that the next layer receives, but not what the one before it put out."""

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            hidden[:, 0] += 5
        return hidden

    found, expected = in_stack(forward, token_batches(tokens(6, 8), 2))
    for name, (hessian, _) in found.items():
        torch.testing.assert_close(hessian, expected[name][0], msg=name)


def test_hidden_states_that_only_some_batches_change_between_layers():
    """As a vision model does that adds image features behind its first layers: silently, they were left out."""

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = hidden + 5 if (input_ids == 3).any() else hidden
        return hidden

    with_image = torch.full((2, 8), 3)
    with pytest.raises(ValueError, match=r"before layers\.1 in calibration batch 1.*first of the dataset"):
        in_stack(forward, [tokens(2, 8), with_image])
    found, expected = in_stack(forward, [with_image, tokens(2, 8)])
    for name, (hessian, _) in found.items():
        torch.testing.assert_close(hessian, expected[name][0], msg=name)


class Skip(Plain):
    def forward(self, hidden, earlier=None):
        hidden = super().forward(hidden)
        return hidden if earlier is None else hidden + earlier


def skips(self, input_ids):
    """Each layer also gets what the one two before it put out."""
    outputs = [self.embed(input_ids)]
    for index, layer in enumerate(self.layers):
        outputs.append(layer(outputs[-1], outputs[index - 1]) if index else layer(outputs[-1]))
    return outputs[-1]


def skips_of_something_else(self, input_ids):
    """The argument is made of an output, and is not that tensor."""
    outputs = [self.embed(input_ids)]
    for index, layer in enumerate(self.layers):
        earlier = {"earlier": outputs[index - 1][:, :1].tanh()} if index else {}
        outputs.append(layer(outputs[-1], **earlier))
    return outputs[-1]


@pytest.mark.parametrize("forward", [skips, skips_of_something_else])
def test_outputs_among_the_arguments_of_a_later_layer(forward):
    """Those of the float model were recorded, and the layers that follow a binarized one are called with others."""

    def model():
        result = Stack(Skip)
        result.forward = forward.__get__(result)
        return result

    batches = token_batches(tokens(6, 8), 2)
    found = gather(model(), batches, IN_STACK)
    expected = by_whole_runs(model(), batches, [IN_STACK[start : start + 2] for start in range(0, 6, 2)])
    for name, (hessian, _) in found.items():
        torch.testing.assert_close(hessian, expected[name][0], msg=name)
    with pytest.raises(
        ValueError, match=r"error_correction=0\.5 cannot be had for Stack: the layers of layers hand on"
    ):
        CalibrationWalk(model(), IN_STACK, lambda *_: None, batches, error_correction=0.5, must_correct=True).run()


def test_recorded_arguments_are_each_layers_own():
    """Gemma's sliding and full layers get different masks."""
    model = tiny_model("Gemma3ForCausalLM", attn_implementation="eager")
    walk = CalibrationWalk(model, targets(model), lambda *a: None, token_batches(tokens(2, 24), 1))
    with torch.no_grad():
        (group,) = find_layers(model, targets(model))
        walk.runs.probe([group], walk.batches[0])
        calls = walk.runs.record(group, walk.batches, lambda *_: None)
    masks = [layer[0].kwargs["attention_mask"] for layer in calls]
    assert masks[0].shape == masks[1].shape
    assert not torch.equal(masks[0], masks[1])
    # what is equal in every batch is kept once
    assert calls[0][0].kwargs["attention_mask"] is calls[0][1].kwargs["attention_mask"]


def test_what_layers_share_is_kept_once_and_compared_once_a_batch(monkeypatch):
    compared = []
    equal = torch.Tensor.equal
    monkeypatch.setattr(torch.Tensor, "equal", lambda self, other: compared.append(self) or equal(self, other))
    counts = []
    for layers in (2, 6):
        model = tiny_model("LlamaForCausalLM", num_hidden_layers=layers)
        walk = CalibrationWalk(model, targets(model), lambda *_: None, token_batches(tokens(), 1))
        with torch.no_grad():
            groups = find_layers(model, targets(model))
            walk.runs.probe(groups, walk.batches[0])
            compared.clear()
            calls = walk.runs.record(groups[0], walk.batches, lambda *_: None)
        counts.append(len(compared))
        kept = {id(x) for each in calls for call in each for x in call.kwargs["position_embeddings"]}
        assert len(kept) == 2  # cos and sin, of all layers and batches
    assert counts[0] == counts[1] > 0


def test_the_model_is_as_before_but_for_its_linears():
    model = tiny_model("LlamaForCausalLM")
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = targets(model)
    config = ARBConfig(dataset=tokens(), block_size=64)

    def binarize(name, module, hessian, count):
        packed, record = binarize_linear(name, module, config, hessian, count)
        return packed, record.output_error

    walk = CalibrationWalk(model, names, binarize, token_batches(tokens()))
    walk.run()
    assert len(walk.errors) == len(names)
    for name, module in model.named_modules():
        assert isinstance(module, ARBLinear) == (name in names)
        assert is_linear(module) == (name == "lm_head")
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in names:
            assert torch.equal(parameter, before[name])


def test_a_failure_leaves_no_hook_behind():
    model = tiny_model("LlamaForCausalLM")

    def fail(*args):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        CalibrationWalk(model, targets(model), fail, [tokens()]).run()
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_after_layer_sees_each_binarized_layer_before_its_outputs_are_computed():
    """What it changes in a layer, the next layer's inputs show; the references are the float layer's outputs."""
    turns = []

    def change(turn):
        with torch.no_grad():
            turns.append((turn.name, len(turn.inputs), len(turn.references), (turn.run(0) - turn.references[0]).norm()))
            for name in turn.targets:
                turn.layer.get_submodule(name.removeprefix(f"{turn.name}.")).weight.zero_()

    model = tiny_model("LlamaForCausalLM")
    seen = []

    def binarize(name, module, hessian, count):
        seen.append((name, hessian.clone()))
        with torch.no_grad():
            module.weight.mul_(0.5)
        return module, None

    batches = token_batches(tokens(5, 24), 2)
    CalibrationWalk(model, targets(model), binarize, batches, after_layer=change).run()
    assert [turn[:3] for turn in turns] == [("model.layers.0", 3, 3), ("model.layers.1", 3, 3)]
    assert all(turn[3] > 0.1 for turn in turns)
    # with its linears at zero, the first layer hands on the embeddings: the inputs of the second's query are those
    embedded = model.model.layers[1].input_layernorm(model.model.embed_tokens(tokens(5, 24))).flatten(0, 1)
    found = dict(seen)["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(found, (embedded.T @ embedded).detach(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_attends_to_nothing_that_its_runs_before_left():
    """Granite MoE takes `use_cache` among what it only hands on, and makes a cache unless it is told not to."""
    model = tiny_moe("GraniteMoeForCausalLM")
    group = find_layers(model, list(select_modules(model, ARBConfig(dataset=None, block_size=64)).modules()))[0]
    hidden, runs = Activations(), ModelRuns(model, LayerWeights())
    runs.probe([group], tokens(1))
    calls = runs.record(group, list(tokens(2).split(1)), hidden.put)
    run = layer_runs(group.modules[1], hidden, calls[1], torch.device("cpu"))
    expected = run(1)
    run(0)
    hidden.put(0, hidden[1].clone())
    assert torch.equal(run(0), expected)
