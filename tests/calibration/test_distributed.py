"""Binarizing one model in several processes (gloo on the CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import check, environment, run_ranks
from safetensors.torch import load_file
from tiny_experts import save_moe
from tiny_models import save_tiny, text, tokens
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from optimum_arb import ARBConfig, model_report
from optimum_arb.calibration.distributed import current_ranks, distributed
from optimum_arb.calibration.ranks import OtherRankFailed

# name -> (family, ARBConfig); 8 sequences
CASES = {
    "llama": ("LlamaForCausalLM", {"batch_size": 2}),
    # of the last of three batches of each rank, nothing is fitted to the second rank's
    "planes": ("GPT2LMHeadModel", {"batch_size": 2, "planes": 2, "block_size": 64, "held_out_samples": 2}),
    # one batch: the second rank only binarizes
    "one batch": ("LlamaForCausalLM", {"batch_size": 8, "method": "arb-rc", "num_iterations": 2}),
    "experts": ("MixtralForCausalLM", {"batch_size": 2, "block_size": 64, "held_out_samples": 2}),
    # no chain of layers: whole runs of the model
    "whole runs": ("T5ForConditionalGeneration", {"batch_size": 4}),
    "data-free": ("LlamaForCausalLM", {"dataset": None}),
}
FAILURES = ("start", "forward", "fit", "sum", "inputs", "end", "seed", "tokens", "model")


def config(**choices) -> ARBConfig:
    return ARBConfig(**{"dataset": tokens(8, 24), "num_samples": 8, **choices})


def binarize(path, family="LlamaForCausalLM", **choices):
    kind = AutoModelForSeq2SeqLM if family.startswith("T5") else AutoModelForCausalLM
    return kind.from_pretrained(path, quantization_config=config(**choices))


def errors_of(model) -> list[list]:
    return [[m.name, m.weight_error, m.output_error, m.held_out_error] for m in model_report(model).modules]


def worker(folder: str) -> None:
    """One rank: binarizes every case, then fails in every way."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    reports = {}
    with distributed() as ranks:
        assert (ranks.rank, ranks.size) == (rank, 2)
        assert current_ranks() is ranks
        for name, (family, choices) in CASES.items():
            model = binarize(Path(folder) / name / "float", family, **choices)
            model.save_pretrained(Path(folder) / name / f"rank{rank}", is_main_process=True)
            if rank:  # transformers lets the first process alone write
                torch.save(dict(model.state_dict()), Path(folder) / name / "rank1.pt")
            reports[name] = errors_of(model)
    assert current_ranks().size == 1
    errors = {}
    for failure in FAILURES:
        with pytest.raises((ValueError, OtherRankFailed, ZeroDivisionError, MemoryError)) as raised:
            fail(Path(folder) / "llama" / "float", failure, rank)
        errors[failure] = (raised.type.__name__, str(raised.value))
    dist.barrier()  # the ranks begin together what is about seconds
    with pytest.raises((OtherRankFailed, KeyError)) as raised:
        hang(Path(folder) / "llama" / "float", rank)
    errors["timeout"] = (raised.type.__name__, str(raised.value))
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps({"reports": reports, "errors": errors}))


def fail(path: Path, failure: str, rank: int) -> None:
    """Binarizes a model, and the second rank fails on the way, or differs."""
    from optimum_arb.calibration import gathering
    from optimum_arb.loading import calibrated

    with distributed(), pytest.MonkeyPatch.context() as patch:
        if failure == "start" and rank:
            raise ZeroDivisionError("no start")
        choices = {"batch_size": 2}
        if failure == "forward" and rank:

            def forward(*args, **kwargs):
                raise ZeroDivisionError("no forward")

            from transformers.models.llama.modeling_llama import LlamaMLP

            patch.setattr(LlamaMLP, "forward", forward)
        elif failure == "fit" and rank:

            def fit(name, *args):
                raise ValueError(f"{name} is broken")

            patch.setattr(calibrated, "binarize_linear", fit)
        elif failure in ("sum", "inputs"):  # the second rank has no batch, and no memory for what it gets

            def no_memory(*args, **kwargs):
                raise MemoryError(f"no {failure}")

            choices |= {"dataset": tokens(1, 24), "num_samples": 1}
            if failure == "inputs":
                path = path.parents[1] / "experts" / "float"
            if rank:
                patch.setattr(gathering, *(("Statistic", no_memory) if failure == "sum" else ("_empty", no_memory)))
        elif failure == "seed":
            choices["seed"] = rank
        elif failure == "tokens":
            choices["dataset"] = tokens(8, 24, seed=rank)
        elif failure == "model" and rank:
            path = path.parents[1] / "one batch" / "float"
        binarize(path, **choices)
        if failure == "end" and rank:
            raise ZeroDivisionError("no end")


