"""What a finished submodule put out is kept: no bit changes, what runs how often, and what is kept."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from stacked_layers import Stack
from tiny_experts import tiny_moe
from tiny_models import save_tiny, tiny_model, tokens
from torch import nn

from optimum_arb import ARBConfig, quantize_checkpoint
from optimum_arb.calibration import CalibrationWalk, reuse, steps, token_batches
from optimum_arb.calibration.reading import LAYER_INPUT, Step
from optimum_arb.calibration.reuse import KEPT_HIDDEN, LARGEST, Outputs, Reuse, Settled, worth_keeping
from optimum_arb.conversion import binarize_linear
from optimum_arb.modules import select_modules

CPU = torch.device("cpu")
CONFIG = ARBConfig(block_size=64, admm_iterations=0, refinement_sweeps=1)
DENSE = ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "PhiForCausalLM", "Gemma2ForCausalLM"]
OTHERS = ["OPTForCausalLM", "Qwen3ForCausalLM", "BertModel"]
EXPERTS = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"]


def signs_of(name, module, hessian, tokens):
    """A quick stand-in for binarization: a copy, since the float layer shares the parameters."""
    result = copy.deepcopy(module)
    weight = result.weight.detach().float()
    result.weight = nn.Parameter(weight.sign() * weight.abs().mean(), requires_grad=False)
    return result, None


def packed(name, module, hessian, tokens):
    result, record = binarize_linear(name, module, CONFIG, hessian, tokens)
    return result, record.output_error


def walk(model, binarize=signs_of, *, targets=None, batches=None, threads=1, **options):
    """Returns the matrices, and what else linears and experts were fitted to, by name."""
    found = {}
    dtype = next(model.parameters()).dtype

    def fit(name, module, hessian, count):
        found[name] = hessian.clone(), module.weight.detach().clone()
        result, error = binarize(name, module, hessian, count)
        return result.to(dtype), error  # weights to fit are of float32

    def fit_experts(name, module, routed):
        found[name] = tuple(tensor.clone() for tensor in routed.gathered())
        return module, []

    targets = targets or select_modules(model, CONFIG).modules()
    batches = token_batches(tokens(6), 2) if batches is None else batches
    options = {"error_correction": 0.75, "binarize_experts": fit_experts, "held_out": 1, **options}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        CalibrationWalk(model, targets, fit, batches, **options).run()
    finally:
        torch.set_num_threads(before)
    return found


def without(monkeypatch):
    """Layers run as if nothing could be kept."""
    monkeypatch.setattr(steps, "worth_keeping", lambda *args: [])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in found.items():
        for tensor, other in zip(tensors, expected[name], strict=True):
            assert torch.equal(tensor, other), name


@pytest.mark.parametrize("family", [*DENSE, *OTHERS, *EXPERTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_changes(family, dtype, monkeypatch):
    def model():
        return (tiny_moe if family in EXPERTS else tiny_model)(family).to(dtype)

    found = walk(model())
    without(monkeypatch)
    assert_same(found, walk(model()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_bit_of_a_packed_layer_changes(dtype, monkeypatch):
    """With the packed product, and two threads."""
    found = walk(tiny_model("LlamaForCausalLM").to(dtype), packed, threads=2)
    without(monkeypatch)
    assert_same(found, walk(tiny_model("LlamaForCausalLM").to(dtype), packed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_changes_on_a_gpu(family, dtype, monkeypatch):
    """What is kept lies in page-locked memory."""
    device = torch.accelerator.current_accelerator()
    choose = steps.worth_keeping
    kept = []
    monkeypatch.setattr(steps, "worth_keeping", lambda *args: kept.extend(found := choose(*args)) or found)
    found = walk(tiny_model(family).to(dtype), packed, device=device)
    assert any(each.linear is not None for each in kept)
    without(monkeypatch)
    assert_same(found, walk(tiny_model(family).to(dtype), packed, device=device))


def test_no_bit_changes_where_a_layer_is_changed_after_its_fit(monkeypatch):
    """What `after_layer` does to a layer, the next one sees: what was kept before is not used."""

    def zero(turn):
        for name in turn.targets:
            turn.layer.get_submodule(name.removeprefix(f"{turn.name}.")).weight.zero_()

    found = walk(tiny_model("LlamaForCausalLM"), after_layer=zero)
    without(monkeypatch)
    assert_same(found, walk(tiny_model("LlamaForCausalLM"), after_layer=zero))


class Sometimes(nn.Module):
    """A layer with a branch that only some batches take, as old mixtures of experts have, and one that has a norm
    behind its last linear."""

    def __init__(self):
        super().__init__()
        self.first, self.branch, self.last = (
            nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(3)
        )
        self.normed = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.behind = nn.Linear(8, 8)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.first(hidden_states)
        if float(hidden_states[0, 0, 0]) > 0:
            hidden_states = hidden_states + self.branch(hidden_states)
        hidden_states = hidden_states + self.normed(hidden_states)
        hidden_states = hidden_states + self.last(hidden_states)
        return hidden_states + self.behind(hidden_states)


def test_submodules_that_only_some_batches_reach(monkeypatch):
    batches = token_batches(tokens(16, 6), 1)

    def model():
        made = Stack(Sometimes, 2)
        with torch.no_grad():
            # every other token, that of the first batch among them, leads to the branch
            made.embed.weight[:, 0] = torch.where((torch.arange(96) - batches[0][0, 0]) % 2 == 0, 20.0, -20.0)
        return made

    targets = [name for name, module in model().named_modules() if isinstance(module, nn.Linear)]
    starts = [model().embed.weight[batch[0, 0], 0].item() > 0 for batch in batches]
    assert starts[0]
    assert 3 < sum(starts) < 13
    chosen = []
    monkeypatch.setattr(steps, "worth_keeping", lambda *args: chosen.append(worth_keeping(*args)) or chosen[-1])
    found = walk(model(), targets=targets, batches=batches)
    assert [each.name for each in chosen[1]] == ["first", "branch", "last", "normed"]
    assert [each.linear for each in chosen[1]] == ["first.2", "branch.2", "last.2", None]
    without(monkeypatch)
    assert_same(found, walk(model(), targets=targets, batches=batches))


# How often what runs


def counted(family, names, **options):
    """How often modules of the first layer run with the batches of the walk: their runs less the two that only look."""
    model = tiny_model(family)
    counts = Counter()
    for name in names:
        model.model.layers[0].get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: counts.update([name])
        )
    walk(model, **options)
    return [counts[name] - 2 for name in names]


NAMES = ["self_attn.q_norm", "mlp.act_fn", "post_attention_layernorm"]


def test_attention_and_the_mlp_run_once_in_each_form_of_a_layer(monkeypatch):
    """Of three batches, one held out. The norm, which is not kept, runs for gate and up in both forms but for the
    held out batch in the float one; for down in both; and for the next layer's inputs."""
    assert counted("Qwen3ForCausalLM", NAMES) == [6, 6, 3 + 2 + 3 + 3 + 3]
    without(monkeypatch)
    assert counted("Qwen3ForCausalLM", NAMES)[:2] == [3 * 3 + 2 + 2 + 3 + 3, 9]


