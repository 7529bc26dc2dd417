"""LoRA on packed layers, through PEFT's and transformers' own interfaces; merging."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import outputs, save_tiny, text, tiny_tokenizer, tokens
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_arb import ARBConfig, ARBLinear, model_report

peft = pytest.importorskip("peft")

from optimum_arb.integrations.peft import (  # noqa: E402
    merge_dequantized,
    merge_rebinarized,
    prepare_for_training,
)

IDS = tokens(2, 12, seed=1)


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "GPT2LMHeadModel"])
def source(request, tmp_path_factory):
    """A packed model of linears, and one of GPT-2's transposed ones, with biases."""
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(path / "float", request.param)
    config = ARBConfig(dataset=tokens(), num_samples=4, block_size=64)
    AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=config).save_pretrained(path / "packed")
    tiny_tokenizer().save_pretrained(path / "packed")
    return path / "packed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_tiny(path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=None, block_size=64, modules_to_not_convert=["layers.0.self_attn.q_proj"])
    AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=config).save_pretrained(path / "packed")
    return path / "packed"


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def randomize(model, seed: int = 0, std: float = 0.1) -> None:
    """Adapters that change something: PEFT begins with those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std, generator=generator)


def packed_tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": parameter.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, ARBLinear)
        for key, parameter in module.named_parameters(recurse=False)
    }


def checkpointed(model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


class Steps(torch.utils.data.Dataset):
    def __init__(self):
        self.data = tokens(1, 12, seed=3).expand(16, 12)  # one sequence, so that few steps show progress

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {"input_ids": self.data[index], "labels": self.data[index]}


def train(model, directory, checkpointing: bool = True, steps: int = 4) -> list[float]:
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Steps())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [None, True])
def test_trainer_with_checkpointing_then_save_and_load(source, tmp_path, reentrant):
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    base = prepare_for_training(load(source), gradient_checkpointing_kwargs=kwargs)
    model = peft.get_peft_model(base, lora())
    before = packed_tensors(model)
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()) == len(before_modules(before))
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in packed_tensors(model).items())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
    model.eval()
    expected = outputs(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    again = peft.PeftModel.from_pretrained(load(source), tmp_path / "adapter")
    assert torch.equal(outputs(again, IDS), expected)
    assert not torch.equal(outputs(load(source), IDS), expected)
    # transformers loads an adapter by itself too
    plain = load(source)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(plain, IDS), expected)


def before_modules(names) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def test_checkpointing_does_not_change_the_gradient(source):
    gradients = []
    for checkpointing in (False, True):
        model = peft.get_peft_model(prepare_for_training(load(source), checkpointing), lora())
        randomize(model)
        model.train()
        if checkpointing:
            assert checkpointed(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_the_dequantized_model(llama):
    packed, plain = load(llama), load(llama).dequantize()
    results = []
    for base in (packed, plain):
        model = peft.get_peft_model(base, lora())
        randomize(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-6)


def test_add_adapter_and_trainer_without_get_peft_model(source, tmp_path):
    model = prepare_for_training(load(source))
    model.add_adapter(lora())
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]
    model.eval()
    expected = outputs(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    assert {f.name for f in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load(source)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(again, IDS), expected)


def test_several_adapters(llama, tmp_path):
    base = outputs(load(llama), IDS)
    model = peft.get_peft_model(load(llama), lora(), adapter_name="first")
    model.add_adapter("second", lora(r=2, target_modules=["q_proj", "down_proj"], use_rslora=True))
    randomize(model)
    results = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        results[name] = outputs(model, IDS)
    assert not torch.equal(results["first"], results["second"])
    with model.disable_adapter():
        assert torch.equal(outputs(model, IDS), base)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(llama), tmp_path / "first", adapter_name="first")
    again.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first"):
        again.set_adapter(name)
        assert torch.equal(outputs(again, IDS), results[name])
    again.add_weighted_adapter(["first"], [0.5], "scaled", combination_type="linear")
    again.set_adapter("scaled")
    assert not torch.equal(outputs(again, IDS), results["first"])
    again.delete_adapter("scaled")
    again.set_adapter("first")
    again.eval()
    mixed = again(input_ids=IDS, adapter_names=["first", "second"]).logits.detach()
    torch.testing.assert_close(mixed[0], results["first"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], results["second"][1], rtol=1e-4, atol=1e-5)
    unloaded = again.unload()
    assert torch.equal(outputs(unloaded, IDS), base)


def test_generation_with_an_adapter(llama):
    model = peft.get_peft_model(load(llama), lora()).eval()
    randomize(model)
    generated = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    static = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(generated, static)


def test_adapters_on_a_model_in_half_precision(llama):
    model = peft.get_peft_model(load(llama, dtype=torch.bfloat16), lora())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"q_proj: DoRA \(use_dora\) needs the float weight.*model\.dequantize\(\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' needs the float weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' needs the float weight"),
    ],
)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "second"])
def test_what_needs_the_float_weight_is_refused(source, changes, message, how):
    model = load(source)
    if "GPT2" in type(model).__name__:
        message = message.replace("q_proj", "c_attn")
    if how == "second":
        wrapped = peft.get_peft_model(model, lora())
        with pytest.raises(ValueError, match=message):
            wrapped.add_adapter("other", lora(**changes))
        return
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, lora(**changes)) if how == "get_peft_model" else model.add_adapter(lora(**changes))
    if how == "get_peft_model":
        assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())


def test_dora_works_on_the_dequantized_model(llama):
    model = peft.get_peft_model(load(llama).dequantize(), lora(use_dora=True))
    assert torch.isfinite(outputs(model, IDS)).all()


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "safe"])
def test_merging_into_packed_bits_is_refused_before_anything_is_merged(llama, how):
    """The first layer is a float one: PEFT alone would have merged it before it failed at the second."""
    model = peft.get_peft_model(load(llama), lora())
    randomize(model)
    expected = outputs(model, IDS)
    with pytest.raises(ValueError, match=r"merge_dequantized\(model\).*merge_rebinarized\(model\)"):
        model.merge_and_unload(safe_merge=True) if how == "safe" else getattr(model, how)()
    assert torch.equal(outputs(model, IDS), expected)


def test_adapters_that_multiply_the_weight_are_not_merged_either(llama):
    config = peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(load(llama), config)
    before = packed_tensors(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    expected = outputs(model, IDS)
    assert not torch.equal(expected, outputs(load(llama), IDS))
    with pytest.raises(ValueError, match="merge_dequantized"):
        model.merge_and_unload()
    assert all(torch.equal(before[name], tensor) for name, tensor in packed_tensors(model).items())
    torch.testing.assert_close(outputs(merge_dequantized(model), IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["peft first", "optimum_arb first"])
def test_the_errors_do_not_depend_on_the_order_of_imports(llama, order):
    imports = ["import peft, peft.tuners.lora", "import optimum_arb"]
    script = "\n".join(
        [
            *(imports if order == "peft first" else reversed(imports)),
            "import sys",
            "from transformers import AutoModelForCausalLM",
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])",
            "config = peft.LoraConfig(target_modules='all-linear', use_dora=True)",
            "try: peft.get_peft_model(model, config)",
            "except ValueError as error: print(error)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", script, str(llama)], capture_output=True, text=True, check=True)
    assert "DoRA" in result.stdout


def adapted(path, how: str):
    """A model with a random adapter: PEFT's wrapper, or transformers' own model."""
    model = load(path)
    if how == "get_peft_model":
        model = peft.get_peft_model(model, lora())
    else:
        model.add_adapter(lora())
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_merge_dequantized_is_exact(source, tmp_path, how):
    model = adapted(source, how)
    expected = outputs(model, IDS)
    merged = merge_dequantized(model)
    assert type(merged) is type(load(source))
    assert not any(isinstance(m, (ARBLinear, peft.tuners.tuners_utils.BaseTunerLayer)) for m in merged.modules())
    torch.testing.assert_close(outputs(merged, IDS), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(outputs(load(tmp_path), IDS), outputs(merged, IDS))


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("data", ["data-free", "tokens", "text"])
def test_merge_rebinarized(source, tmp_path, how, data):
    exact = outputs(merge_dequantized(adapted(source, how)), IDS)
    without = outputs(load(source), IDS)
    dataset = {"data-free": None, "tokens": tokens(32, 20), "text": [text(640)]}[data]
    model = adapted(source, how)
    merged, report = merge_rebinarized(model, dataset=dataset, num_samples=32, sequence_length=20)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in merged.modules())
    names = [name for name, module in merged.named_modules() if isinstance(module, ARBLinear)]
    assert [module.name for module in report.modules] == names
    assert report.calibrated == (data != "data-free")
    assert all(0 < module.error <= module.error_without_adapter for module in report.modules)
    assert any(module.rebinarized for module in report.modules)
    assert report.mean_error < report.mean_error_without_adapter
    assert f"{report.mean_error:.4f}" in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["calibrated"] == report.calibrated
    assert {m.name: m.output_error or m.weight_error for m in model_report(merged).modules} == {
        m.name: pytest.approx(m.error) for m in report.modules
    }
    result = outputs(merged, IDS)
    assert (result - exact).square().mean() < (without - exact).square().mean()
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(outputs(again, IDS), result)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["bits_per_weight"] == model_report(again).bits_per_weight
    assert saved["calibration"]["sequence_length"] == (24 if data == "data-free" else 20)


def test_merge_rebinarized_changes_nothing_where_the_adapter_does_not(source):
    model = peft.get_peft_model(load(source), lora())  # as PEFT makes it: B is zero
    expected = outputs(load(source), IDS)
    merged, report = merge_rebinarized(model)
    assert torch.equal(outputs(merged, IDS), expected)
    assert not any(module.rebinarized for module in report.modules)
    assert f"{len(report.modules)} layers stayed" in report.summary()


def test_float_layers_and_chosen_adapters_are_merged_too(llama):
    model = peft.get_peft_model(load(llama), lora(), adapter_name="first")
    model.add_adapter("second", lora(modules_to_save=["lm_head"]))
    randomize(model)
    model.set_adapter("second")
    expected = outputs(model, IDS)
    model.set_adapter("first")
    torch.testing.assert_close(
        outputs(merge_dequantized(model, adapter_names="second"), IDS), expected, rtol=1e-4, atol=1e-4
    )
    model = peft.get_peft_model(load(llama), lora(target_modules=["q_proj", "lm_head"]))
    randomize(model)
    deltas = [m.get_delta_weight("default") for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    merged, report = merge_rebinarized(model)
    assert [module.name for module in report.modules] == ["model.layers.1.self_attn.q_proj"]
    original = load(llama)
    torch.testing.assert_close(
        merged.model.layers[0].self_attn.q_proj.weight,
        original.model.layers[0].self_attn.q_proj.weight + deltas[0],
    )
    torch.testing.assert_close(merged.lm_head.weight, original.lm_head.weight + deltas[-1])


def test_errors_of_merging(llama):
    with pytest.raises(ValueError, match="has no adapter to merge"):
        merge_dequantized(load(llama))
    with pytest.raises(ValueError, match="has no adapter to merge"):
        merge_rebinarized(load(llama))
    model = peft.get_peft_model(load(llama), lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="No packed layer has an adapter"):
        merge_rebinarized(model)
    with pytest.raises(ValueError, match="no adapter 'other': the model has default"):
        merge_rebinarized(model, adapter_names="other")
    prompt = peft.get_peft_model(load(llama), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="learned prompt"):
        merge_dequantized(prompt)
    multiplied = peft.get_peft_model(load(llama), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="only plain LoRA"):
        merge_rebinarized(multiplied)


def test_prepare_for_training(source):
    model = load(source, dtype=torch.float16)
    before = packed_tensors(model)
    assert prepare_for_training(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    after = packed_tensors(model)
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    others = [p for m in model.modules() if not isinstance(m, ARBLinear) for p in m.parameters(recurse=False)]
    assert {p.dtype for p in others} == {torch.float32}
    assert checkpointed(model)
    assert torch.isfinite(outputs(model, IDS)).all()
    half = prepare_for_training(load(source, dtype=torch.float16), gradient_checkpointing=False, float32=False)
    assert half.dtype == torch.float16
    assert not checkpointed(half)


def test_prepare_for_training_refuses(llama, tmp_path):
    with pytest.raises(ValueError, match="no binarized module"):
        prepare_for_training(transformers.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path, "LlamaForCausalLM")))
    model = peft.get_peft_model(load(llama), lora())
    with pytest.raises(ValueError, match="adapters already"):
        prepare_for_training(model)
