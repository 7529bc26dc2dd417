"""How work is divided among processes, and what a process knows of the others; all in one process."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from optimum_arb.calibration.distributed import distributed, local_device, model_fingerprint
from optimum_arb.calibration.ranks import Ranks
from optimum_arb.calibration.statistics import Statistic


@pytest.mark.parametrize("batches", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_batch_has_one_rank_and_the_first_rank_has_some(batches, size):
    ranks = [Ranks() for _ in range(size)]
    for number, each in enumerate(ranks):
        each.rank, each.size = number, size
    shares = [each.batches(list(range(batches))) for each in ranks]
    assert [batch for share in shares for batch in share] == list(range(batches))
    assert shares[0]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [expert for each in ranks for expert in each.mine(batches)] == list(range(batches))


def test_linears_are_divided_by_their_size():
    ranks = Ranks()
    ranks.size = 2
    layer = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (160, 64), "up": (160, 64)}
    modules = {name: nn.Linear(columns, rows) for name, (rows, columns) in layer.items()}
    owners = ranks.owners({**modules, "down": nn.Linear(160, 64)})
    work = [sum(m.weight.numel() for name, m in modules.items() if owners[name] == rank) for rank in (0, 1)]
    work[owners["down"]] += 64 * 160
    assert max(work) <= 1.15 * sum(work) / 2
    assert Ranks().owners(modules) == dict.fromkeys(owners.keys() - {"down"}, 0)


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with distributed() as ranks:
        assert (ranks.size, ranks.is_first) == (1, True)
        assert ranks.exchange(3, "testing") == [3]
        assert ranks.merge({"a": 1}, "testing") == {"a": 1}
        ranks.check_same({"a": 1})
        assert ranks.batches([1, 2]) == [1, 2]
    with pytest.raises(ValueError, match="timeout=0 must be"), distributed(timeout=0):
        pass


def test_more_processes_than_accelerators_are_refused(monkeypatch):
    ranks = Ranks(rank=2, local_rank=2)
    ranks.size = 3
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert local_device(torch.device("cpu"), ranks) == torch.device("cpu")
    with pytest.raises(ValueError, match="Process 2 of this host has no GPU of its own: there are 2"):
        local_device(torch.device("cuda"), ranks)
    ranks.local_rank = 1
    assert local_device(torch.device("cuda:0"), ranks) == torch.device("cuda:1")


def test_the_fingerprint_tells_models_apart():
    model = tiny_model("LlamaForCausalLM")
    assert model_fingerprint(model) == model_fingerprint(tiny_model("LlamaForCausalLM"))
    assert model_fingerprint(model) != model_fingerprint(tiny_model("LlamaForCausalLM", seed=1))


def test_sums_do_not_depend_on_the_order_of_the_batches():
    """Rounded to float32, sums in float64 of 32 batches in 20 orders are equal; in float32 they are not."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 1, 96)  # channels of very different sizes
    batches = [torch.randn(64, 96, generator=generator) * scale for _ in range(32)]

    def summed(order) -> torch.Tensor:
        statistic = Statistic(96, torch.device("cpu"))
        for index in order:
            statistic.add(batches[index])
        return statistic.hessian

    first = summed(range(32))
    orders = [torch.randperm(32, generator=generator).tolist() for _ in range(20)]
    assert all(torch.equal(summed(order), first) for order in orders)
    plain = [sum((batches[index].T @ batches[index] for index in order), torch.zeros(96, 96)) for order in orders]
    assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize(
    ("size", "share", "by_steps"), [(2, 1.9, 1.4), (3, 2.6, 1.6), (4, 3.3, 1.6), (5, 4.5, 1.6), (8, 4.5, 1.6)]
)
def test_the_largest_share_of_a_layer_of_llama_2_7b(size, share, by_steps):
    """The figures of docs/parallel.md, counted in weights: of all linears together, and step by step."""
    shapes = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    with torch.device("meta"):
        linears = {name: nn.Linear(columns, rows) for name, (rows, columns) in shapes.items()}
    ranks = Ranks()
    ranks.size = size

    def largest(names) -> int:
        work = [0] * size
        for name, rank in ranks.owners({name: linears[name] for name in names}).items():
            work[rank] += linears[name].weight.numel()
        return max(work)

    total = sum(linear.weight.numel() for linear in linears.values())
    assert round(total / largest(linears), 1) == share
    assert round(total / sum(map(largest, ("qkv", "o", ("gate", "up"), ("down",)))), 1) == by_steps
