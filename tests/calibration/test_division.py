"""What several processes make of a calibration matrix for each other (gloo on the CPU), on models of any size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import check, run_ranks
from tiny_experts import save_moe
from tiny_models import save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, algorithms, model_report
from optimum_arb.algorithms import admm, preparation
from optimum_arb.algorithms.admm import STAGES
from optimum_arb.calibration import division
from optimum_arb.calibration.correction import Corrections
from optimum_arb.calibration.distributed import OtherRankFailed, distributed

LLAMA, GPT2, MIXTRAL = "LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"
OTHER = {"overrides": {"k_proj": {"method": "arb-dbf", "rank": 8}, "up_proj": {"damp_percent": 0.05}}}
# name -> (family, ARBConfig, matrices that are prepared, inverses, solved corrections), of all ranks together; a layer
# of a Llama has 4 steps, of GPT-2 as well
CASES = {
    "1 plane": (LLAMA, {}, 8, 8 * STAGES, 8),
    "2 planes": (
        LLAMA,
        {"planes": 2, "block_size": 64, "error_correction": 0, "held_out_samples": 2},
        8,
        8 * STAGES,
        0,
    ),
    "few iterations": (GPT2, {"admm_iterations": 3, "act_order": True, "scale_bits": 8}, 8, 8 * 3, 8),
    "no search": (GPT2, {"planes": 2, "admm_iterations": 0, "error_correction": 0.5}, 8, 0, 8),
    "bitmap": (LLAMA, {"method": "arb-rc", "num_iterations": 2}, 8, 0, 0),
    # of one layer's query, key and value, none; gate and up are damped differently
    "others": (LLAMA, {**OTHER, "admm_iterations": 2, "refinement_sweeps": 0}, None, None, None),
    "hadamard": (LLAMA, {"hadamard": 64, "admm_iterations": 2}, None, None, None),
    "experts": (MIXTRAL, {"block_size": 64, "admm_iterations": 2}, None, None, None),
}
OF_THREE = ("1 plane", "2 planes")
FAILURES = ("preparing", "solving", "inverting", "matrix")


def binarize(path: Path, **choices):
    config = ARBConfig(**{"dataset": tokens(8, 24), "num_samples": 8, "batch_size": 2, **choices})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


def count(patch: pytest.MonkeyPatch) -> Counter:
    """Of the calls that are divided."""
    calls: Counter = Counter()
    solve = Corrections.solve

    def counted(name, function):
        return lambda *args: calls.update([name]) or function(*args)

    def solved(corrections, *args):
        calls.update(["solved"] if corrections.sums else [])
        return solve(corrections, *args)

    patch.setattr(preparation, "prepare_hessian", counted("prepared", preparation.prepare_hessian))
    patch.setattr(admm, "_pull", counted("inverted", admm._pull))
    patch.setattr(Corrections, "solve", solved)
    patch.setattr(algorithms, "outputs_energy", counted("measured by a fit", algorithms.outputs_energy))
    patch.setattr(division, "outputs_energy", counted("measured for others", division.outputs_energy))
    return calls


def errors_of(model) -> list[list]:
    return [[each.name, each.weight_error, each.output_error] for each in model_report(model).modules]


def worker(folder: str, *names: str) -> None:
    """One rank: binarizes the cases, then fails in every way."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    division.LEAST["cpu"] = 1
    counts, reports = {}, {}
    with distributed():
        for name in names or CASES:
            with pytest.MonkeyPatch.context() as patch:
                calls = count(patch)
                model = binarize(Path(folder) / CASES[name][0], **CASES[name][1])
                counts[name] = dict(calls)
                reports[name] = errors_of(model)
            torch.save(dict(model.state_dict()), Path(folder) / f"{name} {rank} of {dist.get_world_size()}.pt")
    errors = {}
    for failure in FAILURES if not names else ():
        with pytest.raises((OtherRankFailed, ValueError, ZeroDivisionError)) as raised:
            fail(Path(folder) / LLAMA, failure, rank)
        errors[failure] = (raised.type.__name__, str(raised.value))
    found = {"counts": counts, "errors": errors, "reports": reports}
    (Path(folder) / f"{rank} of {dist.get_world_size()}.json").write_text(json.dumps(found))


