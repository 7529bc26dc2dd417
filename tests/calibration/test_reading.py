"""The steps of a layer, and what a run up to them reads."""

from __future__ import annotations

import pytest
import torch
from tiny_experts import tiny_moe
from tiny_models import tiny_model, tokens
from torch import nn

from optimum_arb import ARBConfig
from optimum_arb.calibration.calls import Stop
from optimum_arb.calibration.layers import find_layers
from optimum_arb.calibration.reading import LAYER_INPUT, Reading, find_steps, sharing_weights
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
