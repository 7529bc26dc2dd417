"""Layers of one input that compute together: the object that holds their results, on a CPU, where it is not used."""

import copy
import gc
import io
import sys
import threading
import types
import weakref

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from packed_weights import random_binarized, random_packed, relative_error
from tiny_models import tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.layout import all_layouts, planes_layout
from optimum_arb.nn import ARBLinear, share_inputs
from optimum_arb.nn import shared_input as module
from optimum_arb.nn.shared_input import SharedInput, prepare_layer
from optimum_arb.ops.backends import triton
from optimum_arb.ops.shared_input import packed_weights, split_results
from optimum_arb.packing import TENSOR_NAMES

LAYOUTS = {layout.name: layout for layout in all_layouts()}
ROWS = (42, 7, 16)


def layers(name="planes-2-col", rows=ROWS, columns=300, bias=False, **choices) -> list[ARBLinear]:
    found = []
    for seed, count in enumerate(rows):
        weight = random_binarized(LAYOUTS[name], count, columns, seed=seed, **choices)
        found.append(ARBLinear.from_binarized(weight, torch.randn(count) if bias else None))
    return found


def shared(found: list[ARBLinear]) -> SharedInput:
    result = SharedInput(found)
    for index, layer in enumerate(found):
        layer.shared_input, layer.shared_index = result, index
    return result


@pytest.mark.parametrize("shape", [(300,), (1, 300), (2, 1, 300), (3, 300), (0, 300)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["planes-1", "planes-2-col", "groups-all-salient-col"])
def test_the_same_as_each_alone(name, bias, shape):
    found = layers(name, bias=bias, permuted=True)
    together = shared(found)
    x = torch.randn(shape)
    for count in (3, 2, 3):
        for layer in found if count == 3 else reversed(found):  # in any order
            result = together.output(layer, x)
            assert result is not None
            assert result.is_contiguous()
            assert torch.equal(result, layer(x))
    assert together.enabled


def test_computed_once():
    found = layers()
    together = shared(found)
    times = []
    compute = together._compute
    together._compute = lambda *args: times.append(1) or compute(*args)
    for _ in range(2):
        x = torch.randn(1, 300)
        for layer in found:
            together.output(layer, x)
    assert len(times) == 2


def test_nothing_is_kept_when_all_have_theirs():
    found = layers()
    together = shared(found)
    x = torch.randn(1, 300)
    kept = weakref.ref(x)
    results = [together.output(layer, x) for layer in found]
    assert not together._waiting
    kept_result = weakref.ref(results[0])
    del x, results
    gc.collect()
    assert kept() is None
    assert kept_result() is None


def test_a_second_question_is_answered_by_the_layer():
    found = layers()
    together = shared(found)
    x = torch.randn(1, 300)
    assert together.output(found[0], x) is not None
    assert together.output(found[0], x) is None
    assert together.output(found[1], x) is not None
    assert together.output(found[2], x) is not None
    assert together.enabled


def test_cross_attention_disables():
    """Key and value of another input than the query: each computes its own, from then on, and by a copy of its own."""
    found = layers()
    together = shared(found)
    for layer in found:
        layer._looked = True
    x, memory = torch.randn(1, 300), torch.randn(1, 300)
    assert torch.equal(together.output(found[0], x), found[0](x))
    assert together.output(found[1], memory) is None
    assert not together.enabled
    assert not together._waiting
    assert not any(layer._looked for layer in found)


def test_a_call_that_an_error_ended_is_forgotten():
    found = layers()
    together = shared(found)
    together.output(found[0], torch.randn(1, 300))
    x = torch.randn(1, 300)
    for layer in found:
        assert torch.equal(together.output(layer, x), layer(x))
    assert together.enabled
    assert not together._waiting


def test_layers_and_the_object_end_together():
    """Without the collector of cycles."""
    found = layers()
    together = shared(found)
    together.output(found[0], torch.randn(1, 300))
    ends = [weakref.ref(together), *(weakref.ref(layer) for layer in found)]
    gc.disable()
    try:
        del together, found
        assert [end() for end in ends] == [None] * 4
    finally:
        gc.enable()


def test_a_layer_that_was_replaced():
    found = layers()
    together = shared(found)
    del found[1]
    assert together.output(found[0], torch.randn(1, 300)) is None
    assert not together.enabled
    assert len(together.layers) == 2


def test_threads_do_not_meet():
    """Each between two layers when the other comes: results are of the thread's own input, and sharing goes on."""
    found = layers(bias=True)
    together = shared(found)
    barrier = threading.Barrier(4)
    failures = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(1, 300, generator=generator)
            for layer in found:
                barrier.wait(10)
                result = together.output(layer, x)
                if result is None or not torch.equal(result, layer(x)):
                    failures.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert together.enabled
    assert not together._waiting


def test_equal_values_are_not_the_same_input():
    found = layers()
    together = shared(found)
    x = torch.randn(1, 300)
    together.output(found[0], x)
    assert together.output(found[1], x.clone()) is None


def test_changed_tensors_are_forgotten():
    """What was computed before one of the layers got another weight is not handed out after."""
    found = layers()
    together = shared(found)
    together._prepared = object()
    x = torch.randn(1, 300)
    found[1].weight_row_scale = nn.Parameter(found[1].weight_row_scale * 2, requires_grad=False)
    assert together._prepared is None
    together.output(found[0], x)
    found[1].load_state_dict(layers(rows=(7,))[0].state_dict())
    assert not together._waiting
    assert torch.equal(together.output(found[1], x), found[1](x))
    found[2].to(torch.bfloat16)
    assert not together._waiting


class Attention(nn.Module):
    """Three layers that go through the object as they do on a GPU."""

    def __init__(self, found: list[ARBLinear]):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = found

    def ask(self, layer: ARBLinear, x: torch.Tensor) -> torch.Tensor:
        together = layer.shared_input
        if together is not None and together.enabled:
            out = together.output(layer, x)
            if out is not None:
                return out
        return layer(x)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        q, k, v = self.ask(self.q_proj, x), self.ask(self.k_proj, memory), self.ask(self.v_proj, memory)
        return torch.cat([q * 2, k, v.tanh()], -1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend):
    torch.compiler.reset()
    model = Attention(layers(bias=True, permuted=True))
    inputs = torch.randn(4, 2, 1, 300).unbind()
    expected = [model(x) for x in inputs]
    assert share_inputs(model) == 1
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(compiled(x), wanted)
    together = model.q_proj.shared_input
    assert together.enabled
    assert together._traced is None
    assert not together._waiting


def test_cross_attention_compiles():
    torch.compiler.reset()
    model = Attention(layers())
    x, memory = torch.randn(2, 1, 300)
    expected = model(x, memory)
    share_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x, memory), expected)
    assert not model.q_proj.shared_input.enabled


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


