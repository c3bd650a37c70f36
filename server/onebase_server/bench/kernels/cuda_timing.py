"""Timing on a CUDA device: graphs of calls are replayed between two events, so that no launch from Python is timed."""

from collections.abc import Sequence

import torch

from onebase_kernels import StepInputs
from onebase_server.bench.kernels import timing
from onebase_server.bench.kernels.timing import Burst, Clock, Run
from onebase_server.bench.kernels.trial import Call, Contender


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
    return timing.burst_of([_capture(group, step) for step in steps for group in groups], len(groups[0]))


def _capture(group: Sequence[Call], step: StepInputs) -> Run:
    # Libraries may set up a workspace for each stream when it first computes, which must not happen during capture.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch has no types for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        group[0](step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in group:
            call(step)
    return graph.replay
