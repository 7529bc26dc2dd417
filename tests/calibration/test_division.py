"""What several processes make of a calibration matrix for each other (gloo on the CPU), on models of any size."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from rank_cases import binarize_cases, by_one, check_same, said, together
from tiny_experts import save_moe
from tiny_models import save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig, algorithms
from optimum_arb.algorithms import admm, preparation
from optimum_arb.algorithms.admm import STAGES
from optimum_arb.calibration import division
from optimum_arb.calibration.correction import Corrections

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


def worker(folder: str, *names: str) -> None:
    """One rank."""
    division.LEAST["cpu"] = 1
    path = Path(folder)
    ways = () if names else FAILURES
    binarize_cases(path, names or CASES, partial(binarize_case, path), count, ways, partial(fail, path / LLAMA))


def binarize_case(folder: Path, name: str):
    return binarize(folder / CASES[name][0], **CASES[name][1])


def fail(path: Path, patch: pytest.MonkeyPatch, failure: str, rank: int) -> None:
    """Binarizes a model, and a rank fails in its part."""

    def broken(*args):
        raise ZeroDivisionError(f"no {failure}")

    def singular(*args):
        raise ValueError("the calibration matrix cannot be factorized")

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


two, three = together(__file__, 2), together(__file__, 3, *OF_THREE)
alone = by_one(binarize_case)


def check_case(folder: Path, name: str, size: int, alone) -> None:
    check_same(folder, name, size, alone)
    counts = said(folder, "counts", name, size)
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
    first, second = said(two, "counts", "1 plane")
    assert first.get("measured for others", 0) == 0
    assert second["measured for others"] == 4
    assert first["measured by a fit"] + second["measured by a fit"] == 2 * 7 - 4


@pytest.mark.parametrize("failure", ["preparing", "solving", "inverting"])
def test_an_error_in_the_part_of_one_rank_ends_all(two, failure):
    found = said(two, "errors", failure)
    assert sorted(kind for kind, _ in found) == ["OtherRankFailed", "ZeroDivisionError"]
    failed = next(rank for rank in (0, 1) if found[rank][0] == "ZeroDivisionError")
    assert found[1 - failed][1] == f"Rank {failed} of 2 ended with an error: ZeroDivisionError: no {failure}"


def test_a_matrix_that_cannot_be_prepared_is_reported_by_the_fit(two):
    """As in one process, with the name of the linear."""
    for kind, message in said(two, "errors", "matrix"):
        assert kind in ("ValueError", "OtherRankFailed")
        assert "model.layers.0.self_attn." in message
        assert "the calibration matrix cannot be factorized" in message
