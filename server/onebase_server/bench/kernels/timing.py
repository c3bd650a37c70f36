"""How contenders are timed: interleaved, A B C A B C …, so that what disturbs the machine hits all alike.

Calls are made several in a row as a program, as a step of the decoder is: where a back end records programs, nothing of
Python comes between them.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import onebase_kernels as kernels
from onebase_kernels import StepInputs
from onebase_server.bench.kernels.trial import Call, Contender

MEASUREMENT_SECONDS = 0.02
"""How long a measurement should take at least: as many calls as that needs."""
SETTLE_SECONDS = 0.005
"""Unmeasured calls before each measurement: idle threads of the contender before may still be spinning."""
SLOW_SECONDS = 0.5
"""A contender whose one call takes longer is measured less often."""
FEWEST_MEASUREMENTS = 3
MOST_CALLS_IN_PROGRAM = 64
_RESULT_SIZE = 16

Run = Callable[[], object]
Clock = Callable[[Run, int], float]
"""Seconds that so many runs take, one after another."""


@dataclass(frozen=True)
class Burst:
    """The smallest thing that is timed of a contender: a program of several calls."""

    run: Run
    """The next program."""
    num_calls: int


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over several measurements."""

    median: float
    lowest: float
    highest: float
    measurements: int
    num_calls: int
    """Of each measurement."""


MakeBurst = Callable[[Contender, Sequence[StepInputs], Clock], Burst]


def wall_clock(run: Run, times: int) -> float:
    """The clock of a device that computes while Python waits."""
    started = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - started


def make_burst(contender: Contender, steps: Sequence[StepInputs], clock: Clock) -> Burst:
    """A contender's calls as programs, all of them for each step in turn."""
    groups = group_calls(contender, steps[0], clock)
    is_recorded = contender.backend is not None and contender.is_recordable
    programs = [_record(group, steps[0]) if is_recorded else partial(run_calls, group) for group in groups]
    return burst_of([partial(program, step) for step in steps for program in programs], len(groups[0]))


def group_calls(contender: Contender, step: StepInputs, clock: Clock) -> list[list[Call]]:
    """All calls in groups of equal size that take about as long as a measurement; the last begins anew if need be."""
    first_call = partial(contender.calls[0], step)
    clock(first_call, 1)  # it may allocate or compile
    size = min(max(1, round(MEASUREMENT_SECONDS / clock(first_call, 1))), MOST_CALLS_IN_PROGRAM)
    in_turn = itertools.cycle(contender.calls)
    return [list(itertools.islice(in_turn, size)) for _ in range(0, len(contender.calls), size)]


def burst_of(runs: Sequence[Run], num_calls: int) -> Burst:
    """These runs, of so many calls each, in turn."""
    in_turn = itertools.cycle(runs)
    return Burst(lambda: next(in_turn)(), num_calls)


def time_interleaved(
    contenders: Sequence[Contender], steps: Sequence[StepInputs], repeats: int, clock: Clock, make: MakeBurst
) -> dict[str, Timing]:
    """Measure all contenders `repeats` times, in turn; slow ones less often."""
    device_type = steps[0].token_ids.device.type
    bursts: list[Burst] = []
    times: list[int] = []
    seconds: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:
        _activate(contender, device_type)
        bursts.append(make(contender, steps, clock))
        times.append(choose_times(bursts[-1].run, clock))
    for repeat in range(repeats):
        for contender, burst, count, measured in zip(contenders, bursts, times, seconds, strict=True):
            is_slow = bool(measured) and measured[0] > SLOW_SECONDS
            if is_slow and repeat >= FEWEST_MEASUREMENTS:
                continue
            _activate(contender, device_type)
            if not is_slow:
                _settle(burst.run, clock)
            measured.append(clock(burst.run, count) / (count * burst.num_calls))
    return {
        contender.name: _summarise(measured, count * burst.num_calls)
        for contender, burst, count, measured in zip(contenders, bursts, times, seconds, strict=True)
    }


def choose_times(run: Run, clock: Clock) -> int:
    """How many runs fill a measurement; the first run, which may allocate or compile, does not count."""
    if clock(run, 1) > SLOW_SECONDS:
        return 1
    times = 1
    while (seconds := clock(run, times)) < MEASUREMENT_SECONDS:
        times = max(2 * times, min(round(times * MEASUREMENT_SECONDS / seconds), 10 * times))
    return times


def _record(group: Sequence[Call], step: StepInputs) -> Callable[[StepInputs], object]:
    """The calls as a program of the back end; a norm of a few numbers ends it, for a step has to return a result."""
    x = torch.ones(len(step.token_ids), _RESULT_SIZE, dtype=torch.bfloat16, device=step.token_ids.device)
    weight = x.new_ones(_RESULT_SIZE)

    def forward(step: StepInputs) -> Tensor:
        run_calls(group, step)
        return kernels.rms_norm(x, weight, eps=1e-6)

    return kernels.record(forward, step)


def run_calls(group: Sequence[Call], step: StepInputs) -> None:
    """All calls of a group, in a step."""
    for call in group:
        call(step)


def _activate(contender: Contender, device_type: str) -> None:
    if contender.backend is not None:
        kernels.use_backend(contender.backend, device_type)


def _settle(run: Run, clock: Clock) -> None:
    seconds = 0.0
    while seconds < SETTLE_SECONDS:
        seconds += clock(run, 1)


def _summarise(seconds: Sequence[float], num_calls: int) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), num_calls)
