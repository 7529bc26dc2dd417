import torch

from optimum_arb.algorithms.cuda_graph import Replayed


def test_on_the_cpu_the_function_is_called_each_time():
    total = torch.zeros(3)
    run = Replayed(lambda: total.add_(1), total.device)
    for _ in range(4):
        run()
    assert total.tolist() == [4.0] * 3
    assert not run.recorded