def test_the_mlp_runs_once_more_where_its_input_is_not_kept(monkeypatch):
    monkeypatch.setattr(reuse, "LARGEST", 0)
    monkeypatch.setattr(reuse, "KEPT_HIDDEN", 1)
    assert counted("Qwen3ForCausalLM", NAMES)[:2] == [6, 9]


def test_nothing_is_kept_where_a_layer_is_yet_to_be_changed():
    assert counted("Qwen3ForCausalLM", NAMES, after_layer=lambda turn: None)[:2] == [6 + 3, 9]


# What is kept


def test_what_is_kept_at_most(monkeypatch):
    """The output of attention of both forms, and the input of down of the binarized one; in the end nothing."""
    held = Counter()
    most = Counter()
    every = []
    keep = Reuse.keep

    def watched(self, *args):
        keep(self, *args)
        if self not in every:
            every.append(self)
        for name, kept in self._kept.items():
            held[self, name] = sum(kept[batch].nbytes for batch in range(len(kept)))
        most[self] = max(most[self], sum(size for (form, _), size in held.items() if form is self))

    monkeypatch.setattr(Reuse, "keep", watched)
    walk(tiny_model("LlamaForCausalLM"), held_out=0)
    states = 6 * 24 * 96 * 4
    assert [most[form] for form in every] == [states, states + 6 * 24 * 160 * 4, states, states]
    assert all(len(kept) == 0 for form in every for kept in form._kept.values())


def test_nothing_is_kept_beside_hidden_states_in_files(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(steps, "worth_keeping", lambda settled, *args: seen.append(settled) or [])
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(4), block_size=64, admm_iterations=0, refinement_sweeps=0)
    quantize_checkpoint(tmp_path / "float", tmp_path / "a", config, activations_on_disk=True)
    assert seen == [[]] * 4
    quantize_checkpoint(tmp_path / "float", tmp_path / "b", config)
    assert [each.name for each in seen[-1]] == ["self_attn", "mlp"]