# Which layers


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


# What is prepared on a GPU, with a kernel that is made up


@pytest.fixture
def prepare(monkeypatch):
    """The weights that copies were asked for, by their rows."""
    asked: list[list[int]] = []
    made = types.SimpleNamespace(rows=0, most_tokens=8)
    fake = types.ModuleType("dispatch")
    fake.prepare = lambda weights: asked.append([packed.out_features for packed in weights]) or made
    monkeypatch.setitem(sys.modules, f"{triton.__name__}.dispatch", fake)
    monkeypatch.setattr(triton, "dispatch", fake, raising=False)
    monkeypatch.setattr(module, "has_one_bit_kernel", lambda device: device.type == "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def test_one_copy_for_all(prepare):
    found = layers()
    together = shared(found)
    assert prepare_layer(found[0]) is None  # it has none of its own
    assert together._prepared is not None
    assert prepare == [[42, 7, 16]]
    x = torch.randn(8, 300).half()
    with torch.no_grad():
        assert found[1]._few_tokens(x)
        assert not found[1]._few_tokens(torch.cat([x, x]))
    del prepare[1:]
    together.enabled = False
    assert prepare_layer(found[0]) is not None
    assert prepare[1:] == [[42]]


def test_offloaded_layers_have_copies_of_their_own(prepare):
    """Only the layer that is about to run is on the GPU; the others are on the meta device."""
    found = layers()
    together = shared(found)
    found[1].to("meta")
    assert prepare_layer(found[0]) is not None
    assert not together.enabled
    assert prepare == [[42]]
    assert prepare_layer(found[1]) is None


def test_nothing_of_an_offloaded_layer_stays_on_the_gpu(prepare):
    found = layers()
    together = shared(found)
    for layer in found:
        cpu_offload(layer, execution_device="cpu")
    assert prepare_layer(found[0]) is None
    assert not prepare
    remove_hook_from_module(found[0])
    add_hook_to_module(found[0], SequentialHook(ModelHook(), AlignDevicesHook("cpu", offload=True)))
    assert prepare_layer(found[0]) is None
    remove_hook_from_module(found[0])
    assert prepare_layer(found[0]) is not None  # the others are still offloaded
    assert not together.enabled
    assert prepare == [[42]]


def test_few_tokens_of_a_layer(prepare):
    found = layers(rows=(42,), bias=True)[0].requires_grad_(False)
    x = torch.randn(1, 300)
    cases = [
        (x.half(), True),
        (x.bfloat16(), True),
        (x, False),
        (torch.randn(2, 2, 300).half(), True),
        (torch.randn(8, 300).half(), True),  # as the copy says
        (torch.randn(9, 300).half(), False),
        (torch.randn(0, 300).half(), False),
        (torch.randn(2, 1, 150).half(), False),  # the operator says what is wrong with it
        (x.half().requires_grad_(), False),
    ]
    for given, few in cases:
        assert found._few_tokens(given) == few, given.shape
    with torch.no_grad():
        assert found._few_tokens(x.half().requires_grad_())
    found.bias.requires_grad_()
    assert not found._few_tokens(x.half())  # its gradient would be lost
    with torch.no_grad():
        assert found._few_tokens(x.half())
    found.backend = "triton:batch-invariant"
    with torch.no_grad():
        assert not found._few_tokens(x.half())


def test_prepared_before_the_first_call(prepare):
    """As for code that compiles the first call."""
    found = layers(rows=(42,))[0]
    found.prepare()
    assert prepare == [[42]]
    with torch.no_grad():
        assert found._few_tokens(torch.randn(8, 300).half())
    assert prepare == [[42]]


# The operator


def operands(weights, bias=None, backend="auto") -> tuple:
    lists = [[getattr(w, name) for w in weights if getattr(w, name) is not None] for name in TENSOR_NAMES]
    return (*lists, bias, weights[0].layout.name, weights[0].block_size, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["planes-1", "planes-2-col", "groups-all-salient-mean"])
def test_opcheck(name, dtype):
    weights = [random_packed(LAYOUTS[name], rows, 200, permuted=True, seed=rows) for rows in ROWS]
    for x, bias in ((torch.randn(1, 200), None), (torch.randn(2, 1, 200), torch.randn(sum(ROWS)).to(dtype))):
        torch.library.opcheck(
            torch.ops.optimum_arb.shared_input_linear.default, (x.to(dtype), *operands(weights, bias))
        )


def test_results_one_after_another():
    weights = [random_packed(planes_layout(2, col_scale=True), rows, 200, seed=rows) for rows in ROWS]
    x, bias = torch.randn(2, 2, 200), torch.randn(sum(ROWS))
    out = torch.ops.optimum_arb.shared_input_linear(x, *operands(weights, bias))
    assert out.shape == (4 * sum(ROWS),)
    results = split_results(out, x.shape[:-1], ROWS)
    for part, packed, added in zip(results, weights, bias.split(ROWS), strict=True):
        assert part.shape == (2, 2, packed.out_features)
        assert part.is_contiguous()
        expected = x.double() @ packed.unpack().dequantize(torch.float64).T + added
        assert relative_error(part, expected) < 2e-6


def test_lists_of_tensors_and_weights():
    """Of a layout with all seven kinds and of one with two: a kind that is not there is an empty list."""
    for name in ("groups-all-salient-col", "planes-1"):
        weights = [random_packed(LAYOUTS[name], rows, 200, permuted=name != "planes-1") for rows in ROWS]
        lists = operands(weights)[: len(TENSOR_NAMES)]
        assert all(len(tensors) in (0, 3) for tensors in lists)
        assert [len(tensors) for tensors in lists].count(0) == (0 if name != "planes-1" else 5)
        assert packed_weights(200, name, 128, *lists) == weights


def test_bad_arguments():
    weights = [random_packed(planes_layout(1), rows, 128) for rows in ROWS]
    x = torch.randn(1, 128)
    call = torch.ops.optimum_arb.shared_input_linear
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        call(x, *operands(weights, backend="fast"))
    with pytest.raises(ValueError, match=r"backend='triton' does not run on cpu: it needs Triton and a GPU"):
        call(x, *operands(weights, backend="triton"))
    for backend in ("cpu:batch-invariant", "reference:batch-invariant", "auto:batch-invariant"):
        with pytest.raises(ValueError, match=rf"backend='{backend}' is a choice of the GPU kernels.*are on cpu"):
            call(x, *operands(weights, backend=backend))
    with pytest.raises(ValueError, match="does not run on cpu"):
        call(x, *operands(weights, backend="triton:batch-invariant"))
    with pytest.raises(ValueError, match=r"input has 256 features.*needs torch.uint8 \[out_features, 32\]"):
        call(torch.randn(1, 256), *operands(weights))