def fail(path: Path, failure: str, rank: int) -> None:
    """Binarizes a model, and a rank fails in its part."""

    def broken(*args):
        raise ZeroDivisionError(f"no {failure}")

    def singular(*args):
        raise ValueError("the calibration matrix cannot be factorized")

    with distributed(), pytest.MonkeyPatch.context() as patch:
        if failure == "matrix":
            patch.setattr(preparation, "prepare_hessian", singular)
        elif failure == "preparing":  # of four linears in a step, or one, the first rank fits the largest
            patch.setattr(preparation, "prepare_hessian", broken)
        elif failure == "inverting" and rank:
            patch.setattr(admm, "_pull", broken)
        elif failure == "solving":
            patch.setattr(Corrections, "solve", broken)
        binarize(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("division")
    save_tiny(folder / LLAMA, LLAMA)
    save_tiny(folder / GPT2, GPT2)
    save_moe(folder / MIXTRAL, MIXTRAL)
    return folder


@pytest.fixture(scope="module")
def two(sources) -> Path:
    check(run_ranks(__file__, "worker", sources))
    return sources


@pytest.fixture(scope="module")
def three(sources) -> Path:
    check(run_ranks(__file__, "worker", sources, *OF_THREE, ranks=3))
    return sources


@pytest.fixture(scope="module")
def alone(sources):
    """What one process makes, by the name of the case."""
    made = {}

    def model(name: str):
        if name not in made:
            made[name] = binarize(sources / CASES[name][0], **CASES[name][1])
        return made[name]

    return model


def check_case(folder: Path, name: str, size: int, alone) -> None:
    counts = []
    expected, report = alone.state_dict(), errors_of(alone)
    for rank in range(size):
        found = torch.load(folder / f"{name} {rank} of {size}.pt")
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        said = json.loads((folder / f"{rank} of {size}.json").read_text())
        assert said["reports"][name] == report
        counts.append(said["counts"][name])
    for kind, wanted in zip(("prepared", "inverted", "solved"), CASES[name][2:], strict=True):
        if wanted is not None:
            assert sum(each.get(kind, 0) for each in counts) == wanted, kind
    inverted = [each.get("inverted", 0) for each in counts]
    assert max(inverted) <= 0.7 * sum(inverted) or size > 2 or "hadamard" in name or "experts" in name


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_bits_of_one(two, alone, name):
    check_case(two, name, 2, alone(name))


@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_of_which_some_fit_nothing(three, alone, name):
    check_case(three, name, 3, alone(name))


def test_who_waits_measures_the_outputs_of_a_weight(two):
    """Of the output and the down projection of two layers, of seven linears each."""
    first, second = (json.loads((two / f"{rank} of 2.json").read_text())["counts"]["1 plane"] for rank in (0, 1))
    assert first.get("measured for others", 0) == 0
    assert second["measured for others"] == 4
    assert first["measured by a fit"] + second["measured by a fit"] == 2 * 7 - 4


def errors(folder: Path, failure: str) -> list[list[str]]:
    return [json.loads((folder / f"{rank} of 2.json").read_text())["errors"][failure] for rank in (0, 1)]


@pytest.mark.parametrize("failure", ["preparing", "solving", "inverting"])
def test_an_error_in_the_part_of_one_rank_ends_all(two, failure):
    found = errors(two, failure)
    assert sorted(kind for kind, _ in found) == ["OtherRankFailed", "ZeroDivisionError"]
    failed = next(rank for rank in (0, 1) if found[rank][0] == "ZeroDivisionError")
    assert found[1 - failed][1] == f"Rank {failed} of 2 ended with an error: ZeroDivisionError: no {failure}"


def test_a_matrix_that_cannot_be_prepared_is_reported_by_the_fit(two):
    """As in one process, with the name of the linear."""
    for kind, message in errors(two, "matrix"):
        assert kind in ("ValueError", "OtherRankFailed")
        assert "model.layers.0.self_attn." in message
        assert "the calibration matrix cannot be factorized" in message
