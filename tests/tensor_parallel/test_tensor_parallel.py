"""Packed models divided over two processes, through transformers' own tensor parallelism (gloo on the CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from ranks import check, run_ranks
from safetensors.torch import load_file
from svd_factors import install
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tiny_model, tokens
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

from optimum_arb import ARBConfig
from optimum_arb.nn import ARBLinear
from optimum_arb.tensor_parallel.layers import prepare

needs_torch = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="tensor parallelism of transformers needs torch 2.7"
)

BIG = {"hidden_size": 256, "intermediate_size": 512}
DATA = tokens(8, 24)
DOWN = "model.layers.0.mlp.down_proj"
# name -> (family, changes of its sizes, ARBConfig, how down_proj of the first layer is divided: its shape on rank 1)
CASES = {
    # columns in order of activation: rows are divided, inputs gathered
    "permuted": ("LlamaForCausalLM", BIG, {"dataset": DATA, "act_order": True}, (128, 512)),
    "columns": ("LlamaForCausalLM", BIG, {"dataset": None}, (256, 256)),
    "whole rows": ("LlamaForCausalLM", BIG, {"dataset": None, "block_size": -1, "planes": 2}, (256, 256)),
    # 160 columns in two parts are no whole blocks
    "cut blocks": ("LlamaForCausalLM", {}, {"dataset": None}, (48, 160)),
    "uneven": ("LlamaForCausalLM", {"intermediate_size": 161}, {"dataset": None}, (48, 161)),
    "salient": ("LlamaForCausalLM", BIG, {"dataset": DATA, "method": "arb-rc", "num_iterations": 2}, (128, 512)),
    # biases; and in one layer each, a linear that stays in float under the same rule of the plan
    "mixed": (
        "Qwen2ForCausalLM",
        BIG,
        {"dataset": None, "overrides": {"re:.*1.mlp.down_proj": {"skip": True}, "re:.*1.*q_proj": {"skip": True}}},
        (256, 256),
    ),
    "bias": ("PhiForCausalLM", BIG, {"dataset": None}, None),
    "experts": ("MixtralForCausalLM", {}, {"dataset": DATA, "block_size": 64, "act_order": True}, None),
    "float experts": (
        "MixtralForCausalLM",
        {},
        {
            "dataset": None,
            "block_size": 64,
            "overrides": {"re:.*0.mlp.experts.*": {"skip": True}, "re:.*1.mlp.experts.down_proj": {"skip": True}},
        },
        None,
    ),
    "factors": ("LlamaForCausalLM", BIG, {"dataset": None, "method": "arb-dbf"}, (256, 256)),
    "8-bit scales": ("LlamaForCausalLM", BIG, {"dataset": None, "scale_bits": 8}, (256, 256)),
    "dequantize": ("LlamaForCausalLM", BIG, {"dataset": DATA, "act_order": True, "scale_bits": 8}, (128, 512)),
}
if hasattr(HfQuantizer, "update_parallel_plan"):  # since 5.21
    CASES["expert parallel"] = ("Qwen3MoeForCausalLM", {}, {"dataset": None, "block_size": 64}, None)
ROWS_ALONE = ("permuted", "salient", "cut blocks", "experts")


def worker(folder: str) -> None:
    """One rank: loads, runs and saves every case, and tries what must be refused."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    ids = tokens(2, 9)
    results = {}
    for name in CASES:
        path = Path(folder) / name / "packed"
        own = {"quantization_config": ARBConfig(backend="dequantize")} if name == "dequantize" else {}
        sizes = {"tp_size": 2, "ep_size": 2} if name == "expert parallel" else {"tp_size": 2}
        whole = AutoModelForCausalLM.from_pretrained(path, **own)
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes), **own)
        gradients = []
        for each in (whole, model):
            embedded = each.get_input_embeddings()(ids).detach()
            embedded = (embedded.full_tensor() if hasattr(embedded, "full_tensor") else embedded).requires_grad_()
            each(inputs_embeds=embedded).logits.square().sum().backward()
            gradients.append(embedded.grad)
        answers = [each.generate(ids, max_new_tokens=4, do_sample=False).tolist() for each in (whole, model)]
        result = {
            "difference": float((outputs(whole, ids) - outputs(model, ids)).abs().max()),
            "one token": float((outputs(whole, ids[:1, :1]) - outputs(model, ids[:1, :1])).abs().max()),
            "gradient": float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()),
            "same": answers[0] == answers[1],
            "bytes": [
                sum(p.numel() * p.element_size() for n, p in each.named_parameters() if "embed" not in n)
                for each in (whole, model)
            ],
        }
        down = dict(model.named_modules()).get(DOWN)
        if isinstance(down, ARBLinear):
            result["down"] = [down.out_features, down.in_features]
        model.save_pretrained(Path(folder) / name / "again")
        with pytest.raises(ValueError, match="divided over ranks"):
            model.dequantize()
        results[name] = result
    two = {"distributed_config": DistributedConfig(tp_size=2)}
    with pytest.raises(ValueError, match="cannot be binarized while it is divided"):
        AutoModelForCausalLM.from_pretrained(Path(folder) / "columns" / "float", quantization_config=ARBConfig(), **two)
    own_plan = DistributedConfig(tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "packed_colwise"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: a packed linear cannot .* 'packed_colwise'"):
        AutoModelForCausalLM.from_pretrained(Path(folder) / "columns" / "packed", distributed_config=own_plan)
    own_plan = DistributedConfig(tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "embedding_colwise"})
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(Path(folder) / "columns" / "packed", distributed_config=own_plan)
    (Path(folder) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    for name, (family, changes, choices, _) in CASES.items():
        save = save_moe if family.startswith(("Mixtral", "Qwen3Moe")) else save_tiny
        save(folder / name / "float", family, **changes)
        config = ARBConfig(num_samples=8, **choices)
        with pytest.MonkeyPatch.context() as patch:
            install(patch)
            model = AutoModelForCausalLM.from_pretrained(folder / name / "float", quantization_config=config)
        model.save_pretrained(folder / name / "packed")
    check(run_ranks(__file__, "worker", folder))
    return folder


@needs_torch
@pytest.mark.parametrize("name", CASES)
def test_a_divided_model_computes_and_saves_what_the_whole_one_does(folder, name):
    results = [json.loads((folder / f"rank{rank}.json").read_text())[name] for rank in (0, 1)]
    for result in results:
        # where rows alone are divided, every product of a token is that of one process; sums over ranks round
        # otherwise, and so does the library that multiplies many tokens by half the rows, with AVX2 alone
        assert result["one token"] <= (0 if name in ROWS_ALONE else 1e-5)
        assert result["difference"] <= 1e-5
        assert result["gradient"] < 1e-5
        assert result["same"]
        assert result["bytes"][1] < 0.95 * result["bytes"][0]
    down = CASES[name][3]
    assert down is None or tuple(results[1]["down"]) == down
    before = load_file(folder / name / "packed" / "model.safetensors")
    after = load_file(folder / name / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / name / kind / "config.json").read_text()) for kind in ("packed", "again")]
    choices = [{k: v for k, v in c["quantization_config"].items() if k != "backend"} for c in configs]
    assert choices[0] == choices[1]
    assert "distributed_config" not in configs[1]


@pytest.mark.parametrize("name", ["fsdp_size", "pp_size", "dp_replicate_size"])
def test_other_parallelism_is_refused(name):
    model = tiny_model("LlamaForCausalLM")
    model.config.distributed_config = SimpleNamespace(**{name: 2})
    with pytest.raises(ValueError, match=f"{name}=2: a binarized model is divided by tp_size"):
        prepare(model, pre_quantized=True)
    model.config.distributed_config = SimpleNamespace(tp_size=2, ep_size=2)
    with pytest.raises(ValueError, match="no expert plan"):
        prepare(model, pre_quantized=True)


def test_an_older_torch_is_told(monkeypatch):
    def distribute_tensor(tensor, device_mesh=None, placements=None): ...  # as torch 2.6 has it

    monkeypatch.setattr("torch.distributed.tensor.distribute_tensor", distribute_tensor)
    model = tiny_model("LlamaForCausalLM")
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"tp_size=2: .* from 2\.7 on, and this is torch .* device_map"):
        prepare(model, pre_quantized=True)


def test_one_rank_is_no_parallelism():
    model = tiny_model("LlamaForCausalLM")
    model.config.distributed_config = SimpleNamespace(tp_size=1, fsdp_size=1)
    prepare(model, pre_quantized=False)