def hang(path: Path, rank: int) -> None:
    """Binarizes a model, and the second rank comes too late: when the first one has given up, however long it takes
    until it waits."""
    given_up = path.parent / "given up"
    with distributed(timeout=3):
        if rank:
            end = time.monotonic() + 120
            while not given_up.exists() and time.monotonic() < end:
                time.sleep(0.1)
            raise KeyError("late")
        try:
            binarize(path)
        except OtherRankFailed:
            given_up.touch()
            raise


def killed(folder: str) -> None:
    """One rank, of which the second is ended without a word."""
    from optimum_arb.loading import calibrated

    if os.environ["RANK"] == "1":
        calibrated.binarize_linear = lambda *args: os._exit(9)
    with pytest.raises(OtherRankFailed, match=r"got no answer from another rank while .*: it was ended"), distributed():
        binarize(Path(folder) / "llama" / "float")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name, (family, _) in CASES.items():
        save = save_moe if family.startswith("Mixtral") else save_tiny
        save(folder / name / "float", family, **({"seed": 1} if name == "one batch" else {}))
    return folder


@pytest.fixture(scope="module")
def folder(sources) -> Path:
    check(run_ranks(__file__, "worker", sources))
    return sources


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_bits_of_one(folder, name):
    family, choices = CASES[name]
    alone = binarize(folder / name / "float", family, **choices)
    alone.save_pretrained(folder / name / "alone")
    expected = load_file(folder / name / "alone" / "model.safetensors")
    found = load_file(folder / name / "rank0" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    files = [(folder / name / kind / "config.json").read_text() for kind in ("alone", "rank0")]
    assert files[0] == files[1]
    second = torch.load(folder / name / "rank1.pt")
    state = alone.state_dict()
    assert second.keys() == state.keys()
    assert all(torch.equal(second[key], state[key]) for key in state)
    report = errors_of(alone)
    assert (report[0][3] is not None) == ("held_out_samples" in choices)
    for rank in (0, 1):
        assert json.loads((folder / f"rank{rank}.json").read_text())["reports"][name] == report


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("start", "ZeroDivisionError: no start"),
        ("forward", "ZeroDivisionError: no forward"),
        ("fit", "ValueError: model.layers.0."),
        ("sum", "MemoryError: no sum"),
        ("inputs", "MemoryError: no inputs"),
        ("end", "ZeroDivisionError: no end"),
    ],
)
def test_an_error_of_one_rank_ends_all(folder, failure, said):
    """Nobody waits for anybody: that would be an hour, and the ranks are ended before."""
    first, second = (json.loads((folder / f"rank{rank}.json").read_text())["errors"][failure] for rank in (0, 1))
    assert first[0] == "OtherRankFailed"
    assert first[1].startswith(f"Rank 1 of 2 ended with an error: {said}")
    kind, _, text = said.partition(": ")
    assert second[0] == kind
    assert second[1].startswith(text)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("seed", "Rank 1 was started with another seed than rank 0: 1 instead of 0."),
        ("tokens", "another set of calibration tokens"),
        ("model", "another model than rank 0"),
    ],
)
def test_ranks_that_were_started_differently_are_refused(folder, failure, said):
    for rank in (0, 1):
        kind, message = json.loads((folder / f"rank{rank}.json").read_text())["errors"][failure]
        assert kind == "ValueError"
        assert said in message


