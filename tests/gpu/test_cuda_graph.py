"""A capture is not aborted by what happens to be garbage at the time."""

import gc

import pytest
import torch
from torch import Tensor

from onebase_kernels.cuda_graph import CapturedGraph

pytestmark = pytest.mark.usefixtures("tensors_on_the_gpu")


def test_a_graph_that_becomes_garbage_during_a_capture_lives_until_after_it() -> None:
    x = torch.zeros(8)
    kept = [CapturedGraph(lambda: x + 1)]

    def run() -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            cycle: list[object] = [kept.pop()]
            cycle.append(cycle)
            del cycle
            more_than_a_collection_waits_for = [[] for _ in range(100 * gc.get_threshold()[0])]
            assert more_than_a_collection_waits_for
        return x + 2

    captured = CapturedGraph(run)
    assert not kept
    assert gc.isenabled()
    assert torch.equal(captured(), x + 2)
