"""The float model's next layer, run by the ranks that wait for a fit (gloo on the CPU)."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import check, run_ranks
from safetensors.torch import load_file
from tiny_experts import save_moe
from tiny_models import save_tiny, tokens
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig
from optimum_arb.calibration import ahead_plan, division
from optimum_arb.calibration.ahead import Ahead
from optimum_arb.calibration.ahead_plan import Pace, _Offer, in_time
from optimum_arb.calibration.ahead_plan import divided as divided_by
from optimum_arb.calibration.distributed import OtherRankFailed, distributed

LLAMA, MIXTRAL = "LlamaForCausalLM", "MixtralForCausalLM"
SAMPLES = 7  # batches; two ranks have 4 and 3
# name -> (family, ARBConfig, bytes that a rank may hold, batches that are run ahead in each of two layers of three)
CASES = {
    "llama": (LLAMA, {}, 1 << 30, 7),
    "divided": (LLAMA, {"planes": 2, "held_out_samples": 2}, 1 << 30, 7),
    # a batch is 24 tokens of 2 * 96 + 96 + 96 + 96 + 160 numbers: the second rank has room for two of each
    "little room": (LLAMA, {}, 4 * 24 * 640 * 4, 4),
    "in time": (LLAMA, {}, 1 << 30, None),
    "wide heads": ("Qwen3ForCausalLM", {}, 1 << 30, 7),
    "parallel": ("PhiForCausalLM", {}, 1 << 30, 7),
    "gpt2": ("GPT2LMHeadModel", {"act_order": True}, 1 << 30, 7),
    "norms behind": ("Gemma2ForCausalLM", {}, 1 << 30, 7),
    "factors": (LLAMA, {"method": "arb-dbf", "num_iterations": 2}, 1 << 30, 7),
    # all ranks have experts to fit
    "experts": (MIXTRAL, {"block_size": 64}, 1 << 30, 0),
    "uncorrected": (LLAMA, {"error_correction": 0}, 1 << 30, 0),
}
OF_THREE = ("llama", "little room")
FAILURES = ("running", "fitting", "loading")


def binarize(path: Path, **choices):
    options = {"dataset": tokens(SAMPLES, 24), "num_samples": SAMPLES, "admm_iterations": 2, **choices}
    if options.get("method") == "arb-dbf":
        del options["admm_iterations"]
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=ARBConfig(**options))


def count(patch: pytest.MonkeyPatch) -> Counter:
    """Of the batches that this rank runs ahead, and of what it takes of its own batches."""
    calls: Counter = Counter()
    run, read = Ahead.run, Ahead.read

    def counted(ahead: Ahead) -> None:
        run(ahead)
        calls["run"] += len(ahead._made)

    def taken(ahead: Ahead, number: int, batch: int):
        calls["taken"] += number == 2
        return read(ahead, number, batch)

    patch.setattr(Ahead, "run", counted)
    patch.setattr(Ahead, "read", taken)
    return calls


def worker(folder: str, *names: str) -> None:
    """One rank: binarizes the cases, then fails in every way."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counts = {}
    timed = ahead_plan.in_time
    with distributed():
        for name in names or CASES:
            family, choices, room, _ = CASES[name]
            ahead_plan.MOST["cpu"] = room
            # as many batches as there are, however long they take
            ahead_plan.in_time = timed if name == "in time" else lambda offers: [math.inf] * len(offers)
            division.LEAST["cpu"] = 1 if name == "divided" else 1 << 30
            with pytest.MonkeyPatch.context() as patch:
                calls = count(patch)
                model = binarize(Path(folder) / family, **choices)
                counts[name] = dict(calls)
            torch.save(dict(model.state_dict()), Path(folder) / f"{name} {rank} of {dist.get_world_size()}.pt")
    errors = {}
    for failure in FAILURES if not names else ():
        with pytest.raises((OtherRankFailed, ZeroDivisionError)) as raised:
            fail(Path(folder) / LLAMA, failure, rank)
        errors[failure] = (raised.type.__name__, str(raised.value))
    found = {"counts": counts, "errors": errors}
    (Path(folder) / f"{rank} of {dist.get_world_size()}.json").write_text(json.dumps(found))