def started(folder: str) -> None:
    """One rank of a run that the first one is told to resume, and the second one to begin."""
    import torch.distributed as dist

    from optimum_arb.checkpoint.quantize import quantize_checkpoint

    dist.init_process_group("gloo")
    source, resume = Path(folder) / "llama" / "float", dist.get_rank() == 0
    said = "Rank 1 was comparing .* while rank 0 was looking for a finished model. Start all ranks with the same"
    with pytest.raises(RuntimeError, match=said), distributed():
        quantize_checkpoint(source, Path(folder) / "one", config(), resume=resume)


def test_ranks_that_were_told_to_do_different_things_are_refused(sources):
    check(run_ranks(__file__, "started", sources))
    assert not (sources / "one").exists()


def test_a_rank_that_does_not_answer_ends_the_others(folder):
    kind, message = json.loads((folder / "rank0.json").read_text())["errors"]["timeout"]
    assert kind == "OtherRankFailed"
    assert "took longer than 3 seconds" in message
    assert json.loads((folder / "rank1.json").read_text())["errors"]["timeout"] == ["KeyError", "'late'"]


def test_a_rank_that_is_killed_ends_the_others(sources):
    """Not after the hour that a rank waits at most: the ranks are ended before."""
    first, second = run_ranks(__file__, "killed", sources)
    assert first.returncode == 0, first.stderr[-4000:]
    assert second.returncode == 9


def test_the_command_under_torchrun(tmp_path):
    """Three processes for two sequences: one has no batch at all. The first alone writes and prints."""
    source = save_tiny(tmp_path / "float", "LlamaForCausalLM", tokenizer=True)
    (tmp_path / "text.txt").write_text(text(200))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    options = ["--dataset", tmp_path / "text.txt", "--num-samples", 2, "--sequence-length", 24, "--batch-size", 1]
    command = ["-m", "optimum_arb", "quantize", source, tmp_path / "packed", *options, "--json"]
    done = subprocess.run(
        [*run, *map(str, command)], env=environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["config"]["calibration"]["samples"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "packed", "text.txt"]
    choices = {"num_samples": 2, "sequence_length": 24, "batch_size": 1}
    alone = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=ARBConfig(dataset=str(tmp_path / "text.txt"), **choices)
    )
    found = load_file(tmp_path / "packed" / "model.safetensors")
    state = {key: tensor for key, tensor in alone.state_dict().items() if key in found}
    assert len(state) == len(found)
    assert all(torch.equal(found[key], state[key]) for key in found)


def streamed(folder: str) -> None:
    """One rank of a run from disk to disk that is interrupted once: the second rank stops a layer later."""
    import torch.distributed as dist

    from optimum_arb.checkpoint.quantize import quantize_checkpoint
    from optimum_arb.checkpoint.streamed import StreamedWeights

    dist.init_process_group("gloo")
    source, out = Path(folder) / "deep", Path(folder) / "streamed"
    choices = {"config": config(batch_size=2), "activations_on_disk": True}
    write = StreamedWeights._write

    def stop(self, part):
        if part == f"model.layers.{1 + dist.get_rank()}":
            raise ZeroDivisionError("interrupted")
        write(self, part)

    patch = pytest.MonkeyPatch()
    patch.setattr(StreamedWeights, "_write", stop)
    with pytest.raises((ZeroDivisionError, OtherRankFailed)), distributed():
        quantize_checkpoint(source, out, **choices)
    patch.undo()
    assert not out.exists()
    with distributed():
        done = quantize_checkpoint(source, out, **choices, resume=True)
        again = quantize_checkpoint(source, out, **choices, resume=True)
    assert done.resumed_layers == 1
    assert again.files == done.files
    assert "model.safetensors" in done.files


def test_from_disk_to_disk_and_resumed(sources):
    save_tiny(sources / "deep", "LlamaForCausalLM", num_hidden_layers=3)
    check(run_ranks(__file__, "streamed", sources))
    alone = binarize(sources / "deep", batch_size=2).state_dict()
    found = load_file(sources / "streamed" / "model.safetensors")
    assert found.keys() <= alone.keys()
    assert [key for key in found if not torch.equal(found[key], alone[key])] == []
    left = {path.name for path in sources.iterdir()} - set(CASES)
    assert left <= {"deep", "streamed", "rank0.json", "rank1.json"}
