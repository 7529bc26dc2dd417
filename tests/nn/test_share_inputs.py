"""`share_inputs`: which layers of a model share, compiled, copied and saved."""

import copy
import io

import pytest
import torch
from shared_layers import Attention, layers
from tiny_models import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.nn import share_inputs
from optimum_arb.nn.compiled import _waiting as waiting


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiles_as_one_graph(backend, compiled_on_a_gpu):
    model = Attention(layers(bias=True, permuted=True))
    inputs = torch.randn(4, 2, 1, 300).half().unbind()
    expected = [model(x) for x in inputs]
    assert share_inputs(model) == 1
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(compiled(x), wanted)
    assert model.q_proj.shared_input.enabled
    assert not waiting


def test_cross_attention_compiles(compiled_on_a_gpu):
    model = Attention(layers())
    x, memory = torch.randn(2, 1, 300).half()
    expected = model(x, memory)
    share_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x, memory), expected)
    assert not model.q_proj.shared_input.enabled
    assert not waiting


def test_modules_and_files_do_not_show_it():
    model = Attention(layers(bias=True))
    names, modules = list(model.state_dict()), list(dict(model.named_modules()))
    share_inputs(model)
    assert list(model.state_dict()) == names
    assert list(dict(model.named_modules())) == modules
    x = torch.randn(1, 300)
    expected = model(x)
    model.ask(model.q_proj, x)  # results that wait for the others
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert buffer.tell() < 1.5 * sum(p.numel() * p.element_size() for p in model.parameters()) + 20000
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert copied.q_proj.shared_input is None
        assert torch.equal(copied(x), expected)
        assert share_inputs(copied) == 1
        assert copied.q_proj.shared_input.layers[0] is copied.q_proj
        assert torch.equal(copied(x), expected)


def test_a_tiny_llama(tmp_path):
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path / "float")
    config = ARBConfig(dataset=None, block_size=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for found in (model, again):
        for block in found.model.layers:
            together = block.self_attn.q_proj.shared_input
            expected = [getattr(block.self_attn, f"{name}_proj") for name in "qkv"]
            assert together.layers == expected
            assert [layer.shared_index for layer in expected] == [0, 1, 2]
            assert all(layer.shared_input is together for layer in expected)
            gate, up = block.mlp.gate_proj, block.mlp.up_proj
            assert gate.shared_input.layers == [gate, up]
            assert up.shared_input is gate.shared_input
            assert gate.shared_input is not together
            assert block.self_attn.o_proj.shared_input is None
            assert block.mlp.down_proj.shared_input is None
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_layers_that_differ_are_not_shared():
    base = {"name": "planes-2-col", "columns": 256}
    others = [
        {"name": "planes-2"},
        {"block_size": 256},
        {"columns": 384},
        {"permuted": True},
        {"bias": True},
    ]
    for change in others:
        model = Attention([*layers(rows=(42, 7), **base), *layers(rows=(16,), **{**base, **change})])
        assert share_inputs(model) == 0
        assert model.q_proj.shared_input is None
    model = Attention(layers(**base))
    model.v_proj.backend = "reference"
    assert share_inputs(model) == 0
    model.v_proj = nn.Linear(256, 16)
    assert share_inputs(model) == 0
    model.v_proj = layers(rows=(16,), **base)[0]
    assert share_inputs(model) == 1
    assert share_inputs(nn.Sequential(*layers())) == 0  # names say what is given the same input


def test_other_names():
    names = nn.ModuleDict(dict(zip(("gate_proj", "up_proj"), layers(rows=(8, 8)), strict=True)))
    experts = nn.ModuleDict(dict(zip(("w1", "w2", "w3"), layers(rows=(8, 300, 8)), strict=True)))
    assert share_inputs(nn.ModuleList([names, experts])) == 2
    assert experts["w1"].shared_input.layers == [experts["w1"], experts["w3"]]
    assert experts["w2"].shared_input is None
