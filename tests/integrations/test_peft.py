"""LoRA on packed layers, through PEFT's and transformers' own interfaces."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tokens
from torch import nn
from transformers import Trainer, TrainingArguments

from optimum_arb import ARBConfig, ARBLinear

peft = pytest.importorskip("peft")

from adapters import IDS, load, lora, packed_tensors, randomize  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402

from optimum_arb.integrations.peft import prepare_for_training  # noqa: E402
from optimum_arb.integrations.peft_lora import _READ_THE_WEIGHT  # noqa: E402


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
def test_trainer_with_checkpointing_then_save_and_load(packed_family, tmp_path, reentrant):
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    base = prepare_for_training(load(packed_family), gradient_checkpointing_kwargs=kwargs)
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
    again = peft.PeftModel.from_pretrained(load(packed_family), tmp_path / "adapter")
    assert torch.equal(outputs(again, IDS), expected)
    assert not torch.equal(outputs(load(packed_family), IDS), expected)
    # transformers loads an adapter by itself too
    plain = load(packed_family)
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(plain, IDS), expected)


def before_modules(names) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def test_checkpointing_does_not_change_the_gradient(packed_family):
    gradients = []
    for checkpointing in (False, True):
        model = peft.get_peft_model(prepare_for_training(load(packed_family), checkpointing), lora())
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


def test_gradients_are_those_of_the_dequantized_model(packed_llama):
    packed, plain = load(packed_llama), load(packed_llama).dequantize()
    results = []
    for base in (packed, plain):
        model = peft.get_peft_model(base, lora())
        randomize(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-6)


def test_add_adapter_and_trainer_without_get_peft_model(packed_family, tmp_path):
    model = prepare_for_training(load(packed_family))
    model.add_adapter(lora())
    losses = train(model, tmp_path)
    assert losses[-1] < losses[0]
    model.eval()
    expected = outputs(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    assert {f.name for f in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load(packed_family)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(again, IDS), expected)


def test_several_adapters(packed_llama, tmp_path):
    base = outputs(load(packed_llama), IDS)
    model = peft.get_peft_model(load(packed_llama), lora(), adapter_name="first")
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
    again = peft.PeftModel.from_pretrained(load(packed_llama), tmp_path / "first", adapter_name="first")
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


def test_generation_with_an_adapter(packed_llama):
    model = peft.get_peft_model(load(packed_llama), lora()).eval()
    randomize(model)
    generated = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    static = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(generated, static)


def test_adapters_on_a_model_in_half_precision(packed_llama):
    model = peft.get_peft_model(load(packed_llama, dtype=torch.bfloat16), lora())
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
def test_what_needs_the_float_weight_is_refused(packed_family, changes, message, how):
    model = load(packed_family)
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


# Adapters that take part without arguments of the user's own, or with these.
CHOICES = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 16},
    "C3A": {"block_size": 32},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "OFT": {"oft_block_size": 16},
    "ROAD": {"group_size": 32},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [int(IDS[0, 0])]},
    "VBLORA": {"num_vectors": 8, "vector_length": 32},
}
# LoRA is tested above, AdaMSS needs scikit-learn, the others are no layers around linears or LoRA's own.
OTHERS = {"ADAMSS", "LORA", "ADAPTION_PROMPT", "CPT", "POLY", "SHADOW", "XLORA"}
CONFIGS = {kind.value: config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
KINDS = sorted(k for k, c in CONFIGS.items() if "target_modules" in inspect.signature(c).parameters and k not in OTHERS)


def adapted(model, kind: str):
    """With adapters of a kind, all of them changed."""
    choices = CHOICES.get(kind, {})
    config = CONFIGS[kind](**{"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **choices})
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_does_what_it_does_on_the_float_model_or_is_refused(packed_whole, kind):
    if kind in _READ_THE_WEIGHT:
        with pytest.raises(ValueError, match=rf"(q|down)_proj: {kind} needs the float weight.*model\.dequantize\(\)"):
            adapted(load(packed_whole), kind)
        return
    model = adapted(load(packed_whole), kind)
    found, base = outputs(model, IDS), outputs(load(packed_whole), IDS)
    assert (found - base).abs().max() > 1e-4
    expected = outputs(adapted(load(packed_whole).dequantize(), kind), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_packed_parameters_are_refused(packed_llama, tmp_path):
    config = {"target_modules": [], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=r"down_proj.weight: .*target_parameters.*model\.dequantize\(\)"):
        peft.get_peft_model(load(packed_llama), peft.LoraConfig(target_parameters=["down_proj.weight"], **config))
    source = save_moe(tmp_path, "MixtralForCausalLM")
    model = load(source, quantization_config=ARBConfig(dataset=None, block_size=64))
    with pytest.raises(ValueError, match=r"experts.down_proj: .*target_parameters.*model\.dequantize\(\)"):
        peft.get_peft_model(model, peft.LoraConfig(target_parameters=["experts.down_proj"], **config))


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "second", "prompt"])
@pytest.mark.parametrize(
    ("module", "packed"),
    [("q_proj", "model.layers.1.self_attn.q_proj"), ("layers.0.mlp", "model.layers.0.mlp.gate_proj")],
)
def test_packed_modules_cannot_be_trained(packed_llama, module, packed, how):
    """PEFT said "only Tensors of floating point dtype can require gradients", half way through."""
    model = load(packed_llama)
    config = lora(target_modules=["v_proj", "q_proj", "gate_proj"], modules_to_save=["lm_head", module])
    message = rf"^(base_model\.model\.)?{packed}: modules_to_save=.* have no gradient.*target_modules.*dequantize\(\)"
    if module == "q_proj":  # that of layer 0 is in float, and as good as any
        peft.get_peft_model(load(packed_llama), lora(modules_to_save=["layers.0.self_attn.q_proj"]))
    if how == "second":
        model = peft.get_peft_model(model, lora())
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompt.modules_to_save = config.modules_to_save
    add = {
        "get_peft_model": lambda: peft.get_peft_model(model, config),
        "add_adapter": lambda: model.add_adapter(config),
        "second": lambda: model.add_adapter("other", config),
        "prompt": lambda: peft.get_peft_model(model, prompt),
    }
    with pytest.raises(ValueError, match=message):
        add[how]()
    assert not any(isinstance(m, ModulesToSaveWrapper) for m in model.modules())
    if how == "second":
        return
    wrapped = peft.get_peft_model(load(packed_llama).dequantize(), config)
    assert any(f"{module}.modules_to_save" in n for n, p in wrapped.named_parameters() if p.requires_grad)


def test_packed_experts_cannot_be_trained(tmp_path):
    source = save_moe(tmp_path, "MixtralForCausalLM")
    model = load(source, quantization_config=ARBConfig(dataset=None, block_size=64))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts: modules_to_save=\['experts'\] would train"):
        peft.get_peft_model(model, lora(target_modules=["q_proj"], modules_to_save=["experts"]))


def test_dora_works_on_the_dequantized_model(packed_llama):
    model = peft.get_peft_model(load(packed_llama).dequantize(), lora(use_dora=True))
    assert torch.isfinite(outputs(model, IDS)).all()


@pytest.mark.parametrize("order", ["peft first", "optimum_arb first"])
def test_the_errors_do_not_depend_on_the_order_of_imports(packed_llama, order):
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
    result = subprocess.run(
        [sys.executable, "-c", script, str(packed_llama)], capture_output=True, text=True, check=True
    )
    assert "DoRA" in result.stdout


def test_prepare_for_training(packed_family):
    model = load(packed_family, dtype=torch.float16)
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
    half = prepare_for_training(load(packed_family, dtype=torch.float16), gradient_checkpointing=False, float32=False)
    assert half.dtype == torch.float16
    assert not checkpointed(half)


def test_prepare_for_training_refuses(packed_llama, tmp_path):
    with pytest.raises(ValueError, match="no binarized module"):
        prepare_for_training(transformers.LlamaForCausalLM.from_pretrained(save_tiny(tmp_path, "LlamaForCausalLM")))
    model = peft.get_peft_model(load(packed_llama), lora())
    with pytest.raises(ValueError, match="adapters already"):
        prepare_for_training(model)
