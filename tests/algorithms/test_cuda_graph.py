import pytest
import torch

from optimum_arb.algorithms.cuda_graph import Replayed


def test_on_the_cpu_the_function_is_called_each_time():
    total = torch.zeros(3)
    run = Replayed(lambda: total.add_(1), total.device)
    for _ in range(4):
        run()
    assert total.tolist() == [4.0] * 3
    assert not run.recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_that_end_write_into_no_others_memory():
    """A stream that is behind, and all graphs end: what recording wrote on it, late, hit memory of another stream."""
    device = torch.device("cuda", torch.cuda.current_device())
    ahead, behind = torch.cuda.Stream(device), torch.cuda.Stream(device)
    torch.cuda.synchronize()

    def recorded(total: torch.Tensor) -> Replayed:
        run = Replayed(lambda: total.add_(1), device)
        run()
        run()
        assert run.recorded
        return run

    with torch.cuda.stream(ahead):
        first = recorded(torch.zeros(1, device=device))
    ahead.synchronize()
    with torch.cuda.stream(behind):
        total = torch.zeros(1, device=device)
        torch.cuda._sleep(2_000_000_000)  # a second
        second = recorded(total)
    assert not behind.query()  # has not written yet
    del first, second
    with torch.cuda.stream(ahead):
        small = [torch.full((1,), 7, device=device) for _ in range(2000)]
    ahead.synchronize()
    assert not behind.query()
    torch.cuda.synchronize()
    assert torch.cat(small).eq(7).all()
    assert total.item() == 2
