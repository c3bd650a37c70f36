"""Timing on a CUDA device: graphs of calls are replayed between two events, so that no launch from Python is timed."""

from collections.abc import Sequence
from functools import partial

import torch

from onebase_kernels import StepInputs
from onebase_kernels.cuda_graph import CapturedGraph
from onebase_server.bench.kernels import timing
from onebase_server.bench.kernels.timing import Burst, Clock, Run
from onebase_server.bench.kernels.trial import Contender


def event_clock(run: Run, times: int) -> float:
    """Seconds on the device from before the first run to after the last."""
    start, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def make_burst(contender: Contender, steps: Sequence[StepInputs], clock: Clock) -> Burst:
    """A contender's calls as graphs, all of them for each step in turn; its next calls where no graph can hold them."""
    if not contender.is_recordable:
        return timing.make_burst(contender, steps, clock)
    groups = timing.group_calls(contender, steps[0], clock)
    graphs = [CapturedGraph(partial(timing.run_calls, group, step)) for step in steps for group in groups]
    return timing.burst_of(graphs, len(groups[0]))