def fail(path: Path, failure: str, rank: int) -> None:
    """Binarizes a model; the rank that waits fails in what it does meanwhile, or the other one in the fit."""
    from optimum_arb.calibration.to_device import ToDevice
    from optimum_arb.loading import calibrated

    fit, bring = calibrated.binarize_linear, ToDevice.bring_beside

    run = Ahead.run

    def broken(*args):
        raise ZeroDivisionError(f"no {failure}")

    def down(name, *args):
        return broken() if "down_proj" in name else fit(name, *args)

    def second(to_device, name, layer):
        return broken() if rank else bring(to_device, name, layer)

    with distributed(), pytest.MonkeyPatch.context() as patch:
        if failure == "running":
            patch.setattr(Ahead, "run", lambda ahead: broken() if rank else run(ahead))
        elif failure == "fitting":
            patch.setattr(calibrated, "binarize_linear", down)
        elif failure == "loading":
            patch.setattr(ToDevice, "bring_beside", second)
        binarize(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    for family in {family for family, *_ in CASES.values()}:
        layers = "n_layer" if family.startswith("GPT2") else "num_hidden_layers"
        changes = {"layer_types": ["full_attention"] * 3} if family.startswith("Gemma") else {}
        (save_moe if family == MIXTRAL else save_tiny)(folder / family, family, **{layers: 3, **changes})
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
    made: dict[str, dict[str, torch.Tensor]] = {}

    def state(name: str) -> dict[str, torch.Tensor]:
        if name not in made:
            made[name] = binarize(sources / CASES[name][0], **CASES[name][1]).state_dict()
        return made[name]

    return state


def counts(folder: Path, name: str, size: int) -> list[dict[str, int]]:
    return [json.loads((folder / f"{rank} of {size}.json").read_text())["counts"][name] for rank in range(size)]


def check_bits(folder: Path, name: str, size: int, expected: dict[str, torch.Tensor]) -> None:
    for rank in range(size):
        found = torch.load(folder / f"{name} {rank} of {size}.pt")
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_bits_of_one(two, alone, name):
    check_bits(two, name, 2, alone(name))
    first, second = counts(two, name, 2)
    assert first.get("run", 0) == 0
    if CASES[name][3] is None:
        assert SAMPLES < second["run"] <= 2 * SAMPLES  # all of the second layer, one at least of the third
        batches = second["run"]
    else:
        batches = 2 * CASES[name][3]
        assert second.get("run", 0) == batches
    assert first.get("taken", 0) + second.get("taken", 0) == batches


@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_of_which_two_wait(three, alone, name):
    check_bits(three, name, 3, alone(name))
    first, *others = counts(three, name, 3)
    assert first.get("run", 0) == 0
    assert sum(each["taken"] for each in (first, *others)) == sum(each["run"] for each in others)
    if name == "llama":
        assert sorted(each["run"] for each in others) == [6, 8]  # of 3, 2 and 2 batches, in each of two layers


@pytest.mark.parametrize(("failure", "rank"), [("running", 1), ("fitting", 0), ("loading", 1)])
def test_an_error_beside_a_fit_or_in_it_ends_all(two, failure, rank):
    found = [json.loads((two / f"{each} of 2.json").read_text())["errors"][failure] for each in (0, 1)]
    assert found[rank] == ["ZeroDivisionError", f"no {failure}"]
    assert found[1 - rank][0] == "OtherRankFailed"
    assert found[1 - rank][1] == f"Rank {rank} of 2 ended with an error: ZeroDivisionError: no {failure}"


def streamed(folder: str) -> None:
    """One rank of a run from disk to disk that is interrupted behind its second layer."""
    import torch.distributed as dist

    from optimum_arb.checkpoint.quantize import quantize_checkpoint
    from optimum_arb.checkpoint.streamed import StreamedWeights

    dist.init_process_group("gloo")
    ahead_plan.MOST["cpu"] = 1 << 30
    out = Path(folder) / "streamed"
    data = tokens(SAMPLES, 24)
    config = ARBConfig(dataset=data, num_samples=SAMPLES, admm_iterations=2)
    write = StreamedWeights._write

    def stop(self, part):
        write(self, part)
        if part == f"model.layers.{1 + dist.get_rank()}":
            raise ZeroDivisionError("interrupted")

    with pytest.MonkeyPatch.context() as patch:
        calls = count(patch)
        patch.setattr(StreamedWeights, "_write", stop)
        with pytest.raises((ZeroDivisionError, OtherRankFailed)), distributed():
            quantize_checkpoint(Path(folder) / LLAMA, out, config)
    assert not out.exists()
    if dist.get_rank() == 0:  # the last layer was loaded ahead, and nothing was made of it
        manifest = json.loads((Path(folder) / ".streamed.partial" / "manifest.json").read_text())
        assert set(manifest["sources"]) == {"", "model.layers.0", "model.layers.1"}
    with distributed():
        done = quantize_checkpoint(Path(folder) / LLAMA, out, config, resume=True)
    (Path(folder) / f"streamed{dist.get_rank()}.json").write_text(json.dumps([dict(calls), done.resumed_layers]))
    dist.destroy_process_group()  # what the interrupted run had begun to send has ended by then


def test_from_disk_to_disk_and_resumed(sources, alone):
    check(run_ranks(__file__, "streamed", sources))
    first, second = (json.loads((sources / f"streamed{rank}.json").read_text()) for rank in (0, 1))
    assert first[1] == second[1] == 2
    assert second[0]["run"] >= SAMPLES
    found = load_file(sources / "streamed" / "model.safetensors")
    expected = alone("llama")
    assert found.keys() <= expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_batches_go_to_ranks_that_wait_and_have_a_like_call():
    short, long = ["a", "a", "b"], ["a", "a"]
    offers = [_Offer(short, 1, 100), _Offer(long, 1, 100), _Offer(long, 1, 100)]
    divided = partial(divided_by, most=[math.inf] * 3)
    # the last batch of the first rank is like none of the others'; so none of that rank is run ahead
    assert divided(offers, [1, 2]) == {(1, 0): 1, (1, 1): 1, (2, 0): 2, (2, 1): 2}
    offers[0] = _Offer(["b", "a", "a"], 1, 100)
    found = divided(offers, [1, 2])
    assert sorted(found) == [(0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {found[0, 1], found[0, 2]} == {1, 2}
    offers[0] = _Offer([None, None], 1, 100)  # nobody can tell whether its calls are like another's
    assert sorted(divided(offers[:2], [1])) == [(1, 0), (1, 1)]
    assert sorted(divided(offers[:2], [0])) == [(0, 0), (0, 1)]


def test_batches_are_run_ahead_as_far_as_there_is_room():
    offers = [_Offer(["a"] * 5, 10, 100), _Offer(["a"] * 5, 10, 45)]
    divided = partial(divided_by, most=[math.inf] * 2)
    assert divided(offers, [1]) == {(0, 3): 1, (0, 4): 1, (1, 3): 1, (1, 4): 1}
    offers = [_Offer(["a"] * 5, 10, 15), _Offer(["a"] * 5, 10, 1000)]
    assert divided(offers, [1]) == {(0, 4): 1, **{(1, batch): 1 for batch in range(5)}}
    assert divided([_Offer([], 0, 100), _Offer(["a"], 10, 100)], [0]) == {}


def test_batches_are_run_ahead_as_long_as_a_fit_takes():
    offers = [_Offer(["a"] * 5, 1, 100) for _ in range(3)]
    assert in_time(offers) == [math.inf] * 3
    offers[0].pace, offers[1].pace, offers[2].pace = Pace(fit=0.4), Pace(batch=0.15), Pace(batch=1.0)
    assert in_time(offers) == [math.inf, 2, 1]
    assert divided_by(offers, [1, 2], in_time(offers)) == {(0, 4): 1, (1, 4): 1, (2, 4): 2}
    offers[0].pace = Pace()
    assert in_time(offers) == [math.inf] * 3


def released(folder: str) -> None:
    """One rank that looks at what is there of a layer that was run ahead once its last step has been gathered."""
    import gc
    import weakref

    import torch.distributed as dist

    from optimum_arb.calibration.fitting import Fitting

    dist.init_process_group("gloo")
    ahead_plan.MOST["cpu"] = 1 << 30
    made: list[weakref.ref] = []
    found: list[list[int]] = []
    run, fit = Ahead.run, Fitting.binarize

    def noted(ahead: Ahead) -> None:
        made.append(weakref.ref(ahead))
        run(ahead)

    def look(self, names, *args):
        if "down_proj" in names[0]:
            gc.collect()
            found.append([len(ahead._made) for each in made if (ahead := each()) is not None])
        return fit(self, names, *args)

    with distributed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "run", noted)
        patch.setattr(Fitting, "binarize", look)
        binarize(Path(folder) / LLAMA)
    (Path(folder) / f"released{dist.get_rank()}.json").write_text(json.dumps(found))


def test_nothing_of_a_layer_is_kept_behind_its_last_step(sources):
    """The last layer's outputs, which nothing wants, lay beside the fit of its last linear."""
    check(run_ranks(__file__, "released", sources))
    for rank in (0, 1):
        assert json.loads((sources / f"released{rank}.json").read_text()) == [[], [], []]
