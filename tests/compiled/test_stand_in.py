"""The stand-in for CUDA graphs does to memory what CUDA does, and forbids what CUDA forbids."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .graph_machine import same_bits
from .stand_in import CaptureError, Graph, Pool, StandIn


def captured(call: Callable[[], Tensor], pool: Pool | None = None) -> tuple[Graph, Tensor]:
    device = StandIn()
    return device.capture(call, device.pool() if pool is None else pool)


def test_a_replay_reads_what_lies_there_now_and_overwrites_its_result() -> None:
    x = torch.tensor([1.0, 2.0])
    graph, result = captured(lambda: (x * 2).t() + 1)
    graph.replay()
    assert result.tolist() == [3.0, 5.0]
    x.copy_(torch.tensor([10.0, 20.0]))
    assert result.tolist() == [3.0, 5.0]
    graph.replay()
    assert result.tolist() == [21.0, 41.0]


def test_warm_up_writes_and_capture_does_not() -> None:
    x = torch.zeros(2)
    graph, _ = captured(lambda: x.add_(1))
    assert x.tolist() == [StandIn.warm_ups] * 2
    graph.replay()
    assert x.tolist() == [StandIn.warm_ups + 1] * 2


def test_a_result_is_garbage_before_the_first_replay_and_after_another_graph_s() -> None:
    x = torch.tensor([1.0, 2.0])
    pool = Pool()
    (first, first_result), (second, second_result) = (captured(lambda: x + 1, pool) for _ in range(2))
    assert first_result.isnan().all()
    first.replay()
    assert same_bits(first_result, x + 1)
    second.replay()
    assert same_bits(second_result, x + 1)
    second.reset()
    assert first_result.isnan().all()
    first.replay()
    assert same_bits(first_result, x + 1)


def test_a_graph_that_was_reset_does_not_run_nor_a_pool_without_graphs_serve() -> None:
    pool = Pool()
    graph, _ = captured(lambda: torch.ones(2) + 1, pool)
    graph.reset()
    with pytest.raises(CaptureError, match="was reset"):
        graph.replay()
    with pytest.raises(CaptureError, match="the pool is gone"):
        captured(lambda: torch.ones(2) + 1, pool)


def test_memory_from_elsewhere_is_not_kept() -> None:
    def of_its_own() -> Graph:
        x = torch.ones(2)
        return captured(lambda: x + 1)[0]

    graph = of_its_own()
    with pytest.raises(CaptureError, match="memory that is gone"):
        graph.replay()


@pytest.mark.parametrize(
    "read",
    [lambda x: x * x[0].item(), lambda x: x if x[0] > 0 else -x, lambda x: x[x > 0], lambda x: x + len(x.nonzero())],
)
def test_no_value_is_read_during_capture(read: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(2)
    with pytest.raises(CaptureError, match="reads a value"):
        captured(lambda: read(x))