def test_memory_decides(monkeypatch):
    monkeypatch.setattr(reuse, "free_on", lambda device: 0)
    attention, mlp = Settled("attention", 2, "o", None, 100), Settled("mlp", 4, "down", None, 300)
    assert KEPT_HIDDEN * 100 < 300 < LARGEST // 10

    def names(settled, runs=5, hidden=100, batches=10, device=CPU):
        return [(each.name, each.until) for each in worth_keeping(settled, runs, hidden, batches, device)]

    assert names([attention, mlp]) == [("attention", 5), ("mlp", 5)]
    assert names([attention, mlp], runs=4) == [("attention", 4)]  # nothing runs behind the last step
    assert names([attention, mlp], batches=LARGEST // 300) == [("attention", 5), ("mlp", 5)]
    assert names([attention, mlp], batches=LARGEST // 300 + 1) == [("attention", 5)]
    assert names([attention, mlp], device=torch.device("cuda")) == [("attention", 5)]
    assert names([attention, mlp], hidden=200, device=torch.device("cuda")) == [("attention", 5), ("mlp", 5)]


def test_a_gpu_keeps_large_inputs_where_they_are_as_far_as_there_is_room(monkeypatch):
    attention, mlp = Settled("attention", 2, "o", None, 100), Settled("mlp", 4, "down", None, 300)

    def on_device(free, batches=10):
        monkeypatch.setattr(reuse, "free_on", lambda device: free)
        found = worth_keeping([attention, mlp], 5, 100, batches, torch.device("cuda"))
        return {each.name: each.on_device for each in found}

    assert on_device(4 * 3000) == {"attention": False, "mlp": True}
    assert on_device(4 * 3000 - 1) == {"attention": False}
    assert on_device(1 << 60, reuse.LARGEST_ON_GPU // 300) == {"attention": False, "mlp": True}
    assert on_device(1 << 60, reuse.LARGEST_ON_GPU // 300 + 1) == {"attention": False}


def test_only_what_saves_a_run_is_kept():
    def names(*settled):
        return [(each.name, each.until) for each in worth_keeping(settled, 5, 10, 1, CPU)]

    outer = Settled("block", 4, "block.down", None, 1)
    assert names(outer, Settled("block.attention", 2, "block.attention.o", None, 1)) == [
        ("block", 5),
        ("block.attention", 4),
    ]
    assert names(outer, Settled("block.mlp", 4, "block.down", None, 1)) == [("block", 5)]
    # without a linear that it puts out, it has to run once more itself
    assert names(Settled("attention", 3, None, None, 1)) == [("attention", 5)]
    assert names(Settled("attention", 4, None, None, 1)) == []


class Layer(nn.Module):
    """A submodule between two linears that ends as it is told to."""

    def __init__(self, form):
        super().__init__()
        self.inner = Inner(form)
        self.after = nn.Linear(8, 8)
        self.form = form

    def forward(self, hidden_states):
        out = self.inner(hidden_states)
        if self.form == "twice":
            out = self.inner(out)
        if isinstance(out, tuple):
            out = out[0]
        if self.form == "written":
            out += hidden_states
        return self.after(out)


class Inner(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.form = form

    def forward(self, hidden_states):
        out = self.linear(hidden_states)
        if self.form == "normed":
            return self.norm(out)
        if self.form == "turned":
            return out.transpose(1, 2).contiguous().transpose(1, 2)
        return {"pair": (out, None), "two": (out, out + 1), "named": {"out": out}}.get(self.form, out)


SETTLED = {
    "plain": ("inner.linear", None),
    "pair": ("inner.linear", (None, None)),
    "normed": (None, None),
    "two": "not",
    "written": "not",
    "twice": "not",
    "turned": "not",
    "stream": "not",
}


@pytest.mark.parametrize("form", SETTLED)
def test_what_settles(form):
    """One tensor by itself or in front of nothing else, of one run, that nothing writes into."""
    layer = Layer(form)
    names = ["inner.linear", "after"]
    residual = {"l.after": "inner.norm"} if form == "stream" else {"l.after": LAYER_INPUT}
    with torch.no_grad(), Outputs(layer, names) as outputs:
        layer(torch.randn(2, 3, 8))
    found = outputs.settled("l", [Step(["l.inner.linear"]), Step(["l.after"], residual)])
    if SETTLED[form] == "not":
        assert found == []
    else:
        linear, parts = SETTLED[form]
        assert found == [Settled("inner", 1, linear, parts, 2 * 3 * 8 * 4)]
    assert not any(module._forward_hooks for module in layer.modules())
