"""Packed models on one and two GPUs, and tensor parallel and joint calibration on two; `pytest -m gpu` where they are.

The tests of two GPUs start their processes themselves: `python -m pytest -m gpu tests/test_devices_gpu.py` is enough.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import check, run_ranks
from safetensors.torch import load_file
from tiny_experts import save_moe
from tiny_models import outputs, save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, model_report
from optimum_arb.nn import ARBExperts, ARBLinear

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
FAMILIES = ("LlamaForCausalLM", "MixtralForCausalLM")
BIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
IDS = tokens(2, 9)


def save(path: Path, family: str) -> Path:
    return (save_tiny if family.startswith("Llama") else save_moe)(path, family, **BIG)


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(folder / "float", request.param)
    config = ARBConfig(dataset=tokens(8, 24), num_samples=8)
    AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config).save_pretrained(
        folder / "packed"
    )
    return folder / "packed"


def check_outputs(model, packed, dtype=torch.float32):
    expected = outputs(AutoModelForCausalLM.from_pretrained(packed, dtype=dtype), IDS).float()
    found = outputs(model, IDS.cuda()).cpu().float()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert model.generate(IDS.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 13)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_layers_beside_the_gpu(packed, tmp_path, where):
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0", "model.layers.2")
    device_map = {**dict.fromkeys(names, 0), "model.layers.1": where, "model.layers.3": where}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, offload_folder=tmp_path / "offload")
    away = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (ARBLinear, ARBExperts)) and name.startswith(("model.layers.1.", "model.layers.3."))
    ]
    check_outputs(model, packed)
    check_outputs(model, packed)
    assert all(p.is_meta for module in away for p in module.parameters(recurse=False))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (packed, tmp_path / "again"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_limit_of_gpu_memory(packed, tmp_path):
    size = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(packed).parameters())
    limits = {0: size * 2 // 3, "cpu": size * 4}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map="auto", max_memory=limits)
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    check_outputs(model, packed)


@two_gpus
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "explicit"])
def test_layers_on_two_gpus(packed, device_map):
    size = sum(p.numel() * p.element_size() for p in AutoModelForCausalLM.from_pretrained(packed).parameters())
    limits = {"max_memory": {0: size * 2 // 3, 1: size * 2}}
    if device_map == "explicit":
        names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2")
        others = ("model.layers.1", "model.layers.3", "model.norm", "lm_head")
        device_map, limits = {**dict.fromkeys(names, 0), **dict.fromkeys(others, 1)}, {}
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map, **limits)
    assert set(model.hf_device_map.values()) == {0, 1}
    assert {p.device.index for p in model.parameters()} == {0, 1}
    check_outputs(model, packed)


@two_gpus
def test_binarized_on_load_onto_two_gpus(tmp_path):
    source = save(tmp_path / "float", "LlamaForCausalLM")
    config = ARBConfig(dataset=tokens(8, 24), num_samples=8)
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2")
    others = ("model.layers.1", "model.layers.3", "model.norm", "lm_head")
    device_map = {**dict.fromkeys(names, 0), **dict.fromkeys(others, 1)}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map=device_map)
    assert {p.device.index for p in model.parameters()} == {0, 1}
    model.save_pretrained(tmp_path / "packed")
    check_outputs(model, tmp_path / "packed")


def divided(folder: str) -> None:
    """One rank of a tensor-parallel run over NCCL."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    results = {}
    for family in FAMILIES:
        path = Path(folder) / family / "packed"
        for dtype in (torch.bfloat16, torch.float32):  # what is saved below is compared in float32
            config = DistributedConfig(tp_size=2)
            model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=dtype)
            whole = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()
            assert {p.device.index for p in model.parameters()} == {dist.get_rank()}
            ids = IDS.cuda()
            difference = (outputs(model, ids).float() - outputs(whole, ids).float()).abs().max()
            answers = [each.generate(ids, max_new_tokens=8, do_sample=False).tolist() for each in (model, whole)]
            results[f"{family} {dtype}"] = [float(difference), answers[0] == answers[1]]
        model.save_pretrained(Path(folder) / family / "again")
    (Path(folder) / f"divided{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()


@two_gpus
def test_tensor_parallel_over_nccl(tmp_path):
    for family in FAMILIES:
        source = save(tmp_path / family / "float", family)
        config = ARBConfig(dataset=tokens(8, 24), num_samples=8)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        model.save_pretrained(tmp_path / family / "packed")
    check(run_ranks(__file__, "divided", tmp_path))
    for rank in (0, 1):
        for name, (difference, same) in json.loads((tmp_path / f"divided{rank}.json").read_text()).items():
            assert difference < (0.2 if "bfloat16" in name else 1e-3), name
            assert same or "bfloat16" in name, name
    for family in FAMILIES:
        before, after = (load_file(tmp_path / family / kind / "model.safetensors") for kind in ("packed", "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


# name -> (family, changes of `BIG`, ARBConfig, columns from which on the work under a calibration matrix is divided)
TOGETHER = {
    "llama": ("LlamaForCausalLM", {}, {}, None),
    "experts": ("MixtralForCausalLM", {}, {}, None),
    "divided": ("LlamaForCausalLM", {}, {}, 1),
    "no memory to run ahead": ("LlamaForCausalLM", {}, {}, 1),
    "held out": ("LlamaForCausalLM", {}, {"held_out_samples": 2}, None),
    # the first layer is dense
    "deepseek": ("DeepseekV3ForCausalLM", {"num_hidden_layers": 3}, {"block_size": 64}, None),
    "divided experts": ("MixtralForCausalLM", {}, {}, 1),
    # query, key and value are of different sizes, and fitted on streams of their own
    "without correction": ("LlamaForCausalLM", {}, {"planes": 2, "error_correction": 0, "held_out_samples": 2}, 1),
    "hadamard": ("LlamaForCausalLM", {}, {"hadamard": 64}, 1),
    "bitmap": ("LlamaForCausalLM", {}, {"method": "arb-rc", "num_iterations": 2}, 1),
    "factors": ("LlamaForCausalLM", {"num_hidden_layers": 1}, {"method": "arb-dbf", "num_iterations": 4}, 1),
    # as it is divided by default; inverses by parts of the triangle, iterations that are not replayed
    "large": ("LlamaForCausalLM", {"hidden_size": 2048, "intermediate_size": 4160, "num_hidden_layers": 2}, {}, None),
}
# batches that are run ahead, where they are not all of each layer but the first: held out ones are not in the last
AHEAD = {"no memory to run ahead": 0, "held out": 8 + 8 + 6, "deepseek": 8}


def source(folder: Path, name: str) -> Path:
    family, changes, _, _ = TOGETHER[name]
    path = folder / name / "float"
    if not path.exists():
        (save_tiny if family.startswith("Llama") else save_moe)(path, family, **{**BIG, **changes})
    return path


def binarize_together(folder: Path, name: str, device_map: str):
    config = ARBConfig(**{"dataset": tokens(8, 24), "num_samples": 8, "batch_size": 2, **TOGETHER[name][2]})
    return AutoModelForCausalLM.from_pretrained(
        folder / name / "float", quantization_config=config, device_map=device_map
    )


def together(folder: str) -> None:
    """One rank of a joint calibration over NCCL."""
    from optimum_arb.algorithms import admm
    from optimum_arb.calibration import ahead as of_ahead
    from optimum_arb.calibration import ahead_plan, division
    from optimum_arb.calibration.ahead import Ahead
    from optimum_arb.calibration.distributed import distributed

    made: list[None] = []
    ahead: list[int] = []
    run = Ahead.run

    def counted(each: Ahead) -> None:
        run(each)
        ahead.append(len(each._made))

    Ahead.run = counted  # type: ignore[method-assign]
    in_time, calling = ahead_plan.in_time, of_ahead.calling
    # as many batches as there are, however long they take
    ahead_plan.in_time = lambda offers: [math.inf for _ in in_time(offers)]

    def greedy(*args):
        call = calling(*args)
        return lambda batch, hidden: (
            torch.empty(1 << 48, dtype=torch.uint8, device="cuda") if batch == 2 else call(batch, hidden)
        )

    pull = admm._pull
    admm._pull = lambda *args: made.append(None) or pull(*args)  # type: ignore[assignment]
    default = division.LEAST["cuda"]
    counts = {}
    with distributed(timeout=120) as ranks:
        for name, (_, _, _, least) in TOGETHER.items():
            division.LEAST["cuda"] = least or default
            of_ahead.calling = greedy if name == "no memory to run ahead" else calling
            made.clear()
            ahead.clear()
            model = binarize_together(Path(folder), name, "cuda")
            assert {p.device.index for p in model.parameters()} == {ranks.rank}
            counts[name] = len(made)
            counts[f"{name} ahead"] = sum(ahead)
            if ranks.is_first:
                model.save_pretrained(Path(folder) / name / "together")
    (Path(folder) / f"together{ranks.rank}.json").write_text(json.dumps(counts))


@pytest.fixture(scope="module")
def made_together(tmp_path_factory):
    if GPUS < 2:
        pytest.skip("needs two CUDA devices")
    folder = tmp_path_factory.mktemp("together")
    for name in TOGETHER:
        source(folder, name)
    check(run_ranks(__file__, "together", folder))
    return folder


@two_gpus
@pytest.mark.parametrize("name", TOGETHER)
def test_two_gpus_make_the_bits_of_one(made_together, name):
    alone = binarize_together(made_together, name, "cuda:0")
    alone.save_pretrained(made_together / name / "alone")
    expected, found = (load_file(made_together / name / kind / "model.safetensors") for kind in ("alone", "together"))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert model_report(alone).mean_output_error is not None


@two_gpus
@pytest.mark.parametrize("name", ["divided", "large"])
def test_two_gpus_divide_the_inverses(made_together, name):
    """Of four matrices a layer, each inverse once."""
    counts = [json.loads((made_together / f"together{rank}.json").read_text())[name] for rank in (0, 1)]
    layers = {**BIG, **TOGETHER[name][1]}["num_hidden_layers"]
    assert sum(counts) == 4 * 5 * layers
    assert max(counts) <= 3 * 4 * layers


@two_gpus
@pytest.mark.parametrize("name", TOGETHER)
def test_the_gpu_that_waits_runs_the_float_model_ahead(made_together, name):
    """Eight batches in each layer but the first, while the other one fits the down projection."""
    first, second = (json.loads((made_together / f"together{rank}.json").read_text()) for rank in (0, 1))
    layers = {**BIG, **TOGETHER[name][1]}["num_hidden_layers"]
    corrected = TOGETHER[name][2].get("error_correction", 1) and TOGETHER[name][2].get("method") != "arb-rc"
    expected = AHEAD.get(name, 8 * (layers - 1) if corrected and "experts" not in name else 0)
    assert (first[f"{name} ahead"], second[f"{name} ahead"]) == (0, expected)
