"""The float model's next layer, run by the ranks that wait for a fit (gloo on the CPU)."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from rank_cases import binarize_cases, by_one, check_same, said, together
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
from optimum_arb.calibration.distributed import distributed
from optimum_arb.calibration.ranks import OtherRankFailed

LLAMA, MIXTRAL, DEEPSEEK = "LlamaForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"
SAMPLES = 7  # batches; two ranks have 4 and 3


def samples(count: int) -> dict:
    return {"dataset": tokens(count, 24), "num_samples": count}


# name -> (family, ARBConfig, bytes that a rank may hold, batches that are run ahead in the second and third layer)
CASES = {
    "llama": (LLAMA, {}, 1 << 30, 7 + 7),
    # nothing of the last layer is wanted of what is held out
    "divided": (LLAMA, {"planes": 2, "held_out_samples": 2}, 1 << 30, 7 + 5),
    # a batch is 24 tokens of 2 * 96 + 96 + 96 + 96 + 160 numbers: the second rank has room for two of each; of the last
    # layer, whose output nobody wants, too
    "little room": (LLAMA, {}, 4 * 24 * 640 * 4, 4 + 4),
    "in time": (LLAMA, {}, 1 << 30, None),
    "two batches": (LLAMA, samples(2), 1 << 30, 2 + 2),
    # of the rank that fits, and the other one has no call like its
    "fewer batches than ranks": (LLAMA, samples(1), 1 << 30, 0),
    "wide heads": ("Qwen3ForCausalLM", {}, 1 << 30, 7 + 7),
    "parallel": ("PhiForCausalLM", {}, 1 << 30, 7 + 7),
    "gpt2": ("GPT2LMHeadModel", {"act_order": True}, 1 << 30, 7 + 7),
    "norms behind": ("Gemma2ForCausalLM", {}, 1 << 30, 7 + 7),
    "factors": (LLAMA, {"method": "arb-dbf", "num_iterations": 2}, 1 << 30, 7 + 7),
    # all ranks have experts to fit
    "experts": (MIXTRAL, {"block_size": 64}, 1 << 30, 0),
    # the first layer is dense, and those behind it have experts, with a shared one behind them
    "deepseek": (DEEPSEEK, {"block_size": 64}, 1 << 30, 0 + 7),
    "uncorrected": (LLAMA, {"error_correction": 0}, 1 << 30, 0),
}
OF_THREE = ("llama", "little room", "two batches")
FAILURES = ("running", "fitting", "loading")
# where a GPU is short of memory -> the batches that are run ahead of both layers, and those of which something is used
SHORT = {"running": (0, 0), "handing over": (3 + 3, 3 + 3), "handing back": (7 + 7, 3 + 3), "loading": (0, 0)}


def binarize(path: Path, **choices):
    options = {**samples(SAMPLES), "admm_iterations": 2, **choices}
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
    """One rank."""
    path = Path(folder)
    ways = () if names else FAILURES
    binarize_cases(path, names or CASES, partial(binarize_case, path), count, ways, partial(fail, path / LLAMA))


def binarize_case(folder: Path, name: str):
    family, choices, room, _ = CASES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ahead_plan.MOST, "cpu", room)
        if name != "in time":  # as many batches as there are, however long they take
            patch.setattr(ahead_plan, "in_time", lambda offers: [math.inf] * len(offers))
        patch.setitem(division.LEAST, "cpu", 1 if name == "divided" else 1 << 30)
        return binarize(folder / family, **choices)


def fail(path: Path, patch: pytest.MonkeyPatch, failure: str, rank: int) -> None:
    """Binarizes a model; the rank that waits fails in what it does meanwhile, or the other one in the fit."""
    from optimum_arb.calibration.to_device import ToDevice
    from optimum_arb.loading import calibrated

    fit, bring, run = calibrated.binarize_linear, ToDevice.bring_beside, Ahead.run

    def broken(*args):
        raise ZeroDivisionError(f"no {failure}")

    def down(name, *args):
        return broken() if "down_proj" in name else fit(name, *args)

    def second(to_device, name, layer):
        return broken() if rank else bring(to_device, name, layer)

    patch.setitem(ahead_plan.MOST, "cpu", 1 << 30)
    if failure == "running":
        patch.setattr(Ahead, "run", lambda ahead: broken() if rank else run(ahead))
    elif failure == "fitting":
        patch.setattr(calibrated, "binarize_linear", down)
    elif failure == "loading":
        patch.setattr(ToDevice, "bring_beside", second)
    binarize(path)


def short(folder: str) -> None:
    """One rank, which has too little memory for what is run ahead, or the other one has."""
    import torch.distributed as dist

    from optimum_arb.calibration import ahead, sending
    from optimum_arb.calibration.to_device import ToDevice

    bring, calling, form = ToDevice.bring_beside, ahead.calling, sending._Form.empty

    def without(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def third(*args):
        run = calling(*args)
        return lambda batch, hidden: without() if batch == 2 else run(batch, hidden)

    def binarize_short(name: str):
        rank = dist.get_rank()
        doing = []
        spread = ahead.spread

        def noted(ranks, own, device, what, *args, **kwargs):
            doing[:] = [what]
            try:
                return spread(ranks, own, device, what, *args, **kwargs)
            finally:
                doing.clear()

        with pytest.MonkeyPatch.context() as patch:
            if name == "running" and rank:
                patch.setattr(ahead, "calling", third)
            elif name == "loading":
                # its weights are there, and not on the device
                patch.setattr(ToDevice, "bring_beside", lambda *args: (bring(*args), without()))
            elif name.startswith("handing") and rank == (name == "handing over"):
                patch.setattr(ahead, "spread", noted)
                empty = lambda *args: without() if doing and name in doing[0] else form(*args)  # noqa: E731
                patch.setattr(sending._Form, "empty", empty)
            return binarize_case(Path(folder), "llama")

    binarize_cases(Path(folder) / "short", SHORT, binarize_short, count)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    for family in {family for family, *_ in CASES.values()}:
        layers = "n_layer" if family.startswith("GPT2") else "num_hidden_layers"
        changes = {"layer_types": ["full_attention"] * 3} if family.startswith("Gemma") else {}
        (save_moe if family in (MIXTRAL, DEEPSEEK) else save_tiny)(folder / family, family, **{layers: 3, **changes})
    return folder


two, three = together(__file__, 2), together(__file__, 3, *OF_THREE)
alone = by_one(binarize_case)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_bits_of_one(two, alone, name):
    check_same(two, name, 2, alone(name))
    first, second = said(two, "counts", name)
    assert first.get("run", 0) == 0
    batches = CASES[name][3]
    if batches is None:
        assert SAMPLES < second["run"] <= 2 * SAMPLES  # all of the second layer, one at least of the third
        batches = second["run"]
    assert second.get("run", 0) == batches
    assert first.get("taken", 0) + second.get("taken", 0) == batches


@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_of_which_two_wait(three, alone, name):
    check_same(three, name, 3, alone(name))
    first, *others = said(three, "counts", name, 3)
    assert first.get("run", 0) == 0
    assert sum(each.get("taken", 0) for each in (first, *others)) == sum(each["run"] for each in others)
    if name == "llama":
        assert sorted(each["run"] for each in others) == [6, 8]  # of 3, 2 and 2 batches, in each of two layers
    elif name == "two batches":  # the third rank has none, and so no call to run one with
        assert [each["run"] for each in others] == [4, 0]


@pytest.mark.parametrize(("failure", "rank"), [("running", 1), ("fitting", 0), ("loading", 1)])
def test_an_error_beside_a_fit_or_in_it_ends_all(two, failure, rank):
    found = said(two, "errors", failure)
    assert found[rank] == ["ZeroDivisionError", f"no {failure}"]
    assert found[1 - rank][0] == "OtherRankFailed"
    assert found[1 - rank][1] == f"Rank {rank} of 2 ended with an error: ZeroDivisionError: no {failure}"


@pytest.fixture(scope="module")
def short_of_memory(sources) -> Path:
    (sources / "short").mkdir()
    check(run_ranks(__file__, "short", sources))
    return sources / "short"


@pytest.mark.parametrize("name", SHORT)
def test_what_there_is_no_memory_to_run_ahead_runs_in_its_turn(short_of_memory, alone, name):
    check_same(short_of_memory, name, 2, alone("llama"))
    counts = said(short_of_memory, "counts", name)
    run, taken = (sum(each.get(kind, 0) for each in counts) for kind in ("run", "taken"))
    assert (run, taken) == SHORT[name]


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


def test_from_disk_to_disk_and_resumed(sources, alone):
    check(run_ranks(__file__, "streamed", sources))
    first, second = (json.loads((sources / f"streamed{rank}.json").read_text()) for rank in (0, 1))
    assert first[1] == second[1] == 2
    assert second[0]["run"] >= SAMPLES
    found = load_file(sources / "streamed" / "model.safetensors")
    expected = alone("llama").state_dict()
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
